"""What every launch of a fused kernel needs: operands in one type, the grid with its tiles and parts, the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vqscale.codes.gpu import tiles
from vqscale.codes.gpu.tiles import Kernel


class Operands:
    """Tokens and codes as the products read them: bfloat16 if asked for or if both are, else float32; contiguous."""

    def __init__(self, x_BD: Tensor, keys_kD: Tensor, bias_k: Tensor | None, low: bool) -> None:
        low = low or x_BD.dtype == keys_kD.dtype == torch.bfloat16
        self.dtype = torch.bfloat16 if low else torch.float32
        self.x, self.c = self.of(x_BD), self.of(keys_kD)
        # Where there is no bias the kernels get a pointer that they do not read.
        self.bias = self.x if bias_k is None else bias_k.float().contiguous()
        self.has_bias = bias_k is not None
        self.num, self.rows, self.dim = len(x_BD), len(keys_kD), x_BD.shape[1]

    def of(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).contiguous()


class Launch:
    """The grid of a kernel whose programs keep tiles of one side and walk over parts of the other."""

    def __init__(self, kernel: Kernel, given: Operands, wide: bool = False) -> None:
        tile = tiles.tile(kernel, given.dim, given.dtype.itemsize, wide)
        if tiles.keeps_codes(kernel):
            count, length, block = -(-given.rows // tile.codes), given.num, tile.tokens
        else:
            count, length, block = -(-given.num // tile.tokens), given.rows, tile.codes
        programs = tiles.programs(given.x.device)
        self.parts, self.per_part = tiles.parts(count, length, block, programs)
        self.grid, self.codes = (count, self.parts), tile.codes
        self.options = {
            "HAS_BIAS": given.has_bias,
            "BLOCK_N": tile.tokens,
            "BLOCK_K": tile.codes,
            "BLOCK_D": tiles.padded(given.dim),
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


def on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def is_same(keys_kD: Tensor, values_kD: Tensor) -> bool:
    """The keys are the values, in the same memory: a program then loads them once."""
    return keys_kD.data_ptr() == values_kD.data_ptr() and keys_kD.stride() == values_kD.stride()
