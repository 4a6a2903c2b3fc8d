"""The fused kernels as torch operators: they prepare operands, launch, and merge the parts of programs.

Each is a torch.library operator, so that torch.compile takes it as one node; what tokens and codes mean is in
passes.py. Nothing here reads a number back from the device. A rank without rows launches nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from vqscale.codes import scan
from vqscale.codes.gpu import kernels, kernels_backward, tiles
from vqscale.codes.gpu.launch import Launch, Operands, on_device_of
from vqscale.codes.gpu.tiles import RESCORE_DIM, RESCORE_TOKENS
from vqscale.codes.scan import LOWEST
from vqscale.codes.softmax.backward import Gradients


@custom_op("vqscale::best", mutates_args=())
def best(x_BD: Tensor, keys_kD: Tensor, bias_k: Tensor | None, products: str) -> tuple[Tensor, Tensor]:
    if not len(x_BD) or not len(keys_kD):
        return _nobody(x_BD)
    given = Operands.of(x_BD, keys_kD, bias_k, products)
    launch = Launch("peaks", given)
    num_chunks = -(-given.rows // launch.codes)
    peak = given.x.new_empty((given.num, num_chunks), dtype=torch.float32)
    with on_device_of(x_BD):
        kernels.peaks_kernel[launch.grid](
            *given.scores, peak, given.num, given.rows, given.dim, num_chunks, launch.per_part,
            **launch.options,
        )  # fmt: skip
        return _rescore(x_BD.contiguous(), keys_kD.contiguous(), peak, given, launch.codes)


best.register_fake(lambda x_BD, *_: _nobody(x_BD))


def _nobody(x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """(score, row) of no rows at all."""
    score_B = torch.full((len(x_BD),), LOWEST, dtype=torch.float64, device=x_BD.device)
    return score_B, torch.zeros(len(x_BD), dtype=torch.int64, device=x_BD.device)


def _rescore(x_BD: Tensor, keys_kD: Tensor, peak: Tensor, given: Operands, chunk: int) -> tuple[Tensor, Tensor]:
    """The arg max of the float64 scores from the peaks of chunks, whose errors are bounded as passes.py says."""
    num_chunks = peak.shape[1]
    # Additions in any order; a tensor core cuts off where others round, and of float8 keeps fewer bits.
    rounding = (given.dim + 8) * (2.0**-13 if given.scaled else 2.0**-21)
    low_BD = given.score_x.float()
    if given.scaled:
        low_BD *= given.unit[1]
    right_B = _norm(low_BD)
    left_B = _norm(x_BD.float() - low_BD) + rounding * right_B
    right_B *= 1.0 + rounding
    width_c3 = peak.new_empty((num_chunks, 3))
    kernels.widths_kernel[(num_chunks,)](
        keys_kD, given.score_c, given.bias, given.unit, width_c3, given.rows, given.dim, rounding,
        HAS_BIAS=given.has_bias, SCALED=given.scaled, CHUNK=chunk, BLOCK_D=RESCORE_DIM, num_warps=4,
    )  # fmt: skip
    error = left_B[:, None] * width_c3[:, 0]
    error.addcmul_(right_B[:, None], width_c3[:, 1].expand_as(error)).add_(width_c3[:, 2])
    floor_B = torch.sub(peak, error, out=error).amax(1)
    count = -(-given.num // RESCORE_TOKENS)
    parts, per_part = tiles.parts(count, num_chunks, 1, 8 * tiles.programs(peak.device))
    score = peak.new_empty((parts, given.num), dtype=torch.float64)
    row = peak.new_empty((parts, given.num), dtype=torch.int32)
    kernels.rescore_kernel[(count, parts)](
        x_BD, keys_kD, given.bias, peak, floor_B, left_B, right_B, width_c3, score, row,
        given.num, given.rows, given.dim, num_chunks, per_part,
        HAS_BIAS=given.has_bias, BLOCK_N=RESCORE_TOKENS, CHUNK=chunk, BLOCK_D=RESCORE_DIM, num_warps=4,
    )  # fmt: skip
    score_B = score.amax(0)
    # Of the parts that have the best score, the lowest row.
    row_B = torch.where(score == score_B, row, given.rows).amin(0).to(torch.int64)
    least, most = torch.aminmax(keys_kD)
    return score_B.masked_fill(~(least.isfinite() & most.isfinite()), torch.nan), row_B.clamp_(max=given.rows - 1)


def _norm(x_BD: Tensor) -> Tensor:
    """Its squares in float64: in float32 those of small numbers are zero, and would bound nothing."""
    return torch.linalg.vector_norm(x_BD, dim=1, dtype=torch.float64).float()


@custom_op("vqscale::mix", mutates_args=())
def mix(
    x_BD: Tensor,
    keys_kD: Tensor,
    bias_k: Tensor | None,
    values_kD: Tensor,
    scale: float,
    ratio: float | None,
    products: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(best score, its row, highest score of the products and three sums as 4 x B, sum of p times the values)."""
    if not len(x_BD) or not len(keys_kD):
        state_4B = torch.zeros((4, len(x_BD)), dtype=torch.float32, device=x_BD.device)
        state_4B[0] = LOWEST
        return *_nobody(x_BD), state_4B, torch.zeros_like(x_BD, dtype=torch.float32)
    given = Operands.of(x_BD, keys_kD, bias_k, products)
    values = given.values(keys_kD, values_kD)
    launch = Launch("mix", given)
    num_chunks = -(-given.rows // launch.codes)
    peak = given.x.new_empty((given.num, num_chunks), dtype=torch.float32)
    state = peak.new_zeros((launch.parts, 4, given.num))
    mean = peak.new_empty((launch.parts, given.num, given.dim))
    with on_device_of(x_BD):
        kernels.mix_kernel[launch.grid](
            *given.scores, values, state, mean, peak,
            given.num, given.rows, given.dim, num_chunks, launch.per_part, scale, ratio or 1.0,
            ENTROPY=ratio is not None, SAME=values is given.score_c, **launch.options,
        )  # fmt: skip
        score_B, row_B = _rescore(x_BD.contiguous(), keys_kD.contiguous(), peak, given, launch.codes)
    return score_B, row_B, *_merge(state, mean, scale, ratio or 1.0)


@mix.register_fake
def _(x_BD: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean_BD = torch.empty_like(x_BD, dtype=torch.float32)
    return *_nobody(x_BD), mean_BD.new_empty((4, len(x_BD))), mean_BD


def _merge(state: Tensor, mean: Tensor, scale: float, ratio: float) -> tuple[Tensor, Tensor]:
    """The parts of an online softmax as one, relative to the highest of their tops."""
    if len(state) == 1:
        return state[0], mean[0]
    top, total, entropy_total, excess = state.unbind(1)
    top_B = top.amax(0)
    delta = (top - top_B) * scale
    shrink, entropy_shrink = torch.exp2(delta), torch.exp2(delta * ratio)
    excess_B = (entropy_shrink * (excess + delta * ratio * entropy_total)).sum(0)
    state_4B = torch.stack([top_B, (shrink * total).sum(0), (entropy_shrink * entropy_total).sum(0), excess_B])
    return state_4B, mean.mul_(shrink[:, :, None]).sum(0)


@custom_op("vqscale::column_sums", mutates_args=())
def column_sums(
    x_BD: Tensor, keys_kD: Tensor, bias_k: Tensor | None, scale: float, top_B: Tensor, log_B: Tensor, products: str
) -> Tensor:
    if not len(x_BD) or not len(keys_kD):
        return torch.zeros(len(keys_kD), dtype=torch.float32, device=x_BD.device)
    given = Operands.of(x_BD, keys_kD, bias_k, products)
    launch = Launch("columns", given)
    out = given.x.new_empty((launch.parts, given.rows), dtype=torch.float32)
    with on_device_of(x_BD):
        kernels.column_sums_kernel[launch.grid](
            *given.scores, top_B.float().contiguous(), log_B.float().contiguous(), out,
            given.num, given.rows, given.dim, launch.per_part, scale, **launch.options,
        )  # fmt: skip
    return out.sum(0)


column_sums.register_fake(lambda x_BD, keys_kD, *_: keys_kD.new_empty(len(keys_kD), dtype=torch.float32))


@custom_op("vqscale::row_means", mutates_args=())
def row_means(
    x_BD: Tensor,
    keys_kD: Tensor,
    bias_k: Tensor | None,
    scale: float,
    top_B: Tensor,
    log_B: Tensor,
    weight_k: Tensor,
    products: str,
) -> Tensor:
    if not len(x_BD) or not len(keys_kD):
        return torch.zeros(len(x_BD), dtype=torch.float32, device=x_BD.device)
    given = Operands.of(x_BD, keys_kD, bias_k, products)
    launch = Launch("means", given)
    out = given.x.new_empty((launch.parts, given.num), dtype=torch.float32)
    with on_device_of(x_BD):
        kernels.row_means_kernel[launch.grid](
            *given.scores,
            *(part.float().contiguous() for part in (top_B, log_B, weight_k)), out,
            given.num, given.rows, given.dim, launch.per_part, scale, **launch.options,
        )  # fmt: skip
    return out.sum(0)


row_means.register_fake(lambda x_BD, *_: x_BD.new_empty(len(x_BD), dtype=torch.float32))


@custom_op("vqscale::mix_backward", mutates_args=())
def mix_backward(
    x_BD: Tensor,
    keys_kD: Tensor,
    bias_k: Tensor | None,
    values_kD: Tensor,
    upstream_B5: Tensor,
    g_BD: Tensor | None,
    columns_k: Tensor | None,
    has_shift: bool,
    has_entropy: bool,
    scale: float,
    ratio: float,
    budget: int,
    products: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, the keys and the bias (empty without one), block after block; `upstream_B5` as UPSTREAM."""
    if not len(x_BD) or not len(keys_kD):
        return torch.zeros_like(x_BD), torch.zeros_like(keys_kD), _like_bias(keys_kD, bias_k).zero_()
    given = Operands.of(x_BD, keys_kD, bias_k, products)
    values, g = given.values(keys_kD, values_kD), given.x if g_BD is None else given.like(g_BD)
    upstream, columns = upstream_B5.float().contiguous(), given.x if columns_k is None else columns_k.float()
    flags = {
        "HAS_MEAN": g_BD is not None,
        "HAS_SHIFT": has_shift,
        "HAS_ENTROPY": has_entropy,
        "HAS_COLUMNS": columns_k is not None,
        "SAME": values is given.score_c,
    }
    sums = Gradients.zeros(x_BD, keys_kD, bias_k, torch.float32)
    size = tiles.wave(given.num, given.dtype.itemsize, tiles.cache_bytes(x_BD.device), budget)
    buffer = scan.Buffer()
    with on_device_of(x_BD):
        for tokens, rows in scan.cut(given.num, given.rows, *size):
            block = given.block(tokens, rows)
            launch = Launch("gradient", block, wide=not flags["SAME"])
            du_br = buffer.view(given.x, block.num, block.rows)
            kernels_backward.logit_gradient_kernel[launch.grid](
                *block.scores, values[rows], g[tokens], upstream[tokens],
                columns if columns_k is None else columns[rows], du_br,
                block.num, block.rows, given.dim, launch.per_part, scale, ratio, **flags, **launch.options,
            )  # fmt: skip
            sums.add_block(du_br, given.x, given.c, tokens, rows, given.products)
    grad_k = _like_bias(keys_kD, bias_k) if sums.bias_k is None or bias_k is None else sums.bias_k.to(bias_k.dtype)
    return sums.x_BD.to(x_BD.dtype), sums.keys_kD.to(keys_kD.dtype), grad_k


@mix_backward.register_fake
def _(x_BD: Tensor, keys_kD: Tensor, bias_k: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x_BD), torch.empty_like(keys_kD), _like_bias(keys_kD, bias_k)


def _like_bias(keys_kD: Tensor, bias_k: Tensor | None) -> Tensor:
    return keys_kD.new_empty(0, dtype=torch.float32) if bias_k is None else torch.empty_like(bias_k)
