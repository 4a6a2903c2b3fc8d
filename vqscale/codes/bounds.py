"""Upper bounds of scores from one bfloat16 product. What `screen` ranks rows by; it finds nothing by itself.

The score of token x and code c is x . c, x . c - |c|^2 / 2, x . c / |c| or x . c + bias (`Form`). Take the mean m of the
rows of a part out, so that rows that lie close together far from the origin stay apart in bfloat16:

    score = q . r + beta + base        with base a number of the token

    dot      r = c - m          q = x         beta = 0               base = x . m
    bias     r = c - m          q = x         beta = bias - b        base = x . m + b, b the mean bias
    cosine   r = c / |c| - m    q = x         beta = 0               base = x . m
    euclid   r = c - m          q = x - m     beta = -|r|^2 / 2      base = x . m - |m|^2 / 2

With q' and r' the same rounded to bfloat16, Cauchy and Schwarz give

    |q . r - q' . r'|  <=  |q - q'| |r| + |q'| |r - r'|

where the norms of what rounding took away, |q - q'| and |r - r'|, are measured and not assumed. A sum of E products in
float32, in any order and with any fused steps, is off by at most gamma = E 2^-23 times the sum of their sizes (2^-24
suffices), and that sum is at most |q'| |r'| + |beta| + the terms below. So

    score - base  <=  U  =  q' . r' + beta (1 + gamma) + (|q - q'| + gamma |q'|) |r| + |q'| |r - r'|

and U is a product too: of the queries (q', 1, 1, |q - q'| + gamma |q'|, |q'|) and the keys (r', beta in two parts, |r|,
|r - r'|), each of the last four rounded up by 2^-7, which also pays for the sums among them. The bounds are per token
and per row: a few rows that are much longer than the others make the bounds of no other row wider. TINY pays for squares
and products that underflow. A bfloat16 product rounds its result once more: the true U is at most u + 2^-8 |u|.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.codes.config import Similarity

LINE = 16  # rows that are one number in the first look at a part
EXTRA = 4  # columns beside the D of a row
UP = 1 + 2**-7  # times this and rounded to bfloat16 is not below
TINY = 2.0**-60  # squares of numbers below 2^-63 are lost in float32
ROOM = 2.0**100  # products of larger numbers may overflow
CHUNK = 2**19  # numbers that are rounded at once: they stay in a cache


@dataclass(frozen=True)
class Form:
    """What is to be maximised over rows: their similarity to tokens, or x . row + bias. Rows are this rank's."""

    rows_kD: Tensor
    similarity: Similarity = "dot"
    bias_k: Tensor | None = None

    def exact(self, x_PD: Tensor, row_P: Tensor) -> Tensor:
        """The scores of pairs in float64. Equal rows have equal scores: every pair is summed in the same order.

        For `cosine` the token is taken as it is: a factor of the token moves no maximum.
        """
        c_PD = self.rows_kD[row_P].double()
        score_P = (x_PD.double() * c_PD).sum(1)
        if self.similarity == "euclid":
            score_P -= 0.5 * c_PD.square().sum(1)
        elif self.similarity == "cosine":
            score_P /= c_PD.norm(dim=1).clamp_min_(1e-12)
        return score_P if self.bias_k is None else score_P + self.bias_k[row_P].double()

    def block(self, x_BD: Tensor, rows: slice) -> Tensor:
        """The scores of tokens and a slice of rows as one product in float64."""
        c_rD = self.rows_kD[rows].double()
        if self.similarity == "cosine":
            c_rD = F.normalize(c_rD, dim=1)
        score_Br = x_BD.double() @ c_rD.t()
        if self.similarity == "euclid":
            score_Br -= 0.5 * c_rD.square().sum(1)
        return score_Br if self.bias_k is None else score_Br.add_(self.bias_k[rows].double())


@dataclass(frozen=True)
class Keys:
    """Rows `start` to `stop` of this rank as keys of bounds, filled to whole lines with copies of the last row."""

    start: int
    stop: int
    wide_rE: Tensor
    mean_D: Tensor
    mean_bias: float
    reach: float  # no key has a larger |r|, |beta|
    centred: bool  # queries are x - mean

    @property
    def lines(self) -> int:
        return len(self.wide_rE) // LINE


