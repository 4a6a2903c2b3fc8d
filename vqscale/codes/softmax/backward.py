"""The backward pass of forward.py: logits again, block by block, and all gradients of them summed before two products.

With u the scores before any temperature, p their softmax at the temperature T and q that at the entropy temperature E,
value_j = sg(row_j), and the gradients g of the mean row, the log-normaliser, the entropies H and the column sums given:

    du = p / T o (g_mean . value - shift)  +  q / E o (g_columns - mean of g_columns - g_H (log q + H))
    dx = du keys        dkeys = du^T x        dbias = sum_n du

README.md beside this file derives it. What of it is a number per token or per code is made once (`Slopes`), so that no
block is multiplied by it; a block of du is made here by torch, and by one fused kernel in gpu/passes.py; and what a
block gives is added up by two products of the library, in the order of the blocks, for both (`Gradients.add_block`).
Blocks that the forward pass did by pairs are done by the same pairs here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from vqscale.codes import scan
from vqscale.codes.products import Rounding, add_product, operand
from vqscale.codes.scan import Keys, exp2_
from vqscale.codes.softmax.forward import LocalMixture, Wanted, relative
from vqscale.codes.softmax.pairs import Pairs


@dataclass
class Upstream:
    """Gradients that arrive, for all B tokens, and what the ranks know together of the softmaxes."""

    score_B: Tensor  # the best score over all K
    log_B: Tensor  # log2 of the sum at the temperature, relative to the best
    g_mean_BD: Tensor | None = None  # gradient of the mean row
    shift_B: Tensor | None = None  # g_mean . mean - g_lse: what the softmax's centring subtracts
    g_entropy_B: Tensor | None = None  # gradient of the entropies
    entropy_B: Tensor | None = None  # the entropies, in nats
    g_columns_k: Tensor | None = None  # gradient of the column sums
    g_columns_mean_B: Tensor | None = None  # sum_j q_nj g_columns_j over all K
    entropy_log_B: Tensor | None = None  # as log_B, at the entropy temperature


@dataclass
class Slopes:
    """What is known of du before any score, with l the logit in bits below the best and log q in bits:

    du = 2^l (g . value - shift)  +  q (columns - level - bend log q),   log q = ratio l - entropy_log

    2^-log and 1 / T are in g and the shift, 1 / E is in the others. None where nothing arrives.
    """

    g_BD: Tensor | None
    shift_B: Tensor | None
    entropy_log_B: Tensor | None
    columns_k: Tensor | None
    level_B: Tensor | None
    bend_B: Tensor | None

    @classmethod
    def of(cls, up: Upstream, wanted: Wanted) -> Self:
        factor_B = torch.exp2(-up.log_B) / wanted.temperature
        out = cls(None, None, up.entropy_log_B, None, None, None)
        if up.g_mean_BD is not None:
            out.g_BD = up.g_mean_BD * factor_B[:, None]
        if up.shift_B is not None:
            out.shift_B = up.shift_B * factor_B
        if up.g_columns_k is not None and up.g_columns_mean_B is not None:
            out.columns_k, out.level_B = up.g_columns_k * wanted.sharpness, up.g_columns_mean_B * wanted.sharpness
        if up.g_entropy_B is not None and up.entropy_B is not None:
            g_B = up.g_entropy_B * wanted.sharpness
            out.bend_B = g_B * math.log(2.0)
            out.level_B = g_B * up.entropy_B if out.level_B is None else out.level_B + g_B * up.entropy_B
        return out

    @property
    def reaches_q(self) -> bool:
        """Whether anything arrives for the softmax at the entropy temperature."""
        return self.level_B is not None


@dataclass
class Gradients:
    x_BD: Tensor
    keys_kD: Tensor
    bias_k: Tensor | None

    @classmethod
    def zeros(cls, x_BD: Tensor, keys_kD: Tensor, bias_k: Tensor | None, dtype: torch.dtype | None = None) -> Gradients:
        """Of these, before a block; `dtype` is not that of what they are of."""
        bias_k = None if bias_k is None else torch.zeros_like(bias_k, dtype=dtype)
        return cls(torch.zeros_like(x_BD, dtype=dtype), torch.zeros_like(keys_kD, dtype=dtype), bias_k)

    def add_block(
        self,
        du_br: Tensor,
        x_BD: Tensor,
        keys_kD: Tensor,
        tokens: slice,
        rows: slice,
        products: Rounding,
        buffer: scan.Buffer | None = None,
    ) -> None:
        """Add what a block of du gives; x and the keys may be operands. The buffer is for du as an operand."""
        if self.bias_k is not None:
            self.bias_k[rows] += du_br.sum(0, dtype=self.bias_k.dtype)
        du_br = operand(du_br, products, buffer)
        add_product(self.x_BD[tokens], du_br, keys_kD[rows], products)
        add_product(self.keys_kD[rows], du_br.t(), x_BD[tokens], products)


def mix_backward(
    x_BD: Tensor, keys: Keys, values_kD: Tensor, mixed: LocalMixture, up: Upstream, wanted: Wanted
) -> Gradients:
    """Gradients of x (this rank's share over its rows), of the keys and of the bias."""
    out = Gradients.zeros(x_BD, keys.keys_kD, keys.bias_k)
    at = Slopes.of(up, wanted)
    in_blocks = at.reaches_q and mixed.entropy_pairs is None
    if at.shift_B is not None or in_blocks:
        spare, buffer, wide = scan.Buffer(), scan.Buffer(), scan.Buffer()
        low_x_BD = operand(x_BD, wanted.products)
        at.g_BD = None if at.g_BD is None else operand(at.g_BD, wanted.products)
        for tokens, rows in mixed.dense:
            l_br = relative(x_BD, keys, tokens, rows, buffer, up.score_B, wanted.scale)
            dq_br = _entropy_block(l_br, at, tokens, rows, wanted) if in_blocks else None
            du_br = _soft_block(l_br, at, operand(values_kD[rows], wanted.products), tokens, spare, wide)
            du_br = dq_br if du_br is None else du_br if dq_br is None else du_br.add_(dq_br)
            assert du_br is not None
            out.add_block(du_br, low_x_BD, keys.keys_kD, tokens, rows, wanted.products, spare)
        if at.shift_B is not None and mixed.pairs is not None:
            few = mixed.pairs
            p_P = torch.exp2((few.score_P - up.score_B[few.token_P]) * wanted.scale)
            u_P = 0.0 if at.g_BD is None else few.dot(at.g_BD.to(values_kD.dtype), values_kD)
            _add_pairs(out, x_BD, keys, few, p_P * (u_P - at.shift_B[few.token_P]))
    if at.reaches_q and mixed.entropy_pairs is not None:
        few = mixed.entropy_pairs
        below_P = (few.score_P - up.score_B[few.token_P]) * wanted.entropy_scale
        _add_pairs(out, x_BD, keys, few, _entropy_pairs(below_P, few, at))
    return out


def _add_pairs(out: Gradients, x_BD: Tensor, keys: Keys, at: Pairs, du_P: Tensor) -> None:
    if not len(at):  # always so on a GPU, where the rest would wait for the device
        return
    out.x_BD += at.mean(du_P, keys.keys_kD)
    at.add_outer(du_P, x_BD, out.keys_kD)
    if out.bias_k is not None:
        out.bias_k += at.columns(du_P, len(out.bias_k))


def _soft_block(
    l_br: Tensor, at: Slopes, values_rD: Tensor, tokens: slice, spare: scan.Buffer, wide: scan.Buffer
) -> Tensor | None:
    """2^l (g . value - shift), which takes the place of the logits; None without a shift."""
    if at.shift_B is None:
        return None
    p_br = exp2_(l_br)
    if at.g_BD is None:
        return p_br.mul_(-at.shift_B[tokens, None])
    u_br = torch.mm(at.g_BD[tokens], values_rD.t(), out=spare.view(at.g_BD, *l_br.shape))
    if u_br.dtype != p_br.dtype:
        u_br = wide.view(p_br, *p_br.shape).copy_(u_br)  # arithmetic on two types would do so in fresh memory
    return p_br.mul_(u_br.sub_(at.shift_B[tokens, None]))


def _entropy_block(l_br: Tensor, at: Slopes, tokens: slice, rows: slice, wanted: Wanted) -> Tensor:
    """q (columns - level - bend log q) of a dense block; the logits stay as they are."""
    assert at.entropy_log_B is not None
    assert at.level_B is not None
    assert wanted.ratio is not None
    logq_br = l_br * wanted.ratio - at.entropy_log_B[tokens, None]
    q_br = exp2_(logq_br.clone())
    dq_br = logq_br.zero_() if at.bend_B is None else logq_br.mul_(-at.bend_B[tokens, None])
    dq_br -= at.level_B[tokens, None]
    if at.columns_k is not None:
        dq_br += at.columns_k[rows]
    return dq_br.mul_(q_br)


def _entropy_pairs(below_P: Tensor, few: Pairs, at: Slopes) -> Tensor:
    """The same for pairs, so many bits below the best at the entropy temperature."""
    assert at.entropy_log_B is not None
    assert at.level_B is not None
    logq_P = below_P - at.entropy_log_B[few.token_P]
    dq_P = -at.level_B[few.token_P]
    if at.bend_B is not None:
        dq_P -= at.bend_B[few.token_P] * logq_P
    if at.columns_k is not None:
        dq_P += at.columns_k[few.row_P]
    return dq_P * torch.exp2(logq_P)
