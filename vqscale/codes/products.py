"""How blocks of numbers are multiplied: in their own type, or rounded to bfloat16 with float32 sums between blocks.

What torch is set to (torch.set_float32_matmul_precision, by engine.matmul) says which is wanted, the machine which is
worth it. Logits are not multiplied here, but for a prior's head that asks for it: ids and softmaxes keep the precision
of the rows.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from vqscale.codes.config import Products
from vqscale.codes.scan import Buffer

LOW = torch.bfloat16


@torch.compiler.assume_constant_result
def wanted(device_type: str, dtype: torch.dtype) -> Products:
    """bf16 where torch is set to multiply float32 numbers as bfloat16 and the device does so faster, else fp32."""
    low = torch.get_float32_matmul_precision() == "medium" and dtype != torch.float64
    return "bf16" if low and (device_type == "cuda" or (device_type == "cpu" and fast_on_cpu())) else "fp32"


def fast_on_cpu() -> bool:
    """Whether this CPU multiplies bfloat16 (AVX512-BF16 or AMX), and torch lets it."""
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled) and _has_instructions()


@cache
def _has_instructions() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def operand(a: Tensor, products: Products, buffer: Buffer | None = None) -> Tensor:
    """`a` as `product` reads it, for operands that are read more than once; in the buffer if there is one."""
    if products == "fp32" or a.dtype == LOW:
        return a
    if buffer is None:
        return a.to(LOW)
    tokens, rows = a.shape
    return buffer.view(a, tokens, rows, dtype=LOW).copy_(a)


def product(a: Tensor, b: Tensor, products: Products, scale: float = 1.0, buffer: Buffer | None = None) -> Tensor:
    """scale * a @ b in the type of a. With bf16 the operands are rounded to bf16 and the sums are float32. In the
    buffer if there is one: fresh memory for every block takes longer than the arithmetic on it.

    On a CPU the sums of bf16 are rounded to bf16 once more: torch has no product there that returns float32.
    """
    out = None if buffer is None else buffer.view(a, len(a), b.shape[1])
    if products == "fp32":
        return torch.addmm(a.new_zeros(1), a, b, beta=0, alpha=scale, out=out)
    low = _low(a, b)
    return (low.to(a.dtype) if out is None else out.copy_(low)).mul_(scale)


def add_product(out: Tensor, a: Tensor, b: Tensor, products: Products) -> None:
    """out += a @ b, where a and b may be operands."""
    if products == "fp32":
        out.addmm_(a, b)
    else:
        out.add_(_low(a, b))


def _low(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.to(LOW), b.to(LOW)
    return torch.mm(a, b, out_dtype=torch.float32) if a.device.type == "cuda" else torch.mm(a, b)
