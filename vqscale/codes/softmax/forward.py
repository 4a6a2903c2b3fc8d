"""The softmax of tokens over this rank's rows, in one blockwise pass. Local arithmetic; autograd.py merges the ranks.

Logits are in bits, l_nj = (x_n . key_j + bias_j) / (T ln 2), so that probabilities are powers of two: exp2 is three
times as fast as exp on a CPU. Between blocks stands the state of an online softmax: the maximum, the sum, the mean row.
The best row is that of the scores themselves, before any factor: equal scores stay equal. Products of 2 B k D
operations, with B tokens of the whole code group, k rows of this rank, D dimensions:

    mix             2   logits, mean row             (+1, and +1 in the backward pass, where the entropy temperature
    mix_backward    4   logits, values, x, keys          is not served by pairs)

With `products` bf16 the four that are not logits are rounded: mean rows to 2^-8 and gradients to 2^-6 of their norms,
while ids, normalisers and entropies keep every bit.

What goes below that, on a CPU, and how much is lost by it (pairs.py: the share 2^-24 of a softmax at most):

* an entropy temperature below the temperature has few pairs (token, row) that are not below rounding. They are found
  in the one pass, by the maxima of lines of logits, and all that follows costs pairs, not tokens x codes;
* a block in which the temperature has few such pairs is not multiplied again: not for the mean row, and not in
  the backward pass. A block with none is skipped.

Where the lists would be long, the blocks are dense: the memory of a list is bounded by the tokens alone. An entropy
temperature that is not below the temperature begins no list. The derivation is in README.md beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vqscale.codes import scan
from vqscale.codes.products import Rounding, add_product, operand
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
    entropy_temperature: float | None = None  # of a second softmax, whose entropies and column sums are asked for
    products: Rounding = "fp32"  # of all but the logits

    @property
    def scale(self) -> float:
        """Bits of a logit per score."""
        return BITS / self.temperature

    @property
    def ratio(self) -> float | None:
        """Bits at the entropy temperature per bit at the temperature: above 1 if the entropies' softmax is sharper."""
        return None if self.entropy_temperature is None else self.temperature / self.entropy_temperature

    @property
    def entropy_scale(self) -> float:
        """`scale` at the entropy temperature."""
        assert self.ratio is not None
        return self.scale * self.ratio

    @property
    def sharpness(self) -> float:
        """1 / the entropy temperature."""
        return self.entropy_scale / BITS


@dataclass
class Softmax:
    """The state of an online softmax, per token, relative to the best score so far; in bits."""

    sum_B: Tensor  # sum_j 2^(l_j - top)
    excess_B: Tensor  # sum_j 2^(l_j - top) (l_j - top): with the sum it gives the entropy

    @staticmethod
    def empty(x_BD: Tensor) -> Softmax:
        return Softmax(x_BD.new_zeros(len(x_BD)), x_BD.new_zeros(len(x_BD)))

    def rescale(self, tokens: slice, delta_b: Tensor) -> Tensor:
        """Make the state of `tokens` relative to a new top; returns the factor 2^delta that sums were multiplied by.

        `delta_b` is the old top minus the new one, in bits: negative where the top has risen, else 0.
        """
        # Differences of tops, not tops: where logits are large their rounding would be that of the result.
        delta_b = delta_b.clamp_min(-1e4)
        shrink_b = torch.exp2(delta_b)
        self.excess_B[tokens] = shrink_b * (self.excess_B[tokens] + delta_b * self.sum_B[tokens])
        self.sum_B[tokens] *= shrink_b
        return shrink_b


@dataclass
class LocalMixture:
    """What one rank knows of a mixture after the pass, for all B tokens of the code group."""

    row_B: Tensor  # the best row
    score_B: Tensor  # and its score, x . key + bias
    soft: Softmax  # at the temperature; the excess is not kept
    sum_BD: Tensor  # sum_j 2^(l_j - top) value_j, to be divided by the merged sum
    entropy_soft: Softmax | None  # at the entropy temperature
    dense: list[tuple[slice, slice]] = field(default_factory=list)
    """blocks that the backward pass multiplies again; what is not in them is in `pairs` or below rounding"""
    pairs: Pairs | None = None
    """pairs of the other blocks, at the temperature"""
    entropy_pairs: Pairs | None = None
    """all pairs that count at the entropy temperature; None where they are too many"""


