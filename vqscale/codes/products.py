"""How blocks of numbers are multiplied: in their own type, in TF32, or rounded to bfloat16 with float32 sums between
blocks.

Which are wanted, a training says by `precision` (engine.matmul), and the machine which are worth it: outside of that
context products are float32, whatever torch is set to. Logits are not multiplied here, but for a prior's head that asks
for it: ids and softmaxes keep the precision of the rows (merge.full_precision).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from vqscale.codes.constant import constant_result
from vqscale.codes.scan import Buffer
from vqscale.matmul import matmul_precision

LOW = torch.bfloat16
Rounding = Literal["fp32", "tf32", "bf16"]
ROUNDINGS: dict[str, Rounding] = {"highest": "fp32", "high": "tf32", "medium": "bf16"}


_asked: ContextVar[Rounding] = ContextVar("products", default="fp32")


@contextmanager
def precision(matmul: Literal["highest", "high", "medium"]) -> Iterator[None]:
    """Inside, float32 numbers are multiplied as engine.matmul says: by mixtures, whose backward passes do as their
    forward passes did, and by everything else, for which torch has a switch of the process. Both are put back.
    """
    asked = _asked.set(ROUNDINGS[matmul])
    try:
        with matmul_precision(matmul):
            yield
    finally:
        _asked.reset(asked)


@constant_result
def wanted(device_type: str, dtype: torch.dtype) -> Rounding:
    """What is asked for where the numbers are not float64 and the device multiplies it faster, else fp32."""
    asked = _asked.get()
    on_cpu = device_type == "cpu" and asked == "bf16" and fast_on_cpu()
    return asked if dtype != torch.float64 and (device_type == "cuda" or on_cpu) else "fp32"


def fast_on_cpu() -> bool:
    """Whether this CPU multiplies bfloat16 (AVX512-BF16 or AMX), and torch lets it."""
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled) and _has_instructions()


@cache
def _has_instructions() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def operand(a: Tensor, products: Rounding, buffer: Buffer | None = None) -> Tensor:
    """`a` as `product` reads it, for operands that are read more than once; in the buffer if there is one."""
    if products != "bf16" or a.dtype == LOW:
        return a
    if buffer is None:
        return a.to(LOW)
    tokens, rows = a.shape
    return buffer.view(a, tokens, rows, dtype=LOW).copy_(a)


def product(a: Tensor, b: Tensor, products: Rounding, scale: float = 1.0, buffer: Buffer | None = None) -> Tensor:
    """scale * a @ b in the type of a. With bf16 the operands are rounded to bf16 and the sums are float32. In the
    buffer if there is one: fresh memory for every block takes longer than the arithmetic on it.

    On a CPU the sums of bf16 are rounded to bf16 once more: torch has no product there that returns float32.
    """
    out = None if buffer is None else buffer.view(a, len(a), b.shape[1])
    if products != "bf16":
        with _switch(products):
            return torch.addmm(a.new_zeros(1), a, b, beta=0, alpha=scale, out=out)
    low = _low(a, b)
    return (low.to(a.dtype) if out is None else out.copy_(low)).mul_(scale)


def _switch(products: Rounding) -> AbstractContextManager[None]:
    """torch's switch for a product of numbers in their own type: TF32 where it is wanted, else as it is."""
    return matmul_precision("high") if products == "tf32" else nullcontext()


def add_product(out: Tensor, a: Tensor, b: Tensor, products: Rounding) -> None:
    """out += a @ b, where a and b may be operands. On a GPU the product of bf16 itself adds, in float32."""
    if products != "bf16":
        with _switch(products):
            out.addmm_(a, b)
    elif out.device.type == "cuda" and out.dtype == torch.float32 and not torch.compiler.is_compiling():
        torch.addmm(out, a.to(LOW), b.to(LOW), out_dtype=torch.float32, out=out)
    else:
        out.add_(_low(a, b))


def _low(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.to(LOW), b.to(LOW)
    return torch.mm(a, b, out_dtype=torch.float32) if a.device.type == "cuda" else torch.mm(a, b)
