"""Collectives with gradients: what goes forward, what comes back; all are the identity on an axis of one.

    gather       forward all-gather along dim 0         backward reduce-scatter (sum) along dim 0
    scatter_sum  forward reduce-scatter (sum), dim 0    backward all-gather along dim 0
    sum_over     forward all-reduce (sum)               backward all-reduce (sum)
    share        forward identity                       backward all-reduce (sum)
    max_over, min_over, broadcast, broadcast_, gather_objects, barrier   no gradient

Shapes are equal on all ranks of the axis. `count_bytes` counts what this rank sends, by axis, as a ring would send it.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vqscale.parallel.clock import clock
from vqscale.parallel.mesh import Axis

# torch 2.13 renames the two collectives on tensors; the new names are not in all versions that we run with.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning)

BUCKET_BYTES = 32 << 20
_meters: list[dict[str, int]] = []


@contextmanager
def count_bytes() -> Iterator[dict[str, int]]:
    """Bytes that this rank sends while the block runs, by axis name, backward passes included.

    Counted as a ring would send them: all-gather and reduce-scatter move (M - 1) parts, all-reduce twice that.
    """
    sent: dict[str, int] = defaultdict(int)
    _meters.append(sent)
    try:
        yield sent
    finally:
        _meters.remove(sent)


def _count(axis: Axis, nbytes: int) -> None:
    for meter in _meters:
        meter[axis.name] += nbytes


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _all_gather(x: Tensor, axis: Axis) -> Tensor:
    x = x.contiguous()
    out = x.new_empty((axis.size * x.shape[0], *x.shape[1:]))
    with clock.span("communication"):
        dist.all_gather_into_tensor(out, x, group=axis.group)
    _count(axis, (axis.size - 1) * _nbytes(x))
    return out


def _reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    assert x.shape[0] % axis.size == 0, f"{x.shape[0]} rows do not divide by the {axis.size} ranks of {axis.name}"
    x = x.contiguous()
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    with clock.span("communication"):
        dist.reduce_scatter_tensor(out, x, group=axis.group)
    _count(axis, (axis.size - 1) * _nbytes(out))
    return out


def _all_reduce(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    with clock.span("communication"):
        dist.all_reduce(out, op=op, group=axis.group)
    _count(axis, 2 * (axis.size - 1) * _nbytes(out) // axis.size)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _all_gather(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grads[0], ctx.axis), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _reduce_scatter(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grads[0], ctx.axis), None


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grads[0], ctx.axis), None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grads[0], ctx.axis), None


def gather(x: Tensor, axis: Axis) -> Tensor:
    """Forward: the parts of all ranks, one after the other along dim 0. Backward: sums, each part to its owner."""
    return x if axis.size == 1 else _Gather.apply(x, axis)


def scatter_sum(x: Tensor, axis: Axis) -> Tensor:
    """Forward: the sum over ranks, of which this rank keeps its part of dim 0. Backward: all-gather."""
    return x if axis.size == 1 else _ScatterSum.apply(x, axis)


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """Forward: the sum over ranks, on every rank. Backward: the sum of the gradients of all ranks."""
    return x if axis.size == 1 else _SumOver.apply(x, axis)


def share(x: Tensor, axis: Axis) -> Tensor:
    """Forward: x, which is the same on all ranks. Backward: the sum of what each rank's use of it contributes."""
    return x if axis.size == 1 else _Share.apply(x, axis)


@torch.no_grad()
def max_over(x: Tensor, axis: Axis) -> Tensor:
    """The elementwise maximum over ranks, on every rank. No gradient."""
    return x if axis.size == 1 else _all_reduce(x, axis, dist.ReduceOp.MAX)


@torch.no_grad()
def min_over(x: Tensor, axis: Axis) -> Tensor:
    """The elementwise minimum over ranks, on every rank. No gradient."""
    return x if axis.size == 1 else _all_reduce(x, axis, dist.ReduceOp.MIN)


@torch.no_grad()
def broadcast(x: Tensor, axis: Axis, source: int = 0) -> Tensor:
    """What rank `source` of the axis has, on every rank. No gradient; x is not changed."""
    if axis.size == 1:
        return x
    out = x.clone(memory_format=torch.contiguous_format)
    dist.broadcast(out, src=dist.get_global_rank(_group(axis), source), group=axis.group)
    _count(axis, _nbytes(out) if axis.rank == source else 0)
    return out


@torch.no_grad()
def broadcast_(tensors: Sequence[Tensor], axis: Axis) -> None:
    """Each tensor becomes what rank 0 of the axis has, in place; many small ones are sent as one."""
    if axis.size == 1:
        return
    for bucket in _buckets(tensors):
        flat = broadcast(torch.cat([tensor.reshape(-1) for tensor in bucket]), axis)
        for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type and device at a time, BUCKET_BYTES together if none alone has more."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        kinds[tensor.dtype, tensor.device].append(tensor)
    for members in kinds.values():
        bucket: list[Tensor] = []
        held = 0
        for tensor in members:
            if bucket and held + _nbytes(tensor) > BUCKET_BYTES:
                yield bucket
                bucket, held = [], 0
            bucket.append(tensor)
            held += _nbytes(tensor)
        yield bucket


def gather_objects(value: Any, axis: Axis) -> list[Any]:
    """The picklable values of all ranks, in rank order, on every rank. For small things outside the step."""
    if axis.size == 1:
        return [value]
    out: list[Any] = [None] * axis.size
    dist.all_gather_object(out, value, group=axis.group)
    return out


def barrier(axis: Axis) -> None:
    """Wait until every rank of the axis is here."""
    if axis.size > 1:
        dist.barrier(group=axis.group)


def _group(axis: Axis) -> dist.ProcessGroup:
    assert axis.group is not None, f"the axis {axis.name} has {axis.size} ranks but no group"
    return axis.group
