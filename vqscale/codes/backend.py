"""The one place that decides which passes over the rows serve a tensor: plain torch in blocks, or fused GPU kernels.

Both have the same signatures, and dense.py judges both.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from vqscale.codes import products, scan
from vqscale.codes.gpu import tiles
from vqscale.codes.softmax import backward, forward

MOST_DIM = 256  # dimensions that a tile of the kernels holds
LEAST_CAPABILITY = 80  # of the device: products of bfloat16
HAS_TRITON = find_spec("triton") is not None  # the extra `gpu`


@dataclass(frozen=True)
class Passes:
    """Functions with the signatures that scan.py, softmax/forward.py and softmax/backward.py give them."""

    best: Any
    mix: Any
    column_sums: Any
    row_means: Any
    mix_backward: Any


BLOCKS = Passes(scan.best, forward.mix, forward.column_sums, forward.row_means, backward.mix_backward)


def pick(x_BD: Tensor, rounding: products.Rounding = "fp32") -> Passes:
    """The passes for tokens on x's device, in x's type.

    With a CUDA device of capability 8.0, Triton and at most 256 dimensions the search is fused: it is exact in any
    precision. The others are fused where products of bfloat16 are wanted (products.py) or x is bfloat16. Elsewhere
    blocks in plain torch, in the precision torch is set to.
    """
    if not _has_kernels(x_BD):
        return BLOCKS
    from vqscale.codes.gpu import passes

    if x_BD.dtype == torch.bfloat16 or products.is_low(rounding):
        return Passes(passes.best, passes.mix, passes.column_sums, passes.row_means, passes.mix_backward)
    return Passes(passes.best, forward.mix, forward.column_sums, forward.row_means, backward.mix_backward)


def in_blocks(rows_kD: Tensor, mixes: bool = False) -> str | None:
    """Why a search of these rows, or a mixture of them too, is blocks in plain torch: a compiler would unroll them, and
    round their products where torch's switch says so. None where each pass is one operator that keeps its precision."""
    if not _has_kernels(rows_kD):
        least = LEAST_CAPABILITY / 10
        return f"the fused kernels do not serve here (Triton, a GPU of capability {least}, dim up to {MOST_DIM})"
    if mixes and pick(rows_kD, products.wanted(rows_kD.device.type, rows_kD.dtype)).mix is forward.mix:
        return "the softmax over codes is fused with engine.matmul: medium or low alone"
    return None


def readable(rows_kD: Tensor) -> Tensor:
    """The rows of a table as the passes take them: half precision only as the kernels read it, else a float32 copy."""
    full = rows_kD.dtype in (torch.float32, torch.float64) or _has_kernels(rows_kD)
    return rows_kD if full else rows_kD.float()


def _has_kernels(x: Tensor) -> bool:
    if not (x.is_cuda and HAS_TRITON and x.dtype in (torch.float32, torch.bfloat16) and x.shape[1] <= MOST_DIM):
        return False
    return tiles.capability(x.device) >= LEAST_CAPABILITY
