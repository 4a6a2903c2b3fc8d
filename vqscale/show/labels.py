"""Labels of pixels as pictures: depth in a perceptual map of colours, segments in a colour each with their borders."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0.6180339887498949


def depth(metres: Tensor, farthest: float) -> Tensor:
    """(B, H, W) -> uint8 (B, 3, H, W): viridis from near, bright, to `farthest`, dark; black where it is 0, missing."""
    import matplotlib  # lazily: it costs half a second

    share = 1 - (metres.cpu().float() / farthest).clamp(0, 1)
    colours = matplotlib.colormaps["viridis"](share.numpy(), bytes=True)[..., :3].copy()
    colours[(metres == 0).cpu().numpy()] = 0
    return torch.from_numpy(colours).permute(0, 3, 1, 2)


def segments(classes: Tensor, instances: Tensor) -> Tensor:
    """Two (B, H, W) of whole numbers -> uint8 (B, 3, H, W): a hue for each class, a lightness for each instance, white
    borders; black where the class is 0.
    """
    hue = (classes.cpu().double() * _GOLDEN) % 1
    light = 0.45 + 0.5 * ((instances.cpu().double() * _GOLDEN) % 1)
    phases = torch.tensor([0.0, 1 / 3, 2 / 3], dtype=torch.float64).view(1, 3, 1, 1)
    colours = light[:, None] * (0.6 + 0.4 * torch.cos(2 * np.pi * (hue[:, None] - phases)))
    colours = torch.where(classes.cpu()[:, None] == 0, 0.0, colours)
    segment = classes.cpu() * (int(instances.max()) + 1) + instances.cpu()
    return torch.where(_borders(segment)[:, None], 255, (colours * 255).round()).to(torch.uint8)


def _borders(segment: Tensor) -> Tensor:
    """Where the segment on the right or below is another."""
    borders = torch.zeros_like(segment, dtype=torch.bool)
    borders[:, :, :-1] |= segment.diff(dim=2) != 0
    borders[:, :-1] |= segment.diff(dim=1) != 0
    return borders
