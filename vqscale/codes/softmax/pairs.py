"""The few pairs (token, row) of a block whose probability is not below rounding, as a list instead of a block.

A softmax over K codes loses at most the share 2^-24 of its sum, the rounding of a float32, when every pair whose
score is more than `depth` = 24 + log2 K bits below the token's highest is left out: each of them is below 2^-depth, and
there are at most K. README.md says why that bounds the gradients too. Where few pairs are left (a low temperature, or
a codebook far from a token but for some codes), all that follows, the mean row, the entropies, the sums over columns
and the backward pass, costs these pairs and not tokens x codes. Not here: which blocks are dense (forward.py). CPU
only: the lengths of lists are read on the host.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.codes.scan import LINE

PER_TOKEN = 512  # pairs that a list may hold on average, so that its memory grows with the tokens alone
SOME_LINES = 8  # where more than one line in 8 is high, the whole block is searched and not its lines
ROWS_AT_ONCE = 8192  # rows whose gradient is in flight while it is added


def depth(num_codes: int, dtype: torch.dtype = torch.float32) -> float:
    """Bits below the highest logit under which pairs are left out; see the top of the file."""
    return (53.0 if dtype == torch.float64 else 24.0) + math.log2(max(num_codes, 1))


def find(s_br: Tensor, peak_bL: Tensor, floor_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(token_P, row_P, score_P) of every score of the block that is not below its token's floor, tokens in order.

    What is not a number is not below: it is found, so that it reaches the result.
    """
    high_bL = (peak_bL < floor_b[:, None]).logical_not_()
    if int(high_bL.sum()) * SOME_LINES > high_bL.numel():
        token_P, row_P = (s_br < floor_b[:, None]).logical_not_().nonzero(as_tuple=True)
        return token_P, row_P, s_br[token_P, row_P]
    token_H, line_H = high_bL.nonzero(as_tuple=True)
    column_HL = line_H[:, None] * LINE + torch.arange(LINE, device=s_br.device)
    inside_HL = column_HL < s_br.shape[1]
    column_HL.clamp_(max=s_br.shape[1] - 1)
    score_HL = s_br[token_H[:, None], column_HL]
    high_H, place_H = ((score_HL < floor_b[token_H, None]).logical_not_() & inside_HL).nonzero(as_tuple=True)
    return token_H[high_H], column_HL[high_H, place_H], score_HL[high_H, place_H]


@dataclass
class Pairs:
    """Pairs of B tokens, in the order of tokens; `score_P` is x . key + bias."""

    token_P: Tensor
    row_P: Tensor
    score_P: Tensor
    num_tokens: int

    def __len__(self) -> int:
        return len(self.token_P)

    def take(self, keep_P: Tensor) -> Pairs:
        return Pairs(self.token_P[keep_P], self.row_P[keep_P], self.score_P[keep_P], self.num_tokens)

    def sums(self, weight_P: Tensor) -> Tensor:
        """sum over the pairs of each token: B numbers."""
        return weight_P.new_zeros(self.num_tokens).index_add_(0, self.token_P, weight_P)

    def columns(self, weight_P: Tensor, num_rows: int) -> Tensor:
        """sum over the pairs of each row: k numbers."""
        return weight_P.new_zeros(num_rows).index_add_(0, self.row_P, weight_P)

    def mean(self, weight_P: Tensor, values_kD: Tensor) -> Tensor:
        """sum_j weight_nj value_j: B x D."""
        if not len(self):
            return values_kD.new_zeros(self.num_tokens, values_kD.shape[1])
        return _bags(self.row_P, values_kD, self._bounds()[:-1], weight_P)

    def dot(self, g_BD: Tensor, values_kD: Tensor) -> Tensor:
        """g_n . value_j of every pair: P numbers."""
        if not len(self):
            return g_BD.new_zeros(0)
        shape = (self.num_tokens, len(values_kD))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            zeros_P = torch.zeros_like(self.score_P)
            pattern = torch.sparse_csr_tensor(self._bounds(), self.row_P, zeros_P, shape, check_invariants=False)
            found = torch.sparse.sampled_addmm(pattern, g_BD, values_kD.t(), beta=0.0)
        return found.values()

    def add_outer(self, weight_P: Tensor, x_BD: Tensor, out_kD: Tensor) -> None:
        """out_j += sum_n weight_nj x_n, in place."""
        order_P = self.row_P.argsort(stable=True)
        row_U, count_U = torch.unique_consecutive(self.row_P[order_P], return_counts=True)
        end_U = count_U.cumsum(0)
        for first in range(0, len(row_U), ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, len(row_U))
            begin, end = int(end_U[first] - count_U[first]), int(end_U[last - 1])
            some_P = order_P[begin:end]
            starts_U = end_U[first:last] - count_U[first:last] - begin
            part_UD = _bags(self.token_P[some_P], x_BD, starts_U, weight_P[some_P])
            out_kD.index_add_(0, row_U[first:last], part_UD)

    def _bounds(self) -> Tensor:
        """Where the pairs of each token begin, and after the last of them where all end: B + 1 numbers."""
        return F.pad(torch.bincount(self.token_P, minlength=self.num_tokens).cumsum(0), (1, 0))


def _bags(index_P: Tensor, table: Tensor, starts: Tensor, weight_P: Tensor) -> Tensor:
    """Weighted sums of rows of a table, bag after bag, without the rows themselves in memory."""
    return F.embedding_bag(index_P, table, starts, mode="sum", per_sample_weights=weight_P.to(table.dtype))


@dataclass
class Collector:
    """Pairs while they are found, block after block; at most PER_TOKEN per token on average."""

    num_tokens: int
    count: int = 0
    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def add(self, found: tuple[Tensor, Tensor, Tensor], first_token: int, first_row: int) -> bool:
        """Keep the pairs of a block, numbered in the block; False, and nothing is kept, where there is no room."""
        token_P, row_P, score_P = found
        if self.count + len(token_P) > PER_TOKEN * self.num_tokens:
            return False
        self.count += len(token_P)
        self.parts.append((token_P + first_token, row_P + first_row, score_P))
        return True

    def close(self, like: Tensor) -> Pairs:
        """All pairs, in the order of tokens and, of one token, of rows."""
        if not self.parts:
            none = torch.zeros(0, dtype=torch.int64, device=like.device)
            return Pairs(none, none, like.new_zeros(0), self.num_tokens)
        token_P, row_P, score_P = (torch.cat(parts) for parts in zip(*self.parts, strict=True))
        self.parts.clear()
        order_P = token_P.argsort(stable=True)
        return Pairs(token_P[order_P], row_P[order_P], score_P[order_P], self.num_tokens)
