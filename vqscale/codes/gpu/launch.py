"""What every launch of a fused kernel needs: operands in one type, the grid with its tiles and parts, the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vqscale.codes.gpu import tiles
from vqscale.codes.gpu.tiles import Kernel
from vqscale.codes.products import FLOAT8, Rounding, float8


@dataclass(frozen=True)
class Operands:
    """Tokens and codes as the products read them, contiguous, and the bias in float32."""

    x: Tensor
    c: Tensor
    bias: Tensor
    """where there is none, a pointer that the kernels do not read"""
    has_bias: bool
    score_x: Tensor
    score_c: Tensor
    """of the products that are scores: the same, or in float8,"""
    unit: Tensor
    """whose units these are: of a score, of a token, of a code; where there are none, a pointer as above"""

    @classmethod
    def of(cls, x_BD: Tensor, keys_kD: Tensor, bias_k: Tensor | None, products: str) -> Operands:
        """bfloat16 if that is asked for or if both are, else float32; with fp8 float8 for the scores."""
        low = products != "fp32" or x_BD.dtype == keys_kD.dtype == torch.bfloat16
        x, c = (part.to(torch.bfloat16 if low else torch.float32).contiguous() for part in (x_BD, keys_kD))
        bias = x if bias_k is None else bias_k.float().contiguous()
        if products != "fp8":
            return cls(x, c, bias, bias_k is not None, x, c, x)
        (score_x, unit_x), (score_c, unit_c) = (float8(part.float().contiguous()) for part in (x_BD, keys_kD))
        unit = torch.stack([unit_x * unit_c, unit_x, unit_c])
        return cls(x, c, bias, bias_k is not None, score_x, score_c, unit)

    @property
    def num(self) -> int:
        return len(self.x)

    @property
    def rows(self) -> int:
        return len(self.c)

    @property
    def dim(self) -> int:
        return self.x.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def products(self) -> Rounding:
        """Of those that are no scores."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    @property
    def scaled(self) -> bool:
        return self.score_c.dtype == FLOAT8

    @property
    def scores(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What every kernel that makes scores begins with."""
        return self.score_x, self.score_c, self.bias, self.unit

    def like(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).contiguous()

    def values(self, keys_kD: Tensor, values_kD: Tensor) -> Tensor:
        """`c` if the keys are the values, in the same memory: a program loads them once, if scores read them too."""
        same = keys_kD.data_ptr() == values_kD.data_ptr() and keys_kD.stride() == values_kD.stride()
        return self.c if same else self.like(values_kD)

    def block(self, tokens: slice, rows: slice) -> Operands:
        return replace(
            self,
            x=self.x[tokens],
            c=self.c[rows],
            bias=self.bias[rows] if self.has_bias else self.bias,
            score_x=self.score_x[tokens],
            score_c=self.score_c[rows],
        )


class Launch:
    """The grid of a kernel whose programs keep tiles of one side and walk over parts of the other."""

    def __init__(self, kernel: Kernel, given: Operands, wide: bool = False) -> None:
        device = given.x.device
        tile = tiles.tile(kernel, given.dim, given.dtype.itemsize, wide, tiles.capability(device))
        if tiles.keeps_codes(kernel):
            count, length, block = -(-given.rows // tile.codes), given.num, tile.tokens
        else:
            count, length, block = -(-given.num // tile.tokens), given.rows, tile.codes
        self.parts, self.per_part = tiles.parts(count, length, block, tiles.programs(device))
        self.grid, self.codes = (count, self.parts), tile.codes
        self.options = {
            "HAS_BIAS": given.has_bias,
            "SCALED": given.scaled,
            "BLOCK_N": tile.tokens,
            "BLOCK_K": tile.codes,
            "BLOCK_D": tiles.padded(given.dim),
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
