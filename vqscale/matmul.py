"""Which library multiplies float32 numbers on a CPU, a Linear that asks for the quicker one, and a Matrix for few rows.

torch gives float32 products to MKL, and to oneDNN under the switch that allows rounding to bfloat16 alone. oneDNN
rounds where a processor has AMX; where it has none, it multiplies in float32 with all of AVX512, which MKL does not use
on every processor: on an AMD EPYC of 2024 it is twice as quick. So there the switch is turned, around such a product
and no further: torch's attention, made of many small products, is slower under it.

The switch is the process's: threads that multiply meanwhile see it, and two that turn it at once may leave it turned,
so one thread at a time computes. Not here: which products may be rounded (codes/products.py, engine.matmul).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def matmul_precision(precision: Literal["highest", "high", "medium"]) -> Iterator[None]:
    """torch's switch of the process, put back at the end."""
    switch = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(switch)


@contextmanager
def full(device_type: str) -> Iterator[None]:
    """Inside, products of float32 matrices are float32 on such a device, and on a CPU quick."""
    with matmul_precision("medium" if device_type == "cpu" and exact_in_onednn() else "highest"):
        yield


def exact_in_onednn() -> bool:
    """Whether this CPU's products stay float32 where torch allows oneDNN to round them."""
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled) and _keeps_bits()


@cache
def _keeps_bits() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or torch.cpu._is_amx_tile_supported():
        return False
    x = torch.full((64, 64), 1.0 + 2.0**-12)  # to bfloat16 it is 1
    with matmul_precision("medium"), _disable_current_modes():  # whoever counts products does not count this one
        return bool(((x @ x) / 64 - (1.0 + 2.0**-11)).abs().max() < 1e-6)


class Linear(nn.Linear):
    """torch's, with products that are `full` in both directions where numbers are float32 and engine.matmul highest."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not _in_onednn(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        y_NO: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return y_NO.view(*x.shape[:-1], self.out_features)


def _in_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()  # torch.func knows the formulas of torch's own
        and torch.get_float32_matmul_precision() == "highest"
        and exact_in_onednn()
    )


class _Product(torch.autograd.Function):
    """x weight^T + bias; a view of its answer may be changed in place, which one made in here may not."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        wants_x, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x_NI if wants_weight else None, weight_OI if wants_x else None)
        with full("cpu"):
            return F.linear(x_NI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x_NI, weight_OI), (g_NO,) = ctx.saved_tensors, grads
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        with full("cpu"):
            dx_NI = g_NO @ weight_OI if wants_x else None
            dweight_OI = g_NO.t() @ x_NI if wants_weight else None
        return dx_NI, dweight_OI, g_NO.sum(0) if wants_bias else None


class Matrix:
    """y = x W^T for few rows x and a matrix W that is read many times, in the type of autocast where it is on."""

    def __init__(self, weight_OI: Tensor) -> None:
        device = weight_OI.device.type
        low = torch.is_autocast_enabled(device)
        self._weight = weight_OI.detach().to(torch.get_autocast_dtype(device) if low else weight_OI.dtype)
        self._packed = _pack(self._weight) if _packs(self._weight) else None

    def __call__(self, x_BI: Tensor) -> Tensor:
        x_BI = x_BI.to(self._weight.dtype)
        if self._packed is None:
            return F.linear(x_BI, self._weight)
        y_BO: Tensor = torch.ops.mkldnn._linear_pointwise(x_BI, self._packed, None, "none", [], "")
        return y_BO


def _packs(weight: Tensor) -> bool:
    """Whether oneDNN has a layout for it, which else every product with it makes anew."""
    if weight.device.type != "cpu" or not weight.numel() or not torch.backends.mkldnn.is_available():
        return False
    low = weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32 or low


def _pack(weight_OI: Tensor) -> Tensor:
    """W in oneDNN's own layout. Private names of torch, here alone: what its compiler makes of a frozen Linear."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous())
    return packed
