"""The softmax of tokens over this rank's rows, in one blockwise pass. Local arithmetic; autograd.py merges the ranks.

Logits are in bits, l_nj = (x_n . key_j + bias_j) / (T ln 2), so that probabilities are powers of two: exp2 is three
times as fast as exp on a CPU. Between blocks stands the state of an online softmax: the maximum, the sum, the mean row.
The best row is that of the scores themselves, before any factor: equal scores stay equal. Products of 2 B k D
operations, with B tokens of the whole code group, k rows of this rank, D dimensions:

    mix        2   logits, mean row               (+1, and +1 in the backward pass, where the second temperature
    unmix      4   logits, values, x, keys            is not served by pairs)

With `products` bf16 the four that are not logits are rounded: mean rows to 2^-8 and gradients to 2^-6 of their norms,
while ids, normalisers and entropies keep every bit.

What goes below that, on a CPU, and how much is lost by it (pairs.py: the share 2^-24 of a softmax at most):

* a second, lower temperature (the entropy losses) has few pairs (token, row) that are not below rounding. They are
  found in the one pass, by the maxima of lines of logits, and all that follows costs pairs, not tokens x codes;
* a block in which the first temperature has few such pairs is not multiplied again: not for the mean row, and not in
  the backward pass. A block with none is skipped.

Where the lists would be long, the blocks are dense: the memory of a list is bounded by the tokens alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vqscale.codes import scan
from vqscale.codes.config import Products
from vqscale.codes.products import add_product, operand
from vqscale.codes.scan import BITS, LOWEST, Keys, exp2_
from vqscale.codes.softmax import pairs
from vqscale.codes.softmax.pairs import Collector, Pairs

SPARSE_LINES = 0.75  # a block in which a larger share of the lines has a high logit is dense at once,
SPARSE_PAIRS = 1 / 32  # and so is one with a larger share of high logits: a pair costs about 20 dense ones


@dataclass(frozen=True)
class Wanted:
    """What is asked of the passes of a mixture, forward and backward."""

    num_codes: int  # K, on all ranks
    budget: int  # bytes of the blocks
    temperature: float = 1.0
    sharper: float | None = None  # a second softmax is at temperature / sharper
    products: Products = "fp32"  # of all but the logits

    @property
    def scale(self) -> float:
        """Bits of a logit per score."""
        return BITS / self.temperature

    @property
    def sharp_scale(self) -> float:
        """The same at the second temperature."""
        assert self.sharper is not None
        return self.scale * self.sharper


@dataclass
class Softmax:
    """The state of an online softmax, per token, relative to the best score so far; in bits."""

    sum_B: Tensor  # sum_j 2^(l_j - top)
    excess_B: Tensor  # sum_j 2^(l_j - top) (l_j - top): with the sum it gives the entropy

    @staticmethod
    def empty(x_BD: Tensor) -> Softmax:
        return Softmax(x_BD.new_zeros(len(x_BD)), x_BD.new_zeros(len(x_BD)))

    def fall(self, tokens: slice, fall_b: Tensor) -> Tensor:
        """Make the state of `tokens` relative to a top that is -fall bits higher; returns the factor that it took."""
        # Differences of tops, not tops: where logits are large their rounding would be that of the result.
        fall_b = fall_b.clamp_min(-1e4)
        shrink_b = torch.exp2(fall_b)
        self.excess_B[tokens] = shrink_b * (self.excess_B[tokens] + fall_b * self.sum_B[tokens])
        self.sum_B[tokens] *= shrink_b
        return shrink_b


@dataclass
class Mixed:
    """What one rank knows after the pass, for all B tokens of the code group."""

    row_B: Tensor  # the best row
    score_B: Tensor  # and its score, x . key + bias
    soft: Softmax  # at T; the excess is not kept
    sum_BD: Tensor  # sum_j 2^(l_j - top) value_j, to be divided by the merged sum
    sharp: Softmax | None  # at T / sharper
    dense: list[tuple[slice, slice]] = field(default_factory=list)
    """blocks that the backward pass multiplies again; what is not in them is in `few` or below rounding"""
    few: Pairs | None = None
    """pairs of the other blocks, at T"""
    sharp_few: Pairs | None = None
    """all pairs that count at T / sharper; None where they are too many"""


def mix(x_BD: Tensor, keys: Keys, values_kD: Tensor, wanted: Wanted) -> Mixed:
    """One pass: best row, softmax state and mean row at T, entropy state at T / sharper."""
    sparse = x_BD.device.type == "cpu"
    out = _pass(x_BD, keys, values_kD, wanted, sparse)
    if out is None:  # too many pairs at the second temperature: its blocks are as dense as the first one's
        out = _pass(x_BD, keys, values_kD, wanted, sparse=False)
    assert out is not None
    return out


def _pass(x_BD: Tensor, keys: Keys, values_kD: Tensor, wanted: Wanted, sparse: bool) -> Mixed | None:
    num, scale, sharper = len(x_BD), wanted.scale, wanted.sharper
    low = pairs.depth(wanted.num_codes, x_BD.dtype) / scale
    out = Mixed(
        row_B=torch.zeros(num, dtype=torch.int64, device=x_BD.device),
        score_B=x_BD.new_full((num,), LOWEST),
        soft=Softmax.empty(x_BD),
        sum_BD=x_BD.new_zeros((num, values_kD.shape[1])),
        sharp=None if sharper is None else Softmax.empty(x_BD),
    )
    few, sharp_few = Collector(num), Collector(num)
    buffer, spare, low_p = scan.Buffer(), scan.Buffer(), scan.Buffer()
    for tokens, rows in scan.blocks_of(x_BD, len(keys.keys_kD), wanted.budget):
        s_br = scan.scores(x_BD[tokens], keys, rows, buffer)
        peak_bL = scan.line_peaks(s_br)
        top_b = out.score_B[tokens]
        before_b = top_b.clone()
        scan.raise_best(s_br, peak_bL, rows.start, top_b, out.row_B[tokens])
        fall_b = (before_b - top_b) * scale
        shrink_b = out.soft.fall(tokens, fall_b)
        out.sum_BD[tokens] *= shrink_b[:, None]
        if sharper is not None and sparse:
            found = pairs.find(s_br, peak_bL, top_b - low / sharper)
            if not sharp_few.add(found, tokens.start, rows.start):
                return None
        if sparse and _few(s_br, peak_bL, top_b - low, few, out, tokens, rows, values_kD, scale):
            continue
        out.dense.append((tokens, rows))
        # The best so far is the maximum so far: both softmaxes are kept relative to it.
        l_br = s_br.sub_(top_b[:, None]).mul_(scale)
        if sharper is not None and not sparse and out.sharp is not None:
            _sharpen(l_br, out.sharp, tokens, fall_b * sharper, sharper, spare)
        p_br = exp2_(l_br)
        out.soft.sum_B[tokens] += p_br.sum(1)
        p_br = operand(p_br, wanted.products, low_p)
        add_product(out.sum_BD[tokens], p_br, values_kD[rows], wanted.products)
    out.few = few.close(x_BD)
    if sharper is not None and sparse:
        out.sharp_few, out.sharp = _sharp_state(sharp_few.close(x_BD), out.score_B, scale * sharper, low / sharper)
    return out


def _few(
    s_br: Tensor,
    peak_bL: Tensor,
    floor_b: Tensor,
    few: Collector,
    out: Mixed,
    tokens: slice,
    rows: slice,
    values_kD: Tensor,
    scale: float,
) -> bool:
    """Do a block by its pairs, if they are few; False if it must be done densely."""
    if int((peak_bL < floor_b[:, None]).sum()) < (1.0 - SPARSE_LINES) * peak_bL.numel():
        return False
    found = pairs.find(s_br, peak_bL, floor_b)
    if len(found[0]) > SPARSE_PAIRS * s_br.numel() or not few.add(found, tokens.start, rows.start):
        return False
    here = Pairs(*found, num_tokens=len(s_br))
    p_P = torch.exp2((here.score_P - out.score_B[tokens][here.token_P]) * scale)
    out.soft.sum_B[tokens] += here.sums(p_P)
    out.sum_BD[tokens] += here.mean(p_P, values_kD[rows])
    return True


def _sharpen(l_br: Tensor, sharp: Softmax, tokens: slice, fall_b: Tensor, sharper: float, spare: scan.Buffer) -> None:
    """Add a dense block to the second softmax; `l_br` is relative to the top, and is left as it is."""
    sharp.fall(tokens, fall_b)
    q_br = torch.mul(l_br, sharper, out=spare.view(l_br, *l_br.shape))
    below_br = q_br.clone()
    exp2_(q_br)
    sharp.sum_B[tokens] += q_br.sum(1)
    sharp.excess_B[tokens] += q_br.mul_(below_br).sum(1)


def _sharp_state(found: Pairs, score_B: Tensor, scale: float, low: float) -> tuple[Pairs, Softmax]:
    """The pairs that still count below the last best score, and the second softmax, which is theirs alone."""
    found = found.take((found.score_P < score_B[found.token_P] - low).logical_not_())
    below_P = (found.score_P - score_B[found.token_P]) * scale
    q_P = torch.exp2(below_P)
    return found, Softmax(found.sums(q_P), found.sums(q_P * below_P))


def column_sums(x_BD: Tensor, keys: Keys, mixed: Mixed, score_B: Tensor, log_B: Tensor, wanted: Wanted) -> Tensor:
    """sum_n q_nj of the rows of this rank, q the softmax at T / sharper: log2 q = (score - best score) scale - log."""
    num_rows = len(keys.keys_kD)
    if mixed.sharp_few is not None:
        return mixed.sharp_few.columns(_probability(mixed.sharp_few, wanted.sharp_scale, score_B, log_B), num_rows)
    out_k, buffer = x_BD.new_zeros(num_rows), scan.Buffer()
    for tokens, rows in scan.blocks_of(x_BD, num_rows, wanted.budget):
        l_br = relative(x_BD, keys, tokens, rows, buffer, score_B, wanted.sharp_scale)
        out_k[rows] += exp2_(l_br.sub_(log_B[tokens, None])).sum(0)
    return out_k


def row_means(
    x_BD: Tensor, keys: Keys, mixed: Mixed, score_B: Tensor, log_B: Tensor, weight_k: Tensor, wanted: Wanted
) -> Tensor:
    """sum_j q_nj weight_j over the rows of this rank, with q as in `column_sums`: B numbers."""
    if mixed.sharp_few is not None:
        few = mixed.sharp_few
        return few.sums(_probability(few, wanted.sharp_scale, score_B, log_B) * weight_k[few.row_P])
    out_B, buffer = x_BD.new_zeros(len(x_BD)), scan.Buffer()
    for tokens, rows in scan.blocks_of(x_BD, len(weight_k), wanted.budget):
        l_br = relative(x_BD, keys, tokens, rows, buffer, score_B, wanted.sharp_scale)
        out_B[tokens] += exp2_(l_br.sub_(log_B[tokens, None])) @ weight_k[rows]
    return out_B


def relative(
    x_BD: Tensor, keys: Keys, tokens: slice, rows: slice, buffer: scan.Buffer, score_B: Tensor, scale: float
) -> Tensor:
    """scale * (score - best score) of a block, in the buffer."""
    return scan.scores(x_BD[tokens], keys, rows, buffer).sub_(score_B[tokens, None]).mul_(scale)


def _probability(found: Pairs, scale: float, score_B: Tensor, log_B: Tensor) -> Tensor:
    return torch.exp2((found.score_P - score_B[found.token_P]) * scale - log_B[found.token_P])
