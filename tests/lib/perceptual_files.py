"""Made files of weights for LPIPS: the names and shapes of the published ones, values from a seed."""

from __future__ import annotations

from pathlib import Path

import torch

# the convolutions of VGG16 in torchvision's numbering: (number in features, channels in, channels out)
CONVOLUTIONS = (
    *((0, 3, 64), (2, 64, 64)),
    *((5, 64, 128), (7, 128, 128)),
    *((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    *((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    *((24, 512, 512), (26, 512, 512), (28, 512, 512)),
)
HEADS = (64, 128, 256, 512, 512)


def states(seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(VGG16 with its classifier, made small; heads); the scale of activations is kept from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    vgg = {}
    for number, wide, out in CONVOLUTIONS:
        vgg[f"features.{number}.weight"] = torch.randn(out, wide, 3, 3, generator=generator) * (2 / (9 * wide)) ** 0.5
        vgg[f"features.{number}.bias"] = torch.randn(out, generator=generator) * 0.1
    for number in (0, 3, 6):
        vgg |= {f"classifier.{number}.weight": torch.zeros(2, 3), f"classifier.{number}.bias": torch.zeros(2)}
    heads = {
        f"lin{number}.model.1.weight": torch.rand(1, wide, 1, 1, generator=generator)
        for number, wide in enumerate(HEADS)
    }
    return vgg, heads


def write(folder: Path) -> tuple[Path, Path]:
    """FOLDER/vgg16.pth and FOLDER/heads.pth."""
    folder.mkdir(parents=True, exist_ok=True)
    for state, name in zip(states(), ("vgg16.pth", "heads.pth"), strict=True):
        torch.save(state, folder / name)
    return folder / "vgg16.pth", folder / "heads.pth"
