"""The one place that decides which passes over the rows serve a tensor: plain torch in blocks, or fused GPU kernels.

Nothing is computed here. Both have the same signatures, and dense.py judges both.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vqscale.codes import mixing, scan, unmixing

MOST_DIM = 256  # dimensions that a tile of the kernels holds
LEAST_CAPABILITY = (8, 0)  # of the device: products of bfloat16

BLOCKS = SimpleNamespace(
    best=scan.best,
    mix=mixing.mix,
    column_sums=mixing.column_sums,
    row_means=mixing.row_means,
    unmix=unmixing.unmix,
)


def pick(x_BD: Tensor) -> Any:
    """`best`, `mix`, `column_sums`, `row_means` and `unmix` for tokens on x's device, in x's type.

    Fused kernels where products of bfloat16 are wanted (x is bfloat16, or float32 with
    torch.set_float32_matmul_precision("medium")) and can be had: a CUDA device of capability 8.0, Triton, at most 256
    dimensions. Blocks in plain torch elsewhere, in the precision that torch is set to.
    """
    fused = _fused() if _wanted(x_BD) else None
    return BLOCKS if fused is None else fused


def _wanted(x_BD: Tensor) -> bool:
    if not x_BD.is_cuda or x_BD.shape[1] > MOST_DIM:
        return False
    low = x_BD.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
    return (low or x_BD.dtype == torch.bfloat16) and torch.cuda.get_device_capability(x_BD.device) >= LEAST_CAPABILITY


def _fused() -> ModuleType | None:
    """The kernels, or None without Triton (the extra `gpu`)."""
    if importlib.util.find_spec("triton") is None:
        return None
    from vqscale.codes import fused

    return fused
