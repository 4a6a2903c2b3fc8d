"""Which library multiplies float32 numbers on a CPU, and a Linear that asks for the quicker one.

torch gives float32 products to MKL, and to oneDNN under the switch that allows rounding to bfloat16 alone. oneDNN
rounds where a processor has AMX; where it has none, it multiplies in float32 with all of AVX512, which MKL does not use
on every processor: on an AMD EPYC of 2024 it is twice as quick. So there the switch is turned, around such a product
and no further: torch's attention, made of many small products, is slower under it.

The switch is the process's. Not here: which products may be rounded (codes/products.py, engine.matmul).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
    with matmul_precision("medium"):
        return bool(((x @ x) / 64 - (1.0 + 2.0**-11)).abs().max() < 1e-6)


class Linear(nn.Linear):
    """torch's, with products that are `full` in both directions where numbers are float32 and engine.matmul highest."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not _in_onednn(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        y: Tensor = _Product.apply(x, self.weight, self.bias)
        return y


def _in_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and torch.get_float32_matmul_precision() == "highest"
        and exact_in_onednn()
    )


class _Product(torch.autograd.Function):
    """x weight^T + bias for x (..., I)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        with full("cpu"):
            return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        g_NO, dx, dweight, dbias = grads[0].reshape(-1, len(weight)), None, None, None
        with full("cpu"):
            if ctx.needs_input_grad[0]:
                dx = (g_NO @ weight).view(x.shape)
            if ctx.needs_input_grad[1]:
                dweight = g_NO.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            dbias = g_NO.sum(0)
        return dx, dweight, dbias