def mix(x_BD: Tensor, keys: Keys, values_kD: Tensor, wanted: Wanted) -> LocalMixture:
    """One pass: best row, softmax state and mean row at the temperature, state at the entropy temperature."""
    # Where the entropies' softmax is not the sharper one, its list would overflow and the pass begin again.
    sparse = x_BD.device.type == "cpu" and (wanted.ratio is None or wanted.ratio > 1.0)
    out = _pass(x_BD, keys, values_kD, wanted, sparse)
    if out is None:  # too many pairs at the entropy temperature: its blocks are as dense as the first one's
        out = _pass(x_BD, keys, values_kD, wanted, sparse=False)
    assert out is not None
    return out


def _pass(x_BD: Tensor, keys: Keys, values_kD: Tensor, wanted: Wanted, sparse: bool) -> LocalMixture | None:
    """The pass over all blocks; None, and nothing is kept, where the list of the entropies' pairs has no room.

    A block is b tokens x r rows, cut into lines of 64 rows; a pair is one of its entries. For the tokens of a block:

    * before (1) all of `out` is relative to score_B, the best score of the rows before this block;
    * after (1) score_B and row_B know this block: they are changed through views, `top_b` is a part of score_B;
    * after (2) the sum and the mean row are relative to the new top, and do not know this block yet;
    * after (3) or (4) they know it. Where there are lists of pairs, the softmax of the entropies is made of its list
      in the end; where there are none, every block comes to (4), which rescales it and adds the block.

    No pair ever adds more than 1 to a sum, because no score is above the top.
    """
    num, scale, ratio = len(x_BD), wanted.scale, wanted.ratio
    low = pairs.depth(wanted.num_codes, x_BD.dtype) / scale
    out = LocalMixture(
        row_B=torch.zeros(num, dtype=torch.int64, device=x_BD.device),
        score_B=x_BD.new_full((num,), LOWEST),
        soft=Softmax.empty(x_BD),
        sum_BD=x_BD.new_zeros((num, values_kD.shape[1])),
        entropy_soft=None if ratio is None else Softmax.empty(x_BD),
    )
    kept, entropy_kept = Collector(num), Collector(num)
    buffer, spare, low_p = scan.Buffer(), scan.Buffer(), scan.Buffer()
    for tokens, rows in scan.blocks_of(x_BD, len(keys.keys_kD), wanted.budget):
        s_br = scan.scores(x_BD[tokens], keys, rows, buffer)
        peak_bL = scan.line_peaks(s_br)
        top_b = out.score_B[tokens]
        before_b = top_b.clone()
        scan.update_best(s_br, peak_bL, rows.start, top_b, out.row_B[tokens])  # (1)
        delta_b = (before_b - top_b) * scale
        shrink_b = out.soft.rescale(tokens, delta_b)  # (2)
        out.sum_BD[tokens] *= shrink_b[:, None]
        if ratio is not None and sparse:
            found = pairs.find(s_br, peak_bL, top_b - low / ratio)
            if not entropy_kept.add(found, tokens.start, rows.start):
                return None
        if sparse and _by_pairs(s_br, peak_bL, top_b - low, kept, out, tokens, rows, values_kD, scale):  # (3)
            continue
        out.dense.append((tokens, rows))  # (4)
        l_br = s_br.sub_(top_b[:, None]).mul_(scale)
        if ratio is not None and not sparse and out.entropy_soft is not None:
            _add_entropy_block(l_br, out.entropy_soft, tokens, delta_b * ratio, ratio, spare)
        p_br = exp2_(l_br)
        out.soft.sum_B[tokens] += p_br.sum(1)
        p_br = operand(p_br, wanted.products, low_p)
        add_product(out.sum_BD[tokens], p_br, values_kD[rows], wanted.products)
    out.pairs = kept.close(x_BD)
    if ratio is not None and sparse:
        every = entropy_kept.close(x_BD)
        out.entropy_pairs, out.entropy_soft = _entropy_state(every, out.score_B, scale * ratio, low / ratio)
    return out


