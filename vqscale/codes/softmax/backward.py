"""The backward pass of forward.py: logits again, block by block, and all gradients of them summed before two products.

With u the scores before any temperature, p their softmax at the temperature T and q that at the entropy temperature E,
value_j = sg(row_j), and the gradients g of the mean row, the log-normaliser, the entropies H and the column sums given:

    du = p / T o (g_mean . value - shift)  +  q / E o (g_columns - mean of g_columns - g_H (log q + H))
    dx = du keys        dkeys = du^T x        dbias = sum_n du

p is 2^(l - log) with l relative to the best score: 2^-log and 1 / T go into g_mean and the shift, which are numbers of
tokens, so that no block is multiplied by them. README.md beside this file derives it. Blocks that the forward pass did
by pairs are done by the same pairs here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vqscale.codes import scan
from vqscale.codes.products import add_product, operand
from vqscale.codes.scan import BITS, Keys, exp2_
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

    @property
    def reaches_q(self) -> bool:
        """Whether anything arrives for the softmax at the entropy temperature."""
        return self.g_entropy_B is not None or self.g_columns_k is not None


@dataclass
class Gradients:
    x_BD: Tensor
    keys_kD: Tensor
    bias_k: Tensor | None


def mix_backward(
    x_BD: Tensor, keys: Keys, values_kD: Tensor, mixed: LocalMixture, up: Upstream, wanted: Wanted
) -> Gradients:
    """Gradients of x (this rank's share over its rows), of the keys and of the bias."""
    out = Gradients(
        torch.zeros_like(x_BD),
        torch.zeros_like(keys.keys_kD),
        None if keys.bias_k is None else torch.zeros_like(keys.bias_k),
    )
    in_blocks = up.reaches_q and mixed.entropy_pairs is None
    factor_B = torch.exp2(-up.log_B) / wanted.temperature
    g_BD = None if up.g_mean_BD is None else up.g_mean_BD * factor_B[:, None]
    shift_B = None if up.shift_B is None else up.shift_B * factor_B
    if shift_B is not None or in_blocks:
        spare, buffer, wide = scan.Buffer(), scan.Buffer(), scan.Buffer()
        low_x_BD = operand(x_BD, wanted.products)
        g_BD = None if g_BD is None else operand(g_BD, wanted.products)
        for tokens, rows in mixed.dense:
            l_br = relative(x_BD, keys, tokens, rows, buffer, up.score_B, wanted.scale)
            dq_br = _entropy_block(l_br, up, tokens, rows, wanted) if in_blocks else None
            dl_br = _soft_block(l_br, g_BD, shift_B, operand(values_kD[rows], wanted.products), tokens, spare, wide)
            dl_br = dq_br if dl_br is None else dl_br if dq_br is None else dl_br.add_(dq_br)
            assert dl_br is not None
            if out.bias_k is not None:
                out.bias_k[rows] += dl_br.sum(0)
            dl_br = operand(dl_br, wanted.products, spare)
            add_product(out.x_BD[tokens], dl_br, keys.keys_kD[rows], wanted.products)
            add_product(out.keys_kD[rows], dl_br.t(), low_x_BD[tokens], wanted.products)
        if shift_B is not None and mixed.pairs is not None:
            few = mixed.pairs
            p_P = torch.exp2((few.score_P - up.score_B[few.token_P]) * wanted.scale)
            u_P = 0.0 if g_BD is None else few.dot(g_BD.to(values_kD.dtype), values_kD)
            _add_pairs(out, x_BD, keys, few, p_P * (u_P - shift_B[few.token_P]))
    if up.reaches_q and mixed.entropy_pairs is not None:
        _add_pairs(out, x_BD, keys, mixed.entropy_pairs, _entropy_pairs(mixed.entropy_pairs, up, wanted))
    return out


def _add_pairs(out: Gradients, x_BD: Tensor, keys: Keys, at: Pairs, dl_P: Tensor) -> None:
    if not len(at):  # always so on a GPU, where the rest would wait for the device
        return
    out.x_BD += at.mean(dl_P, keys.keys_kD)
    at.add_outer(dl_P, x_BD, out.keys_kD)
    if out.bias_k is not None:
        out.bias_k += at.columns(dl_P, len(out.bias_k))


def _soft_block(
    l_br: Tensor,
    g_BD: Tensor | None,
    shift_B: Tensor | None,
    values_rD: Tensor,
    tokens: slice,
    spare: scan.Buffer,
    wide: scan.Buffer,
) -> Tensor | None:
    """p o (g . value - shift), which takes the place of the logits; None without a shift.

    g and the shift have the normaliser of p in them.
    """
    if shift_B is None:
        return None
    p_br = exp2_(l_br)
    if g_BD is None:
        return p_br.mul_(-shift_B[tokens, None])
    u_br = torch.mm(g_BD[tokens], values_rD.t(), out=spare.view(g_BD, *l_br.shape))
    if u_br.dtype != p_br.dtype:
        u_br = wide.view(p_br, *p_br.shape).copy_(u_br)  # arithmetic on two types would do so in fresh memory
    return p_br.mul_(u_br.sub_(shift_B[tokens, None]))


def _entropy_block(l_br: Tensor, up: Upstream, tokens: slice, rows: slice, wanted: Wanted) -> Tensor:
    """q / E o (g_columns - their mean - g_H (log q + H)) of a dense block; the logits stay as they are."""
    assert up.entropy_log_B is not None
    assert wanted.ratio is not None
    logq_br = l_br * wanted.ratio - up.entropy_log_B[tokens, None]
    q_br = exp2_(logq_br.clone())
    if up.g_entropy_B is None:
        dq_br = logq_br.zero_()
    else:
        assert up.entropy_B is not None
        dq_br = logq_br.mul_(math.log(2.0)).add_(up.entropy_B[tokens, None]).mul_(-up.g_entropy_B[tokens, None])
    if up.g_columns_k is not None:
        assert up.g_columns_mean_B is not None
        dq_br += up.g_columns_k[rows]
        dq_br -= up.g_columns_mean_B[tokens, None]
    return dq_br.mul_(q_br).mul_(wanted.entropy_scale / BITS)


def _entropy_pairs(at: Pairs, up: Upstream, wanted: Wanted) -> Tensor:
    """The same for pairs."""
    assert up.entropy_log_B is not None
    below_P = (at.score_P - up.score_B[at.token_P]) * wanted.entropy_scale
    logq_P = below_P - up.entropy_log_B[at.token_P]
    dq_P = torch.zeros_like(logq_P)
    if up.g_entropy_B is not None:
        assert up.entropy_B is not None
        nats_P = logq_P * math.log(2.0) + up.entropy_B[at.token_P]
        dq_P -= up.g_entropy_B[at.token_P] * nats_P
    if up.g_columns_k is not None:
        assert up.g_columns_mean_B is not None
        dq_P += up.g_columns_k[at.row_P] - up.g_columns_mean_B[at.token_P]
    return dq_P * torch.exp2(logq_P) * (wanted.entropy_scale / BITS)
