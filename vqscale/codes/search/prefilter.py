"""Exact search by a prefilter: a bfloat16 product bounds all scores from above, float64 decides between the few left.

`scan.best` is the plain form: one product in the rows' precision. Here the ids are those of float64 arithmetic on the
given float32 numbers, the lowest among equals, for about half the time where bfloat16 products are fast. Local
arithmetic: nothing here talks. Rows go in parts, tokens in blocks inside a part; for one of them:

    1. upper bounds of all scores, 16 rows at a time reduced to their largest (a line), 16 lines to theirs (a group)
    2. a token none of whose groups can hold a row better than its best so far is done with this part
    3. the row with the highest bound of the most promising line is scored exactly: a better best so far
    4. all lines whose bound reaches it: the bounds of their rows again
    5. all rows whose bound reaches it: scored exactly; the best wins, the lowest row among equals

The row that float64 prefers is never dropped: its score is at least the best so far, its bound at least its score. If
too many groups are left for a token (equal rows, rows that bfloat16 cannot tell apart), or numbers are so large that a
bound may overflow, the part is scored in float64 for this token instead. Memory follows the budget and is never
tokens x rows.

Suffixes here: T tokens of a block, L lines of a part (as the last letter, the rows of a line), G groups of a part (the
lines of a group), A tokens that step 2 leaves, P Q R pairs, of a token with a group, a line, a row in this order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from vqscale.codes import products
from vqscale.codes.search import bounds
from vqscale.codes.search.bounds import GROUP, LINE, Form, WideKeys

TOKEN_BLOCK = 2048
LEAST_TOKENS, LEAST_ROWS, LEAST_PAIRS = 256, 8192, 2**24  # with fewer, plain measured faster
DIMS = 32, 4096
MOST_LINES = 1 / 64  # of the lines of a part: with more left, a product in float64 is faster


def serves(x_BD: Tensor, form: Form) -> bool:
    """Whether the prefilter makes the exact search faster for these tokens and rows; the one place that decides.

    It is on a CPU with bfloat16 products (AVX512-BF16 or AMX), in float32, from a size on at which the product is most
    of the work. A GPU searches plainly: nothing was measured there.
    """
    rows_kD = form.rows_kD
    if x_BD.device.type != "cpu" or not x_BD.dtype == rows_kD.dtype == torch.float32:
        return False
    pairs = len(x_BD) * len(rows_kD)
    large = len(x_BD) >= LEAST_TOKENS and len(rows_kD) >= LEAST_ROWS and pairs >= LEAST_PAIRS
    return large and DIMS[0] <= x_BD.shape[1] <= DIMS[1] and products.fast_on_cpu()


def best(x_BD: Tensor, form: Form, budget: int) -> tuple[Tensor, Tensor]:
    """The highest score (float64) of each token over the rows of this rank and the lowest row that has it.

    Without rows, and for a token that is not finite, the score is -inf and the row 0. Where a row is not finite the
    scores of all other tokens are not numbers; their rows are the best of what is finite.
    """
    num, dim = x_BD.shape
    score_B = x_BD.new_full((num,), -torch.inf, dtype=torch.float64)
    row_B = torch.zeros(num, dtype=torch.int64, device=x_BD.device)
    tokens = [slice(first, min(first + TOKEN_BLOCK, num)) for first in range(0, num, TOKEN_BLOCK)]
    finite_B = x_BD.isfinite().all(1)
    ranges = list(parts(len(form.rows_kD), dim, min(num, TOKEN_BLOCK), budget))
    size = max((bounds.key_size(stop - start, dim) for start, stop in ranges), default=0)
    memory = x_BD.new_empty(size, dtype=torch.bfloat16)
    lines = x_BD.new_empty(size // (dim + bounds.EXTRA) // LINE * min(num, TOKEN_BLOCK), dtype=torch.bfloat16)
    sound = True
    for start, stop in ranges:
        keys = bounds.make_keys(form, start, stop, memory)
        # Not finite may be a square alone.
        sound = sound and (math.isfinite(keys.longest + keys.steepest) or form.is_finite(slice(start, stop)))
        for some in tokens:
            line_LT = lines[: keys.lines * (some.stop - some.start)].view(keys.lines, -1)
            _Part(form, keys, x_BD[some], finite_B[some], score_B[some], row_B[some], budget).search(line_LT)
    score_B = form.similarity.finish(score_B, x_BD)
    return score_B if sound else score_B.masked_fill_(finite_B, torch.nan), row_B


def parts(num_rows: int, dim: int, num_tokens: int, budget: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose keys and lines take half of `budget`."""
    row_bytes = 2 * (dim + bounds.EXTRA) + 2 * num_tokens // LINE
    step = max(1, budget // (2 * row_bytes * LINE * GROUP)) * LINE * GROUP
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


class _Part:
    """The search of a block of tokens in a part of the rows. Changes their best so far, score_T and row_T, in place."""

    def __init__(
        self, form: Form, keys: WideKeys, x_TD: Tensor, finite_T: Tensor, score_T: Tensor, row_T: Tensor, budget: int
    ) -> None:
        self.form, self.keys, self.x_TD, self.budget = form, keys, x_TD, budget
        self.score_T, self.row_T = score_T, row_T
        self.before_T, self.row_before_T = score_T.clone(), row_T.clone()
        self.queries = bounds.make_queries(x_TD, keys, score_T)
        self.plain_T = finite_T & ~self.queries.fits_T
        self.filtered_T = finite_T & self.queries.fits_T

    def search(self, line_LT: Tensor) -> None:
        """The numbered steps of the file's head; `line_LT` is memory for the bounds of all lines."""
        bounds.top_of_lines(self.keys, self.queries, line_LT)  # (1)
        group_GT = bounds.top(line_LT.view(-1, GROUP, line_LT.shape[1]), 1)
        least_T = self.queries.least(self.score_T)
        token_A = torch.nonzero(self.filtered_T & (bounds.top(group_GT, 0) >= least_T)).squeeze(1)  # (2)
        if len(token_A):
            group_GA = group_GT if len(token_A) == group_GT.shape[1] else group_GT[:, token_A]
            seen_T = self._score_best_line(line_LT, group_GA.argmax(0), token_A)  # (3)
            self._score_other_lines(line_LT, group_GA, token_A, seen_T)  # (4), (5)
        for token_P in torch.nonzero(self.plain_T).squeeze(1).split(TOKEN_BLOCK):
            self._search_plainly(token_P)

    def _score_best_line(self, line_LT: Tensor, group_A: Tensor, token_A: Tensor) -> Tensor:
        """Score the row with the highest bound in each token's most promising line, then what is left of that line.

        Returns the line of each token, -1 for tokens without one.
        """
        line_AG = group_A[:, None] * GROUP + torch.arange(GROUP, device=group_A.device)
        line_A = line_AG.gather(1, line_LT[line_AG, token_A[:, None]].argmax(1, keepdim=True)).squeeze(1)
        for some in self._chunks(len(token_A)):
            line_P, token_P = line_A[some], token_A[some]
            u_PL = bounds.in_lines(self.keys, self.queries, line_P, token_P)
            first_P = u_PL.argmax(1)
            self._update_best(line_P * LINE + first_P, token_P)
            rest_PL = u_PL >= self.queries.least(self.score_T)[token_P, None]
            self._score_rows(rest_PL.scatter_(1, first_P[:, None], False), line_P, token_P)
        seen_T = torch.full_like(self.row_T, -1)
        return seen_T.index_copy_(0, token_A, line_A)

    def _score_other_lines(self, line_LT: Tensor, group_GA: Tensor, token_A: Tensor, seen_T: Tensor) -> None:
        """Score every row of other lines that may be better than the best so far, or equal and lower."""
        least_T = self.queries.least(self.score_T)
        group_P, at_P = torch.nonzero(group_GA >= least_T[token_A], as_tuple=True)
        crowded_A = torch.bincount(at_P, minlength=len(token_A)) > GROUP + self.keys.lines * MOST_LINES
        self.plain_T[token_A[crowded_A]] = True
        kept_P = ~crowded_A[at_P]
        group_P, token_P = group_P[kept_P], token_A[at_P[kept_P]]
        line_PG = group_P[:, None] * GROUP + torch.arange(GROUP, device=group_P.device)
        # (4): of the groups that are left the lines, and of these the rows
        left_PG = (line_LT[line_PG, token_P[:, None]] >= least_T[token_P, None]) & (line_PG != seen_T[token_P, None])
        pair_Q, in_group_Q = torch.nonzero(left_PG, as_tuple=True)
        line_Q, token_Q = line_PG[pair_Q, in_group_Q], token_P[pair_Q]
        for some in self._chunks(len(line_Q)):
            u_PL = bounds.in_lines(self.keys, self.queries, line_Q[some], token_Q[some])
            # (5)
            self._score_rows(u_PL >= least_T[token_Q[some], None], line_Q[some], token_Q[some])

    def _chunks(self, num_lines: int) -> Iterator[slice]:
        """Lines whose keys in bfloat16 and rows in float64 take a quarter of the budget."""
        step = max(1, self.budget // (4 * LINE * 10 * self.keys.wide_rE.shape[1]))
        for first in range(0, num_lines, step):
            yield slice(first, first + step)

    def _score_rows(self, which_PL: Tensor, line_P: Tensor, token_P: Tensor) -> None:
        """Take the marked rows of lines, each line for one token, into the best so far."""
        pair_R, in_line_R = torch.nonzero(which_PL, as_tuple=True)
        if len(pair_R):
            self._update_best(line_P[pair_R] * LINE + in_line_R, token_P[pair_R])

    def _update_best(self, row_P: Tensor, token_P: Tensor) -> None:
        """Take exact scores of pairs into the best so far of their tokens; rows count from the start of this part."""
        row_P = row_P.clamp(max=self.keys.stop - self.keys.start - 1) + self.keys.start
        score_P = self.form.exact(self.x_TD[token_P], row_P)
        top_T = self.score_T.scatter_reduce(0, token_P, score_P, "amax")
        # The lowest row among equals: of the pairs, and of the best so far where it is still the best.
        last = torch.iinfo(torch.int64).max
        row_T = torch.where(self.score_T == top_T, self.row_T, last)
        row_T.scatter_reduce_(0, token_P, torch.where(score_P == top_T[token_P], row_P, last), "amin")
        self.score_T.copy_(top_T)
        self.row_T.copy_(row_T)

    def _search_plainly(self, token_P: Tensor) -> None:
        """The same by products in float64 with all rows of the part. Scores closer than its rounding are equal."""
        x_PD = self.x_TD[token_P].double()
        high_P = x_PD.new_full((len(x_PD),), -torch.inf)
        row_P = torch.zeros_like(token_P)
        step = max(LINE, self.budget // (64 * max(len(token_P), x_PD.shape[1])))
        for first in range(self.keys.start, self.keys.stop, step):
            low_Pr, high_Pr = self.form.between(x_PD, slice(first, min(first + step, self.keys.stop)))
            top_P = low_Pr.amax(1)
            lowest_P = (high_Pr >= top_P[:, None]).byte().argmax(1)
            better_P = top_P > high_P
            high_P = torch.where(better_P, high_Pr.gather(1, lowest_P[:, None]).squeeze(1), high_P)
            row_P = torch.where(better_P, lowest_P + first, row_P)
        # What the prefilter has found in this part meanwhile may be an equal row with a higher number: begin again.
        score_P, before_P = self.form.exact(self.x_TD[token_P], row_P), self.before_T[token_P]
        better_P = score_P > before_P
        self.score_T[token_P] = torch.where(better_P, score_P, before_P)
        self.row_T[token_P] = torch.where(better_P, row_P, self.row_before_T[token_P])