@dataclass(frozen=True)
class Queries:
    wide_TE: Tensor
    base_T: Tensor  # float64
    slack_T: Tensor  # float64: more than the rounding of base and of exact scores
    fits_T: Tensor  # nothing overflows for these tokens; the bounds of others mean nothing


def make_keys(form: Form, start: int, stop: int) -> Keys:
    """The keys of some rows; `stop` is after `start`."""
    rows_rD = form.rows_kD[start:stop]
    num, dim = rows_rD.shape
    gamma = _gamma(dim)
    wide_rE = rows_rD.new_empty((-(-num // LINE) * LINE, dim + EXTRA), dtype=torch.bfloat16)
    mean_D, mean_bias = _mean(form, rows_rD), 0.0
    bias_r = None
    if form.bias_k is not None:
        bias_r = form.bias_k[start:stop].float()
        mean_bias = float(bias_r.mean())
    most = rows_rD.new_zeros(())
    step = max(LINE, CHUNK // dim)
    for first in range(0, num, step):
        chunk = slice(first, min(first + step, num))
        r_rD = _unit(form, rows_rD[chunk]) - mean_D
        wide_rE[chunk, :dim] = r_rD
        norm_r = r_rD.norm(dim=1)
        lost_r = torch.sub(r_rD, wide_rE[chunk, :dim], out=r_rD).norm(dim=1)
        norm_r = norm_r * (1 + gamma) + TINY
        # What r itself has lost: it is a difference of float32 numbers, of the unit sphere for `cosine`.
        lost_r = lost_r * (1 + gamma) + gamma * (1.0 if form.similarity == "cosine" else 0.0) + 2**-22 * norm_r + TINY
        beta_r = torch.zeros_like(norm_r)
        if bias_r is not None:
            beta_r = bias_r[chunk] - mean_bias
        elif form.similarity == "euclid":
            beta_r = -0.5 * norm_r.square()
        most = torch.maximum(most, torch.maximum(norm_r, beta_r.abs()).amax())
        beta_r += 4 * gamma * beta_r.abs() + TINY
        wide_rE[chunk, dim] = beta_r
        rest_r = beta_r - wide_rE[chunk, dim]
        wide_rE[chunk, dim + 1] = rest_r + 2**-7 * rest_r.abs()
        wide_rE[chunk, dim + 2] = norm_r * UP
        wide_rE[chunk, dim + 3] = lost_r * UP
    wide_rE[num:] = wide_rE[num - 1]
    return Keys(start, stop, wide_rE, mean_D, mean_bias, float(most), form.similarity == "euclid")


def make_queries(x_TD: Tensor, keys: Keys) -> Queries:
    """The queries of some tokens, for these keys."""
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
    size_T = (x_TD.norm(dim=1) + keys.reach) * (square.sqrt() + keys.reach) + abs(keys.mean_bias)
    most_T = (norm_T.double() + 1) * (keys.reach + 1)
    return Queries(wide_TE, base_T, 2**-48 * (dim + 8) * size_T, most_T < ROOM)


def bounds(keys_rE: Tensor, queries_TE: Tensor, out_rT: Tensor) -> Tensor:
    """u of rows and tokens, rounded to bfloat16."""
    return torch.mm(keys_rE, queries_TE.t(), out=out_rT)


def lowest_bound(score_T: Tensor, queries: Queries) -> Tensor:
    """A row that scores at least score_T (float64) has a u of at least this (float32)."""
    least_T = score_T - queries.base_T - queries.slack_T
    return (least_T - 2**-7 * least_T.abs()).float() - TINY


def _gamma(dim: int) -> float:
    return (dim + EXTRA + 8) * 2**-23


def _unit(form: Form, rows_rD: Tensor) -> Tensor:
    rows_rD = rows_rD.float()
    return F.normalize(rows_rD, dim=1) if form.similarity == "cosine" else rows_rD


def _mean(form: Form, rows_rD: Tensor) -> Tensor:
    """Any point is right; the mean makes bounds narrow. Unit rows need their own mean."""
    if form.similarity != "cosine":
        return rows_rD.mean(0)
    norm_r = rows_rD.norm(dim=1).clamp_min_(1e-12)
    return (1 / norm_r) @ rows_rD / len(rows_rD)
