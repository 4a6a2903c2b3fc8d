"""The mixture of all codes that tokens see, with its own backward pass, because autograd would keep tokens x K.

`mix` is what Codebook.mix does: gather the tokens of the code group, one pass over this rank's rows (forward.py),
merge, give everybody the results of its own tokens. Kept for the backward pass are the gathered tokens, a few numbers
per token, and the lists of pairs, whose length is bounded by the tokens; logits are computed again (backward.py). The
gradient of the chosen rows and that through the logits are added up in one tensor of the size of the rows.

Bytes that a rank sends per token of its own on a code axis of M ranks, in float32, M - 1 times each:

    forward    x 4 D; best score and id 24, softmax state 16, another 16 with entropies; mean and chosen row back 8 D
    backward   their gradients 8 D and a shift 4; with entropies their gradient 4, mean of the columns' 8; of x back 4 D

K is not in it. request/traffic.py lists the collectives of a whole step, and a test holds them to the bytes counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqscale.codes import backend
from vqscale.codes.merge import full_precision, merge_best, merge_softmax, own, refuse_second_order
from vqscale.codes.rows import Rows
from vqscale.codes.scan import BITS, Keys
from vqscale.codes.similarity import Similarity
from vqscale.codes.softmax.backward import Gradients, Upstream
from vqscale.codes.softmax.forward import Wanted
from vqscale.parallel import ops
from vqscale.parallel.clock import clock
from vqscale.parallel.mesh import Axis


@dataclass
class Mixture:
    """What `mix` returns for the tokens of this rank; `columns_k` is for its rows, over the tokens of the group."""

    ids_N: Tensor
    score_N: Tensor  # the best logit
    lse_N: Tensor  # log of the sum of exp over all K logits
    mean_ND: Tensor  # softmax(l) times the rows, the rows as values detached
    code_ND: Tensor  # the rows of ids_N, with their gradient
    entropy_N: Tensor | None  # of softmax at the entropy temperature
    columns_k: Tensor | None  # sum over the tokens of the code group of the same softmax

    @property
    def saturation_N(self) -> Tensor:
        """The largest probability of each token."""
        return torch.exp(self.score_N - self.lse_N).detach()


@dataclass(frozen=True)
class Request:
    """What `mix` is asked for, and of which rows."""

    layout: Rows
    axis: Axis
    wanted: Wanted
    similarity: Similarity


def mix(x_ND: Tensor, rows_kD: Tensor, request: Request) -> Mixture:
    """The mixture of the tokens of this rank."""
    keys_kD = request.similarity.keys(rows_kD)
    # None where the keys are the rows: both gradients then share a tensor.
    out = _Mix.apply(request.similarity.queries(x_ND), rows_kD, None if keys_kD is rows_kD else keys_kD, request)
    return Mixture(*out, *([None, None] if request.wanted.ratio is None else []))


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, rows_kD: Tensor, keys_kD: Tensor | None, request: Request
    ) -> tuple[Tensor, ...]:
        axis, layout, wanted = request.axis, request.layout, request.wanted
        keys = _keys(rows_kD, keys_kD, request)
        x_BD = ops.gather(x_ND, axis)
        passes = backend.pick(x_BD, wanted.products)
        mixed = passes.mix(x_BD, keys, rows_kD, wanted)
        ids_B, score_B = merge_best(mixed.score_B, mixed.row_B, layout, axis)
        delta_B = (mixed.score_B - score_B) * wanted.scale
        log_B, _, share_B = merge_softmax(mixed.soft, delta_B, axis)
        code_BD = layout.take(rows_kD, ids_B)
        # One collective brings the mean rows and the chosen rows to the ranks of their tokens.
        mean_ND, code_ND = _reduce_scatter_tokens([mixed.sum_BD * share_B[:, None], code_BD], axis)
        own_ids_N, own_score_N, own_log_N = (
            own(part_B, axis) for part_B in (ids_B, score_B / wanted.temperature, log_B / BITS)
        )
        outputs = [own_ids_N.clone(), own_score_N.clone(), own_score_N + own_log_N, mean_ND, code_ND]
        entropy_log_B = entropy_B = None
        if mixed.entropy_soft is not None and wanted.ratio is not None:
            entropy_log_B, bits_B, _ = merge_softmax(mixed.entropy_soft, delta_B * wanted.ratio, axis)
            entropy_B = bits_B / BITS
            columns_k = passes.column_sums(x_BD, keys, mixed, score_B, entropy_log_B, wanted)
            outputs += [own(entropy_B, axis).clone(), columns_k]
        ctx.mark_non_differentiable(outputs[0], outputs[1])
        ctx.set_materialize_grads(False)
        # What the lists hold are numbers without gradient; the tensors of autograd go through save_for_backward.
        ctx.request, ctx.mixed, ctx.passes = request, mixed, passes
        mixed.sum_BD = x_BD.new_empty(0)
        ctx.save_for_backward(x_BD, rows_kD, keys_kD, ids_B, score_B, mean_ND, log_B, entropy_log_B, entropy_B)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_order("Codebook.mix")
        saved = ctx.saved_tensors  # once: checkpointing computes them again for whoever asks
        # A backward pass runs under the autocast of whoever calls it.
        with clock.span("codes"), full_precision(saved[0]):
            return _backward(ctx, saved, *grads[2:])


def _backward(
    ctx: Any,
    saved: tuple[Any, ...],
    g_lse_N: Tensor | None,
    g_mean_ND: Tensor | None,
    g_code_ND: Tensor | None,
    g_entropy_N: Tensor | None = None,
    g_columns_k: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, rows and keys. Which gradients are absent is the same on all ranks: the losses are."""
    x_BD, rows_kD, keys_kD, ids_B, score_B, mean_ND, log_B, entropy_log_B, entropy_B = saved
    request, mixed, keys = ctx.request, ctx.mixed, _keys(rows_kD, keys_kD, ctx.request)
    shift_N = None
    if g_mean_ND is not None:
        shift_N = (g_mean_ND * mean_ND).sum(1)
    if g_lse_N is not None:
        shift_N = -g_lse_N if shift_N is None else shift_N - g_lse_N
    given = [g_mean_ND, g_code_ND, shift_N, g_entropy_N]
    g_mean_BD, g_code_BD, shift_B, g_entropy_B = _gather_tokens(given, request.axis)
    g_columns_mean_B = None
    if g_columns_k is not None:
        part_B = ctx.passes.row_means(x_BD, keys, mixed, score_B, entropy_log_B, g_columns_k, request.wanted)
        g_columns_mean_B = ops.sum_over(part_B, request.axis)
    up = Upstream(
        score_B, log_B, g_mean_BD, shift_B, g_entropy_B, entropy_B, g_columns_k, g_columns_mean_B, entropy_log_B
    )
    out = ctx.passes.mix_backward(x_BD, keys, rows_kD, mixed, up, request.wanted)
    dx_ND = ops.scatter_sum(out.x_BD, request.axis)
    drows_kD, dkeys_kD = _rows_gradient(out, rows_kD, keys_kD, request.similarity)
    if g_code_BD is not None:
        drows_kD = torch.zeros_like(rows_kD) if drows_kD is None else drows_kD
        request.layout.add_(drows_kD, ids_B, g_code_BD)
    return dx_ND, drows_kD, dkeys_kD, None


