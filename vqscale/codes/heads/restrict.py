"""Which ids remain after top-k and top-p, for logits whose K columns are split over the ranks; exact, ties included.

A set is a `Kept`: every id above a value, and so many of those equal to it, the lowest ids first. The value is found
from the candidates of all ranks where they are few, else by a histogram of the logits and a bisection on the bits of
floating-point numbers. Between the ranks go BINS numbers per token, then one per token and step; nothing grows with K.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.codes.scan import LOWEST
from vqscale.parallel import ops
from vqscale.parallel.mesh import Axis

CANDIDATES = 1024  # a top-k up to here exchanges candidates, above it counts
BINS = 256  # of a histogram of logits, the first step of finding a value
CPU_BLOCK = 2**16  # 64-bit numbers made at once: what the caches of one core hold


@dataclass
class Kept:
    """The ids of each token that remain: all with a logit above `value`, and `quota` of those equal to it."""

    value_t: Tensor
    quota_t: Tensor


def keep(l_tk: Tensor, top_k: int, top_p: float, num_codes: int, axis: Axis) -> Kept:
    """The set that top-k and then top-p leave of logits already divided by the temperature. Collective.

    top_k 0 and top_p 1 leave all, and one of them does not.
    """
    kept = None
    if 0 < top_k < num_codes:
        kept = _top_k(l_tk, top_k, axis)
    if top_p < 1:
        kept = _top_p(l_tk, top_p, kept, axis)
    assert kept is not None
    return kept


def _top_k(l_tk: Tensor, num: int, axis: Axis) -> Kept:
    if num > CANDIDATES:
        value_t, above_t = _threshold(l_tk, None, l_tk.new_full((len(l_tk),), num, dtype=torch.float64), axis)
        return Kept(value_t, num - above_t.to(torch.int64))
    mine_tc = torch.topk(l_tk, min(num, l_tk.shape[1]), dim=1).values
    padded_tc = l_tk.new_full((len(l_tk), num), float("-inf"))
    padded_tc[:, : mine_tc.shape[1]] = mine_tc
    all_tc = ops.gather(padded_tc, axis).unflatten(0, (axis.size, -1)).transpose(0, 1).flatten(1)
    value_t = torch.topk(all_tc, num, dim=1).values[:, -1]
    return Kept(value_t, num - ops.sum_over((l_tk > value_t[:, None]).sum(1), axis))


def _top_p(l_tk: Tensor, share: float, kept: Kept | None, axis: Axis) -> Kept:
    """Of the set `kept`, ids in the order of their logits (the lowest first among equals) while those before them hold
    less than `share` of its mass. Masses are summed in float64, so that the order of summing hardly shows."""
    top_t = ops.max_over(_amax(l_tk), axis)
    e_tk = torch.exp(l_tk - top_t[:, None])
    if kept is None:
        total_t = ops.sum_over(e_tk.sum(1, dtype=torch.float64), axis)
    else:
        mine_t = torch.where(l_tk > kept.value_t[:, None], e_tk, 0.0).sum(1, dtype=torch.float64)
        total_t = ops.sum_over(mine_t, axis) + kept.quota_t * torch.exp(kept.value_t - top_t).double()
    wanted_t = share * total_t
    value_t, above_t = _threshold(l_tk, e_tk, wanted_t, axis)
    each_t = torch.exp(value_t - top_t).double()
    quota_t = ((wanted_t - above_t) / each_t).ceil().clamp(1, 2**62).to(torch.int64)
    if kept is not None:
        quota_t = torch.where(value_t == kept.value_t, torch.minimum(quota_t, kept.quota_t), quota_t)
    return Kept(value_t, quota_t)


def mask_(l_tk: Tensor, kept: Kept, axis: Axis) -> None:
    """Set the logits of all ids outside the kept set to LOWEST, in place; NaN stays NaN. Collective."""
    tie_tk = l_tk == kept.value_t[:, None]
    ties_t = tie_tk.sum(1)
    before_t = ops.gather(ties_t[None], axis)[: axis.rank].sum(0)
    quota_t = kept.quota_t - before_t
    # Whether ties must be counted is seen by this rank alone, and nothing in this branch talks.
    if bool((quota_t < ties_t).any()):
        tie_tk &= tie_tk.cumsum(1) <= quota_t[:, None]
    l_tk.masked_fill_(tie_tk.logical_not_().logical_and_(l_tk <= kept.value_t[:, None]), LOWEST)


def _amax(l_tk: Tensor) -> Tensor:
    return l_tk.amax(1) if l_tk.shape[1] else l_tk.new_full((len(l_tk),), LOWEST)


def _amin(l_tk: Tensor) -> Tensor:
    return l_tk.amin(1) if l_tk.shape[1] else l_tk.new_full((len(l_tk),), -LOWEST)


def _threshold(l_tk: Tensor, weight_tk: Tensor | None, wanted_t: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """(the lowest logit v_t above which all ids together weigh less than `wanted_t`, what they weigh). Collective.

    Weights None are 1. A histogram finds the bin of v_t, a bisection on numbers in their order finds v_t exactly in it,
    in some 20 steps of one number per token. All ranks see the same sums, and so they take the same steps.
    """
    inside = _bin_of(l_tk, weight_tk, wanted_t, axis)
    none_t = l_tk.new_full((len(l_tk),), LOWEST)
    high_t = _ordered(ops.max_over(none_t.scatter_reduce(0, inside.token_P, inside.logit_P, "amax"), axis))
    low_t = _ordered(ops.min_over((-none_t).scatter_reduce(0, inside.token_P, inside.logit_P, "amin"), axis)) - 1
    while bool((low_t + 1 < high_t).any()):
        middle_t = (low_t & high_t) + ((low_t ^ high_t) >> 1)  # the mean, rounded down; the sum could overflow
        light_t = inside.above(_number(middle_t, l_tk.dtype), axis) < wanted_t
        high_t = torch.where(light_t, middle_t, high_t)
        low_t = torch.where(light_t, low_t, middle_t)
    value_t = _number(high_t, l_tk.dtype)
    return value_t, inside.above(value_t, axis)


@dataclass
class _Bin:
    """The logits of one bin of every token as a list, and the weight of all that are in higher bins of all ranks."""

    token_P: Tensor
    logit_P: Tensor
    weight_P: Tensor
    higher_t: Tensor

    def above(self, value_t: Tensor, axis: Axis) -> Tensor:
        """The weight of all logits of all ranks above a value inside the bin."""
        weight_P = self.weight_P * (self.logit_P > value_t[self.token_P])
        return self.higher_t + ops.sum_over(torch.zeros_like(self.higher_t).index_add_(0, self.token_P, weight_P), axis)


def _bin_of(l_tk: Tensor, weight_tk: Tensor | None, wanted_t: Tensor, axis: Axis) -> _Bin:
    """The lowest of BINS bins, even between a token's lowest and highest logit, with less than `wanted_t` above it."""
    high_t, low_t = ops.max_over(_amax(l_tk), axis), ops.min_over(_amin(l_tk), axis)
    low_t = torch.maximum(low_t, high_t - 1e30)
    scale_t = BINS / (high_t - low_t).clamp(min=1e-30)

    def parts() -> Iterator[tuple[slice, Tensor]]:
        step = max(1, CPU_BLOCK // max(1, len(l_tk))) if l_tk.device.type == "cpu" else max(1, l_tk.shape[1])
        for column in range(0, l_tk.shape[1], step):
            some = slice(column, column + step)
            # Each operation keeps the order of numbers, so bins are intervals whatever the rounding.
            place_tc = (l_tk[:, some] - low_t[:, None]).clamp_(min=0).mul_(scale_t[:, None])
            yield some, place_tc.to(torch.int64).clamp_(0, BINS - 1)  # NaN is below 0

    def weights(some: slice) -> Tensor:
        part = torch.ones_like(l_tk[:, some]) if weight_tk is None else weight_tk[:, some]
        return part.to(torch.float64)

    sums_tb = torch.zeros(len(l_tk), BINS, dtype=torch.float64, device=l_tk.device)
    for some, bin_tc in parts():
        sums_tb.scatter_add_(1, bin_tc, weights(some))
    sums_tb = ops.sum_over(sums_tb, axis)
    # From the highest bin down: what is above a bin is the sum of those before it.
    above_tb = F.pad(sums_tb.flip(1).cumsum(1)[:, :-1], (1, 0)).flip(1)
    bin_t = (above_tb >= wanted_t[:, None]).sum(1)
    found = []
    for some, bin_tc in parts():
        token_P, column_P = (bin_tc == bin_t[:, None]).nonzero(as_tuple=True)
        found.append((token_P, l_tk[:, some][token_P, column_P], weights(some)[token_P, column_P]))
    if not found:
        found.append((bin_t[:0], l_tk.flatten(), l_tk.flatten().double()))
    token_P, logit_P, weight_P = (torch.cat(parts) for parts in zip(*found, strict=True))
    return _Bin(token_P, logit_P, weight_P, above_tb.gather(1, bin_t[:, None])[:, 0])


_BITS = {torch.float32: (torch.int32, 2**31), torch.float64: (torch.int64, 2**63)}


def _ordered(x: Tensor) -> Tensor:
    """Floating-point numbers as int64 in the same order; x and -x are negatives, both zeros are 0."""
    kind, half = _BITS[x.dtype]
    bits = x.contiguous().view(kind).to(torch.int64)
    return torch.where(bits >= 0, bits, -(bits & (half - 1)))


def _number(order: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_ordered`."""
    size = order.abs().to(_BITS[dtype][0]).view(dtype)
    return torch.where(order < 0, -size, size)