def _by_pairs(
    s_br: Tensor,
    peak_bL: Tensor,
    floor_b: Tensor,
    kept: Collector,
    out: LocalMixture,
    tokens: slice,
    rows: slice,
    values_kD: Tensor,
    scale: float,
) -> bool:
    """Do a block by its pairs, if they are few; False if it must be done densely."""
    if int((peak_bL < floor_b[:, None]).sum()) < (1.0 - SPARSE_LINES) * peak_bL.numel():
        return False
    found = pairs.find(s_br, peak_bL, floor_b)
    if len(found[0]) > SPARSE_PAIRS * s_br.numel() or not kept.add(found, tokens.start, rows.start):
        return False
    here = Pairs(*found, num_tokens=len(s_br))
    p_P = torch.exp2((here.score_P - out.score_B[tokens][here.token_P]) * scale)
    out.soft.sum_B[tokens] += here.sums(p_P)
    out.sum_BD[tokens] += here.mean(p_P, values_kD[rows])
    return True


def _add_entropy_block(
    l_br: Tensor, soft: Softmax, tokens: slice, delta_b: Tensor, ratio: float, spare: scan.Buffer
) -> None:
    """Rescale the softmax of the entropies and add a dense block; `l_br` is relative to the top, and stays as it is."""
    soft.rescale(tokens, delta_b)
    q_br = torch.mul(l_br, ratio, out=spare.view(l_br, *l_br.shape))
    below_br = q_br.clone()
    exp2_(q_br)
    soft.sum_B[tokens] += q_br.sum(1)
    soft.excess_B[tokens] += q_br.mul_(below_br).sum(1)


def _entropy_state(found: Pairs, score_B: Tensor, scale: float, low: float) -> tuple[Pairs, Softmax]:
    """The pairs that still count below the last best score, and the softmax of the entropies, which is theirs alone."""
    found = found.take((found.score_P < score_B[found.token_P] - low).logical_not_())
    below_P = (found.score_P - score_B[found.token_P]) * scale
    q_P = torch.exp2(below_P)
    return found, Softmax(found.sums(q_P), found.sums(q_P * below_P))


def column_sums(
    x_BD: Tensor, keys: Keys, mixed: LocalMixture, score_B: Tensor, log_B: Tensor, wanted: Wanted
) -> Tensor:
    """sum_n q_nj of the rows of this rank, at the entropy temperature: log2 q = (score - best score) scale - log."""
    num_rows = len(keys.keys_kD)
    if mixed.entropy_pairs is not None:
        few = mixed.entropy_pairs
        return few.columns(_probability(few, wanted.entropy_scale, score_B, log_B), num_rows)
    out_k, buffer = x_BD.new_zeros(num_rows), scan.Buffer()
    for tokens, rows in scan.blocks_of(x_BD, num_rows, wanted.budget):
        l_br = relative(x_BD, keys, tokens, rows, buffer, score_B, wanted.entropy_scale)
        out_k[rows] += exp2_(l_br.sub_(log_B[tokens, None])).sum(0)
    return out_k


def row_means(
    x_BD: Tensor, keys: Keys, mixed: LocalMixture, score_B: Tensor, log_B: Tensor, weight_k: Tensor, wanted: Wanted
) -> Tensor:
    """sum_j q_nj weight_j over the rows of this rank, with q as in `column_sums`: B numbers."""
    if mixed.entropy_pairs is not None:
        few = mixed.entropy_pairs
        return few.sums(_probability(few, wanted.entropy_scale, score_B, log_B) * weight_k[few.row_P])
    out_B, buffer = x_BD.new_zeros(len(x_BD)), scan.Buffer()
    for tokens, rows in scan.blocks_of(x_BD, len(weight_k), wanted.budget):
        l_br = relative(x_BD, keys, tokens, rows, buffer, score_B, wanted.entropy_scale)
        out_B[tokens] += exp2_(l_br.sub_(log_B[tokens, None])) @ weight_k[rows]
    return out_B


def relative(
    x_BD: Tensor, keys: Keys, tokens: slice, rows: slice, buffer: scan.Buffer, score_B: Tensor, scale: float
) -> Tensor:
    """scale * (score - best score) of a block, in the buffer."""
    return scan.scores(x_BD[tokens], keys, rows, buffer).sub_(score_B[tokens, None]).mul_(scale)


def _probability(found: Pairs, scale: float, score_B: Tensor, log_B: Tensor) -> Tensor:
    return torch.exp2((found.score_P - score_B[found.token_P]) * scale - log_B[found.token_P])