def _rows_gradient(
    out: Gradients, rows_kD: Tensor, keys_kD: Tensor | None, similarity: Similarity
) -> tuple[Tensor | None, Tensor | None]:
    """(gradient of the rows, of the keys) through the logits; in the memory of one of them where it can be."""
    if out.bias_k is None:
        return (out.keys_kD, None) if keys_kD is None else (None, out.keys_kD)
    drows_kD = out.keys_kD if keys_kD is None else torch.zeros_like(rows_kD)
    similarity.add_bias_gradient(drows_kD, rows_kD, out.bias_k)
    return drows_kD, None if keys_kD is None else out.keys_kD


def _keys(rows_kD: Tensor, keys_kD: Tensor | None, request: Request) -> Keys:
    return Keys(rows_kD if keys_kD is None else keys_kD, request.similarity.bias(rows_kD))


def _reduce_scatter_tokens(parts: list[Tensor], axis: Axis) -> list[Tensor]:
    """Sum over the ranks and keep this rank's tokens, of several tensors in one collective."""
    if axis.size == 1:
        return parts
    widths = [part.shape[1] for part in parts]
    return [part.contiguous() for part in ops.scatter_sum(torch.cat(parts, 1), axis).split(widths, 1)]


def _gather_tokens(parts: list[Tensor | None], axis: Axis) -> list[Tensor | None]:
    """Gather several tensors over the tokens, any of them absent, in one collective."""
    given = [part if part.ndim == 2 else part[:, None] for part in parts if part is not None]
    if axis.size == 1 or not given:
        return parts
    widths = [part.shape[1] for part in given]
    found = iter(ops.gather(torch.cat(given, 1), axis).split(widths, 1))
    wholes = [None if part is None else (part.ndim, next(found).contiguous()) for part in parts]
    return [None if whole is None else whole[1] if whole[0] == 2 else whole[1][:, 0] for whole in wholes]
