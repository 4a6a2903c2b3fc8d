"""Upper bounds of scores from one bfloat16 product. What prefilter.py ranks rows by; it finds nothing by itself.

The score of token x and code c is x . key + bias (`Form`), key and bias as the similarity makes them of c. Take the
mean m of the keys of a part out, so that keys that lie close together far from the origin stay apart in bfloat16:

    score = q . r + beta + base        with base a number of the token

    without bias   r = key - m    q = x        beta = 0             base = x . m
    with bias      r = key - m    q = x        beta = bias - b      base = x . m + b, b about the mean bias
    centred        r = key - m    q = x - m    beta = -|r|^2 / 2    base = x . m - |m|^2 / 2

With q' and r' the same rounded to bfloat16, Cauchy and Schwarz give

    |q . r - q' . r'|  <=  |q - q'| |r| + |q'| |r - r'|

where the norms of what rounding took away, |q - q'| and |r - r'|, are measured and not assumed; what float32 took from
a key before (Similarity.key_error) adds to |r - r'|. A sum of E products in float32, in any order and with any fused
steps, is off by at most gamma = E 2^-23 times the sum of their sizes (2^-24 suffices), and that sum is at most
|q'| |r'| + |beta| + the terms below. So

    score - base  <=  U  =  q' . r' + beta + gamma |beta| + (|q - q'| + gamma |q'|) |r| + |q'| |r - r'|

and U + h is a product too: of the queries (q', 1, 1, |q - q'| + gamma |q'|, |q'|, h in two parts) and the keys (r',
beta + gamma |beta| in two parts, |r|, |r - r'|, 1, 1). The norms are made larger by 2^-7 before they are rounded, which
also pays for the sums among them. The bounds are per token and per row: a few rows that are much longer than the others
make the bounds of no other row wider. TINY pays for squares and products that underflow.

The product rounds its result u to bfloat16 once more, by at most 2^-8 |u|. So the shift h of a token is chosen to bring
the bounds that matter close above zero: h is minus the score to beat, or, while there is none, more than any |U|. Then
a row can reach the score to beat only if its u is positive, and positive bfloat16 numbers are ordered like their bits:
`top_of_lines` is a maximum of int16, several times as fast on a CPU.

What may be changed, and which cases of test_prefilter.py fail when it is left out (each was, once):

    UP                   norms rounded to bfloat16            "all residuals aligned": a test of its own leaves it out
    gamma                sums of float32 products             "far from the origin", rows that are there many times
    TINY                 squares that underflow               "tiny"
    2^-7 in `least`      the rounding of u to bfloat16        nearly all
    2^-12 + 8 gamma      h is rounded too, and u must be > 0  nearly all
    slack_T              float64: base, h, exact scores       families of dimension 1
    2^-22, 4 gamma |beta|, 2^-7 of beta's second part, |q - q'| in the norm of q', 1.25, ROOM: none of the families that
    were found needs them; they are what the derivation asks for, and cost nothing
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vqscale.codes.similarity import DOT, Similarity

LINE = 16  # rows that are one number in the first look at a part
GROUP = 16  # lines that are one number before that
EXTRA = 6  # columns beside the D of a row
UP = 1 + 2**-7  # times this and rounded to bfloat16 is not below
TINY = 2.0**-60  # squares of numbers below 2^-63 are lost in float32
ROOM = 2.0**100  # products of larger numbers may overflow
CHUNK = 2**19  # numbers that are rounded at once, and
PRODUCT = 2**21  # bounds that are computed at once: they stay in a cache
SAMPLE = 4096  # rows whose mean is taken out


@dataclass(frozen=True)
class Form:
    """What is to be maximised over rows: their similarity to tokens, or x . row + bias. Rows are this rank's."""

    rows_kD: Tensor
    similarity: Similarity
    bias_k: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.bias_k is None or self.similarity is DOT, "the similarity may have a bias of its own"

    def exact(self, x_PD: Tensor, row_P: Tensor) -> Tensor:
        """The scores of pairs in float64, but for a factor of the token (Similarity.exact)."""
        score_P = self.similarity.exact(x_PD.double(), self.rows_kD[row_P].double())
        return score_P if self.bias_k is None else score_P + self.bias_k[row_P].double()

    def bias(self, rows: slice) -> Tensor | None:
        """The bias of some rows: as it is given, or the similarity's in float64; None is zero."""
        if self.bias_k is not None:
            return self.bias_k[rows]
        return self.similarity.bias(self.rows_kD[rows].double())

    def is_finite(self, rows: slice) -> bool:
        """Whether all numbers of some rows are."""
        biased = self.bias_k is None or bool(self.bias_k[rows].isfinite().all())
        return biased and bool(self.rows_kD[rows].isfinite().all())

    def between(self, x_BD: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Limits of the scores of tokens (float64) and a slice of rows, by one product in float64, B x r each.

        A product sums in an order that depends on the place: of equal rows one may seem better. Rows that are not
        finite are below everything.
        """
        keys_rD = self.similarity.keys(self.rows_kD[rows].double())
        score_Br, norm_r = x_BD @ keys_rD.t(), keys_rD.norm(dim=1)
        more_r, bias_r = torch.zeros_like(norm_r), self.bias(rows)
        if bias_r is not None:
            score_Br += bias_r.double()
            more_r = bias_r.double().abs()
        error_Br = torch.addmm(more_r, x_BD.norm(dim=1, keepdim=True), norm_r[None])
        error_Br.mul_(2**-51 * (keys_rD.shape[1] + 8)).nan_to_num_(0.0, 0.0)
        score_Br.nan_to_num_(-torch.inf, -torch.inf, -torch.inf)
        return score_Br - error_Br, error_Br.add_(score_Br)


@dataclass(frozen=True)
class WideKeys:
    """Rows `start` to `stop` of this rank as keys of bounds, filled to whole groups with copies of the last row."""

    start: int
    stop: int
    wide_rE: Tensor
    mean_D: Tensor
    mean_bias: float
    longest: float  # no |r| is larger
    steepest: float  # no |beta| is larger
    centred: bool  # queries are x - mean

    @property
    def lines(self) -> int:
        return len(self.wide_rE) // LINE


@dataclass(frozen=True)
class WideQueries:
    """Tokens as queries of bounds, for the keys that they were made for."""

    wide_TE: Tensor
    base_T: Tensor  # float64: the score minus this is bounded by U
    shift_T: Tensor  # float64: h
    slack_T: Tensor  # float64: more than the rounding of base, of h and of exact scores
    fits_T: Tensor  # nothing overflows for these tokens; the bounds of others mean nothing

    def least(self, score_T: Tensor) -> Tensor:
        """A row that scores at least score_T (float64) has a u of at least this (float32)."""
        least_T = score_T - self.base_T + self.shift_T - self.slack_T
        return (least_T - 2**-7 * least_T.abs()).float()


def key_size(num_rows: int, dim: int) -> int:
    """How many numbers the keys of some rows have."""
    return -(-num_rows // (LINE * GROUP)) * LINE * GROUP * (dim + EXTRA)


def make_keys(form: Form, start: int, stop: int, buffer: Tensor | None = None) -> WideKeys:
    """The keys of some rows (at least one), in `buffer` if there is one: flat, bfloat16, `key_size` numbers."""
    rows_rD = form.rows_kD[start:stop]
    num, dim = rows_rD.shape
    size = key_size(num, dim)
    if buffer is None:
        buffer = rows_rD.new_empty(size, dtype=torch.bfloat16)
    wide_rE = buffer[:size].view(-1, dim + EXTRA)
    mean_D, mean_bias = _mean(form, rows_rD), _mean_bias(form, start, stop)
    step = min(num, max(LINE, CHUNK // dim))
    memory_rD = rows_rD.new_empty((step, dim))  # fresh memory for every chunk would take most of the time
    tops = []
    for first in range(0, num, step):
        chunk = slice(first, min(first + step, num))
        keys_rD = form.similarity.keys(rows_rD[chunk])
        r_rD = torch.sub(keys_rD, mean_D, out=memory_rD[: chunk.stop - chunk.start])
        error_r = form.similarity.key_error(keys_rD, _gamma(dim))
        tops.append(_fill(wide_rE[chunk], r_rD, error_r, _beta(form, start, chunk, mean_bias), form.similarity.centred))
    wide_rE[num:] = wide_rE[num - 1]
    longest, steepest = torch.stack(tops).amax(0).tolist()
    return WideKeys(start, stop, wide_rE, mean_D, mean_bias, longest, steepest, form.similarity.centred)


def _mean_bias(form: Form, start: int, stop: int) -> float:
    """About the mean of the biases, for the same reason as `_mean`."""
    if form.similarity.centred:
        return 0.0
    every = 1 if form.bias_k is not None else max(1, (stop - start) // SAMPLE)
    bias_r = form.bias(slice(start, stop, every))
    return 0.0 if bias_r is None else float(bias_r.mean())


def _beta(form: Form, start: int, chunk: slice, mean_bias: float) -> Tensor | None:
    """bias - b of a chunk, None for zero; for a similarity that is centred `_fill` makes it of |r|."""
    if form.similarity.centred:
        return None
    bias_r = form.bias(slice(start + chunk.start, start + chunk.stop))
    return None if bias_r is None else (bias_r - mean_bias).float()


def _fill(wide_rE: Tensor, r_rD: Tensor, error_r: Tensor | float, beta_r: Tensor | None, centred: bool) -> Tensor:
    """Write the keys of a chunk, destroying r; returns (largest |r|, largest |beta|)."""
    dim = r_rD.shape[1]
    gamma = _gamma(dim)
    wide_rE[:, :dim] = r_rD
    norm_r = r_rD.norm(dim=1) * (1 + gamma) + TINY
    # Beside what bfloat16 takes: r is a difference of float32 numbers, which may be rounded themselves.
    lost_r = r_rD.sub_(wide_rE[:, :dim]).norm(dim=1) * (1 + gamma) + 2**-22 * norm_r + TINY
    lost_r += error_r
    if beta_r is None:
        beta_r = -0.5 * norm_r.square() if centred else torch.zeros_like(norm_r)
    tops = torch.stack([norm_r.amax(), beta_r.abs().amax()])
    beta_r = beta_r + 4 * gamma * beta_r.abs() + TINY
    extra_r6 = norm_r.new_ones((len(norm_r), EXTRA))
    extra_r6[:, 0] = beta_r
    rest_r = beta_r - extra_r6[:, 0].bfloat16()
    extra_r6[:, 1] = rest_r + 2**-7 * rest_r.abs()
    extra_r6[:, 2] = norm_r * UP
    extra_r6[:, 3] = lost_r * UP
    wide_rE[:, dim:] = extra_r6
    return tops


def make_queries(x_TD: Tensor, keys: WideKeys, score_T: Tensor) -> WideQueries:
    """The queries of some tokens for these keys; `score_T` (float64) is the score to beat, -inf for none."""
    num, dim = x_TD.shape
    gamma = _gamma(dim)
    q_TD = x_TD - keys.mean_D if keys.centred else x_TD
    wide_TE = x_TD.new_ones((num, dim + EXTRA), dtype=torch.bfloat16)
    wide_TE[:, :dim] = q_TD
    norm_T = q_TD.norm(dim=1) * (1 + gamma) + TINY
    lost_T = (q_TD - wide_TE[:, :dim]).norm(dim=1) * (1 + gamma) + 2**-22 * norm_T + TINY
    norm_T = norm_T + lost_T  # of q'
    wide_TE[:, dim + 2] = (lost_T + gamma * norm_T) * UP
    wide_TE[:, dim + 3] = norm_T * UP
    mean_D, x_TD = keys.mean_D.double(), x_TD.double()
    square = mean_D.square().sum()
    base_T = x_TD @ mean_D + (-0.5 * square if keys.centred else keys.mean_bias)
    most_T = 1.25 * (norm_T.double() * keys.longest + keys.steepest) + TINY
    size_T = (x_TD.norm(dim=1) + keys.longest) * (square.sqrt() + keys.longest) + keys.steepest + abs(keys.mean_bias)
    slack_T = 2**-48 * (dim + 8) * (size_T + base_T.abs()) + TINY
    # Above zero by more than everything that is uncertain about it.
    beat_T = score_T - base_T
    shift_T = torch.where(score_T.isfinite(), (2**-12 + 8 * gamma) * beat_T.abs() - beat_T + 4 * slack_T, most_T)
    wide_TE[:, dim + 4] = shift_T
    wide_TE[:, dim + 5] = shift_T - wide_TE[:, dim + 4]
    shift_T = wide_TE[:, dim + 4 :].double().sum(1)
    slack_T += 2 * gamma * shift_T.abs()
    return WideQueries(wide_TE, base_T, shift_T, slack_T, (most_T < ROOM) & (shift_T.abs() < ROOM))


def top_of_lines(keys: WideKeys, queries: WideQueries, out_LT: Tensor) -> None:
    """The highest u of each line, or 0 where none is positive, in blocks that stay in a cache."""
    num_tokens = len(queries.wide_TE)
    step = max(1, min(keys.lines, PRODUCT // (LINE * num_tokens)))
    buffer_rT = out_LT.new_empty((step * LINE, num_tokens))
    for first in range(0, keys.lines, step):
        last = min(first + step, keys.lines)
        u_rT = buffer_rT[: (last - first) * LINE]
        torch.mm(keys.wide_rE[first * LINE : last * LINE], queries.wide_TE.t(), out=u_rT)
        bits_lLT = u_rT.view(torch.int16).view(-1, LINE, num_tokens)
        torch.amax(bits_lLT, 1, out=out_LT[first:last].view(torch.int16))
    out_LT.view(torch.int16).clamp_min_(0)


def top(u: Tensor, dim: int) -> Tensor:
    """The maximum of bounds none of which is negative."""
    return u.view(torch.int16).amax(dim).view(torch.bfloat16)


def in_lines(keys: WideKeys, queries: WideQueries, line_P: Tensor, token_P: Tensor) -> Tensor:
    """u of the rows of lines, each line for one token: P x LINE."""
    keys_PLE = keys.wide_rE.view(-1, LINE, keys.wide_rE.shape[1])[line_P]
    return torch.bmm(keys_PLE, queries.wide_TE[token_P, :, None]).squeeze(2)


def _gamma(dim: int) -> float:
    return (dim + EXTRA + 8) * 2**-23


def _mean(form: Form, rows_rD: Tensor) -> Tensor:
    """About the mean of the keys: any point is right, the mean makes bounds narrow."""
    return form.similarity.keys(rows_rD[:: max(1, len(rows_rD) // SAMPLE)]).mean(0)
