"""The fused kernels as torch operators: they prepare operands, launch, and merge the parts of programs.

Each is a torch.library operator, so that torch.compile takes it as one node; what tokens and codes mean is in
passes.py. Nothing here reads a number back from the device. A rank without rows launches nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from vqscale.codes.gpu import kernels, kernels_backward, tiles
from vqscale.codes.gpu.launch import Cut, Operands, is_same, on_device_of
from vqscale.codes.gpu.tiles import RESCORE_DIM, RESCORE_TOKENS
from vqscale.codes.scan import LOWEST


@custom_op("vqscale::best", mutates_args=())
def best(x_BD: Tensor, keys_kD: Tensor, bias_k: Tensor | None, low: bool) -> tuple[Tensor, Tensor]:
    if not len(x_BD) or not len(keys_kD):
        return _nobody(x_BD)
    given = Operands(x_BD, keys_kD, bias_k, low)
    cut = Cut("peaks", given)
    num_chunks = -(-given.rows // cut.codes)
    peak = given.x.new_empty((given.num, num_chunks), dtype=torch.float32)
    with on_device_of(x_BD):
        kernels.peaks_kernel[cut.grid](
            given.x, given.c, given.bias, peak, given.num, given.rows, given.dim, num_chunks, cut.per_part,
            **cut.options,
        )  # fmt: skip
        return _rescore(x_BD.contiguous(), keys_kD.contiguous(), peak, given, cut.codes)


@best.register_fake
def _(x_BD: Tensor, keys_kD: Tensor, bias_k: Tensor | None, low: bool) -> tuple[Tensor, Tensor]:
    return _nobody(x_BD)


def _nobody(x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """(score, row) of no rows at all."""
    score_B = torch.full((len(x_BD),), LOWEST, dtype=torch.float64, device=x_BD.device)
    return score_B, torch.zeros(len(x_BD), dtype=torch.int64, device=x_BD.device)


def _rescore(x_BD: Tensor, keys_kD: Tensor, peak: Tensor, given: Operands, chunk: int) -> tuple[Tensor, Tensor]:
    """The arg max of the float64 scores from the peaks of chunks, whose errors are bounded as passes.py says."""
    num_chunks = peak.shape[1]
    # Additions in any order; a tensor core cuts off where others round.
    rounding = (given.dim + 8) * 2.0**-21
    full_BD, low_BD = x_BD.float(), given.x.float()
    left_B = torch.linalg.vector_norm(full_BD - low_BD, dim=1) + rounding * torch.linalg.vector_norm(full_BD, dim=1)
    right_B = torch.linalg.vector_norm(low_BD, dim=1)
    width_c3 = peak.new_empty((num_chunks, 3))
    kernels.widths_kernel[(num_chunks,)](
        keys_kD, given.c, given.bias, width_c3, given.rows, given.dim, rounding,
        HAS_BIAS=given.has_bias, CHUNK=chunk, BLOCK_D=RESCORE_DIM, num_warps=4,
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


@custom_op("vqscale::mix", mutates_args=())
def mix(
    x_BD: Tensor,
    keys_kD: Tensor,
    bias_k: Tensor | None,
    values_kD: Tensor,
    scale: float,
    sharper: float | None,
    low: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(best score, its row, highest score of the products and three sums as 4 x B, sum of p times the values)."""
    if not len(x_BD) or not len(keys_kD):
        state_4B = torch.zeros((4, len(x_BD)), dtype=torch.float32, device=x_BD.device)
        state_4B[0] = LOWEST
        return *_nobody(x_BD), state_4B, torch.zeros_like(x_BD, dtype=torch.float32)
    given = Operands(x_BD, keys_kD, bias_k, low)
    same = is_same(keys_kD, values_kD)
    cut = Cut("mix", given)
    num_chunks = -(-given.rows // cut.codes)
    peak = given.x.new_empty((given.num, num_chunks), dtype=torch.float32)
    state = peak.new_zeros((cut.parts, 4, given.num))
    mean = peak.new_empty((cut.parts, given.num, given.dim))
    with on_device_of(x_BD):
        kernels.mix_kernel[cut.grid](
            given.x, given.c, given.bias, given.c if same else given.of(values_kD), state, mean, peak,
            given.num, given.rows, given.dim, num_chunks, cut.per_part, scale, sharper or 1.0,
            SHARP=sharper is not None, SAME=same, **cut.options,
        )  # fmt: skip
        score_B, row_B = _rescore(x_BD.contiguous(), keys_kD.contiguous(), peak, given, cut.codes)
    return score_B, row_B, *_merge(state, mean, scale, sharper or 1.0)


@mix.register_fake
def _(
    x_BD: Tensor,
    keys_kD: Tensor,
    bias_k: Tensor | None,
    values_kD: Tensor,
    scale: float,
    sharper: float | None,
    low: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean_BD = torch.empty_like(x_BD, dtype=torch.float32)
    return *_nobody(x_BD), mean_BD.new_empty((4, len(x_BD))), mean_BD


def _merge(state: Tensor, mean: Tensor, scale: float, sharper: float) -> tuple[Tensor, Tensor]:
    """The parts of an online softmax as one, relative to the highest of their tops."""
    if len(state) == 1:
        return state[0], mean[0]
    top, total, sharp_total, excess = state.unbind(1)
    top_B = top.amax(0)
    fall = (top - top_B) * scale
    shrink, sharp_shrink = torch.exp2(fall), torch.exp2(fall * sharper)
    excess_B = (sharp_shrink * (excess + fall * sharper * sharp_total)).sum(0)
    state_4B = torch.stack([top_B, (shrink * total).sum(0), (sharp_shrink * sharp_total).sum(0), excess_B])
    return state_4B, mean.mul_(shrink[:, :, None]).sum(0)


@custom_op("vqscale::column_sums", mutates_args=())
def column_sums(
    x_BD: Tensor, keys_kD: Tensor, bias_k: Tensor | None, scale: float, top_B: Tensor, log_B: Tensor, low: bool
) -> Tensor:
    if not len(x_BD) or not len(keys_kD):
        return torch.zeros(len(keys_kD), dtype=torch.float32, device=x_BD.device)
    given = Operands(x_BD, keys_kD, bias_k, low)
    cut = Cut("columns", given)
    out = given.x.new_empty((cut.parts, given.rows), dtype=torch.float32)
    with on_device_of(x_BD):
        kernels.column_sums_kernel[cut.grid](
            given.x, given.c, given.bias, top_B.float().contiguous(), log_B.float().contiguous(), out,
            given.num, given.rows, given.dim, cut.per_part, scale, **cut.options,
        )  # fmt: skip
    return out.sum(0)


@column_sums.register_fake
def _(
    x_BD: Tensor, keys_kD: Tensor, bias_k: Tensor | None, scale: float, top_B: Tensor, log_B: Tensor, low: bool
) -> Tensor:
    return keys_kD.new_empty(len(keys_kD), dtype=torch.float32)


@custom_op("vqscale::row_means", mutates_args=())
def row_means(
    x_BD: Tensor,
    keys_kD: Tensor,
    bias_k: Tensor | None,
    scale: float,
    top_B: Tensor,
    log_B: Tensor,
    weight_k: Tensor,
    low: bool,
) -> Tensor:
    if not len(x_BD) or not len(keys_kD):
        return torch.zeros(len(x_BD), dtype=torch.float32, device=x_BD.device)
    given = Operands(x_BD, keys_kD, bias_k, low)
    cut = Cut("means", given)
    out = given.x.new_empty((cut.parts, given.num), dtype=torch.float32)
    with on_device_of(x_BD):
        kernels.row_means_kernel[cut.grid](
            given.x, given.c, given.bias,
            *(part.float().contiguous() for part in (top_B, log_B, weight_k)), out,
            given.num, given.rows, given.dim, cut.per_part, scale, **cut.options,
        )  # fmt: skip
    return out.sum(0)


@row_means.register_fake
def _(
    x_BD: Tensor,
    keys_kD: Tensor,
    bias_k: Tensor | None,
    scale: float,
    top_B: Tensor,
    log_B: Tensor,
    weight_k: Tensor,
    low: bool,
) -> Tensor:
    return x_BD.new_empty(len(x_BD), dtype=torch.float32)


@custom_op("vqscale::unmix", mutates_args=())
def unmix(
    x_BD: Tensor,
    keys_kD: Tensor,
    bias_k: Tensor | None,
    values_kD: Tensor,
    numbers_7B: Tensor,
    mean_BD: Tensor | None,
    columns_k: Tensor | None,
    has_shift: bool,
    has_entropy: bool,
    scale: float,
    out_scale: float,
    sharper: float,
    low: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, the keys and the bias (empty without one). `numbers_7B` as `load_upstream` reads them."""
    if not len(x_BD) or not len(keys_kD):
        return torch.zeros_like(x_BD), torch.zeros_like(keys_kD), _like_bias(keys_kD, bias_k).zero_()
    given = Operands(x_BD, keys_kD, bias_k, low)
    same = is_same(keys_kD, values_kD)
    read = (
        given.x, given.c, given.bias, given.c if same else given.of(values_kD),
        given.x if mean_BD is None else given.of(mean_BD), numbers_7B.float().contiguous(),
        given.x if columns_k is None else columns_k.float().contiguous(),
    )  # fmt: skip
    flags = {
        "HAS_MEAN": mean_BD is not None,
        "HAS_SHIFT": has_shift,
        "HAS_ENTROPY": has_entropy,
        "HAS_COLUMNS": columns_k is not None,
        "SAME": same,
    }
    sizes, wide = (given.num, given.rows, given.dim), not same or has_entropy or columns_k is not None
    with on_device_of(x_BD):
        cut = Cut("tokens", given, wide)
        out = given.x.new_empty((cut.parts, given.num, given.dim), dtype=torch.float32)
        kernels_backward.token_gradient_kernel[cut.grid](
            *read, out, *sizes, cut.per_part, scale, out_scale, sharper, **flags, **cut.options
        )
        grad_BD = _summed(out, x_BD.dtype)
        cut = Cut("keys", given, wide)
        out = given.x.new_empty((cut.parts, given.rows, given.dim), dtype=torch.float32)
        out_bias = out.new_empty((cut.parts, given.rows if given.has_bias else 0))
        kernels_backward.key_gradient_kernel[cut.grid](
            *read, out, out_bias, *sizes, cut.per_part, scale, out_scale, sharper, **flags, **cut.options
        )
    grad_k = _summed(out_bias, torch.float32 if bias_k is None else bias_k.dtype)
    return grad_BD, _summed(out, keys_kD.dtype), grad_k


@unmix.register_fake
def _(
    x_BD: Tensor,
    keys_kD: Tensor,
    bias_k: Tensor | None,
    values_kD: Tensor,
    numbers_7B: Tensor,
    mean_BD: Tensor | None,
    columns_k: Tensor | None,
    has_shift: bool,
    has_entropy: bool,
    scale: float,
    out_scale: float,
    sharper: float,
    low: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x_BD), torch.empty_like(keys_kD), _like_bias(keys_kD, bias_k)


def _like_bias(keys_kD: Tensor, bias_k: Tensor | None) -> Tensor:
    return keys_kD.new_empty(0, dtype=torch.float32) if bias_k is None else torch.empty_like(bias_k)


def _summed(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the parts of programs, in their order; one part is not copied."""
    return (parts[0] if len(parts) == 1 else parts.sum(0)).to(dtype)
