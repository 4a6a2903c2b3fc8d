"""Made weights of a small frozen vision transformer, by the names of DINOv2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SIZES = {"patch": 4, "width": 8, "num_layers": 3, "num_heads": 2, "mlp_width": 12, "image_size": 20}
BLOCK = {
    "norm1.weight": (8,),
    "norm1.bias": (8,),
    "attn.qkv.weight": (24, 8),
    "attn.qkv.bias": (24,),
    "attn.proj.weight": (8, 8),
    "attn.proj.bias": (8,),
    "ls1.gamma": (8,),
    "norm2.weight": (8,),
    "norm2.bias": (8,),
    "mlp.fc1.weight": (12, 8),
    "mlp.fc1.bias": (12,),
    "mlp.fc2.weight": (8, 12),
    "mlp.fc2.bias": (8,),
    "ls2.gamma": (8,),
}


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    shapes = {"cls_token": (1, 1, 8), "pos_embed": (1, 26, 8), "mask_token": (1, 8), "norm.weight": (8,)}
    shapes |= {"patch_embed.proj.weight": (8, 3, 4, 4), "patch_embed.proj.bias": (8,), "norm.bias": (8,)}
    shapes |= {f"blocks.{n}.{name}": shape for n in range(3) for name, shape in BLOCK.items()}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def write(path: Path, **changes: torch.Tensor | None) -> dict[str, Any]:
    """A file, with other tensors or without some (None); the settings of a VisionConfig that has it."""
    given = {name: x for name, x in (state() | changes).items() if x is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(given, path)
    return {"weights": str(path), **SIZES}
