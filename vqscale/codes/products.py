"""How blocks of numbers are multiplied: in their own type, in TF32, or rounded to bfloat16 with float32 sums between
blocks. fp8 is bf16 whose scores the fused kernels multiply in float8 (gpu/passes.py); nothing else does.

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
FLOAT8 = torch.float8_e4m3fn  # three bits of mantissa, 448 at most
FLOAT8_FROM = (8, 9)  # compute capability of GPUs that multiply it: Ada, Hopper and what came later
ROWS_AT_ONCE = 2**14  # that become float8: as many are there in float32 once more
Rounding = Literal["fp32", "tf32", "bf16", "fp8"]
Matmul = Literal["highest", "high", "medium", "low"]
ROUNDINGS: dict[Matmul, Rounding] = {"highest": "fp32", "high": "tf32", "medium": "bf16", "low": "fp8"}


_asked: ContextVar[Rounding] = ContextVar("products", default="fp32")


@contextmanager
def precision(matmul: Matmul) -> Iterator[None]:
    """Inside, float32 numbers are multiplied as engine.matmul says: by mixtures, whose backward passes do as their
    forward passes did, and by everything else, for which torch has a switch of the process. Both are put back.
    """
    asked = _asked.set(ROUNDINGS[matmul])
    try:
        with matmul_precision("medium" if matmul == "low" else matmul):
            yield
    finally:
        _asked.reset(asked)


@constant_result
def wanted(device_type: str, dtype: torch.dtype) -> Rounding:
    """What is asked for where the numbers are not float64 and the device multiplies it faster, else fp32."""
    asked = _asked.get()
    if asked == "fp8" and not (device_type == "cuda" and has_float8()):
        asked = "bf16"
    on_cpu = device_type == "cpu" and asked == "bf16" and fast_on_cpu()
    return asked if dtype != torch.float64 and (device_type == "cuda" or on_cpu) else "fp32"


def is_low(products: Rounding) -> bool:
    """Whether products other than scores are of numbers rounded to bfloat16."""
    return products in ("bf16", "fp8")


@cache
def has_float8() -> bool:
    """Whether this process's GPU multiplies float8."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= FLOAT8_FROM


def float8(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """(x / unit in float8, unit), which is the power of two that brings the largest number to [128, 256).

    Off by at most 2^-4 of a number, or by 2^-10 of the unit, where it is small. Rows that are not finite are no numbers
    at all, and the unit is that of the others.
    """
    largest_N = torch.linalg.vector_norm(x_ND, torch.inf, dim=1)
    finite_N = largest_N.isfinite()
    exponent = torch.frexp(torch.where(finite_N, largest_N, 0.0).amax()).exponent - 8
    unit = torch.exp2(exponent.clamp(min=-126).to(x_ND.dtype))
    factor_N1 = torch.where(finite_N, 1.0 / unit, torch.nan)[:, None]
    low_ND = torch.empty_like(x_ND, dtype=FLOAT8)
    for rows in range(0, len(x_ND), ROWS_AT_ONCE):
        some = slice(rows, rows + ROWS_AT_ONCE)
        low_ND[some] = x_ND[some] * factor_N1[some]
    return low_ND, unit


def rounded() -> str | None:
    """Why a compiled graph would round products over codes in plain torch, which it cannot turn the switch for
    (merge.full_precision); None where torch rounds none."""
    told = "torch rounds all products of a graph, those of codes too, unless engine.matmul is highest"
    return None if torch.get_float32_matmul_precision() == "highest" else told


def fast_on_cpu() -> bool:
    """Whether this CPU multiplies bfloat16 (AVX512-BF16 or AMX), and torch lets it."""
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled) and _has_instructions()


@cache
def _has_instructions() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def operand(a: Tensor, products: Rounding, buffer: Buffer | None = None) -> Tensor:
    """`a` as `product` reads it, for operands that are read more than once; in the buffer if there is one."""
    if not is_low(products) or a.dtype == LOW:
        return a
    if buffer is None:
        return a.to(LOW)
    tokens, rows = a.shape
    return buffer.view(a, tokens, rows, dtype=LOW).copy_(a)


def product(a: Tensor, b: Tensor, products: Rounding, scale: float = 1.0, buffer: Buffer | None = None) -> Tensor:
    """scale * a @ b in the type of a. With bf16 the operands are rounded to bf16 and the sums are float32; fp8 is bf16
    here. In the buffer if there is one: fresh memory for every block takes longer than the arithmetic on it.

    On a CPU the sums of bf16 are rounded to bf16 once more: torch has no product there that returns float32.
    """
    out = None if buffer is None else buffer.view(a, len(a), b.shape[1])
    if not is_low(products):
        with _switch(products):
            return torch.addmm(a.new_zeros(1), a, b, beta=0, alpha=scale, out=out)
    low = _low(a, b)
    return (low.to(a.dtype) if out is None else out.copy_(low)).mul_(scale)


def _switch(products: Rounding) -> AbstractContextManager[None]:
    """torch's switch for a product of numbers in their own type: TF32 where it is wanted, else as it is."""
    return matmul_precision("high") if products == "tf32" else nullcontext()


def add_product(out: Tensor, a: Tensor, b: Tensor, products: Rounding) -> None:
    """out += a @ b, where a and b may be operands. On a GPU the product of bf16 itself adds, in float32."""
    if not is_low(products):
        with _switch(products):
            out.addmm_(a, b)
    elif out.device.type == "cuda" and out.dtype == torch.float32 and not torch.compiler.is_compiling():
        torch.addmm(out, a.to(LOW), b.to(LOW), out_dtype=torch.float32, out=out)
    else:
        out.add_(_low(a, b))


def _low(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.to(LOW), b.to(LOW)
    return torch.mm(a, b, out_dtype=torch.float32) if a.device.type == "cuda" else torch.mm(a, b)
