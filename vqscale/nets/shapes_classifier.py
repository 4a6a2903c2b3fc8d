"""The network of the shapes classifier: drawn pictures -> features, and how likely each class is.

It is small enough for a minute's training and judges only pictures like those it was trained on; nothing it says
compares with Inception's features. No statistic of a batch enters, so that a picture's features depend on it alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqscale.nets.config.shapes import ShapesClassifierConfig

GROUPS = 8


class Judged(NamedTuple):
    """Of N pictures."""

    features_ND: Tensor
    logits_NC: Tensor


class ShapesClassifier(nn.Module):
    """uint8 pictures (N, 3, H, W) -> Judged, D = 4 x width; in float32 whatever the autocast.

    A quarter of the pixels enters a stem, then three residual blocks at 1/2, 1/4 and 1/8 of a side; features are means
    over places.
    """

    def __init__(self, config: ShapesClassifierConfig, num_classes: int) -> None:
        super().__init__()
        width = config.width
        self.config, self.num_features = config, 4 * width
        self.stem = nn.Conv2d(3, width, 4, stride=2, padding=1)
        self.blocks = nn.Sequential(
            _Block(width, width, 1), _Block(width, 2 * width, 2), _Block(2 * width, 4 * width, 2)
        )
        self.norm = nn.GroupNorm(GROUPS, 4 * width)
        self.classes = nn.Linear(4 * width, num_classes)

    def forward(self, pictures: Tensor) -> Judged:
        assert pictures.dtype == torch.uint8, f"the shapes classifier takes uint8 pictures, not {pictures.dtype}"
        with torch.autocast(pictures.device.type, enabled=False):
            x = self.stem((pictures.float() - 127.5) / 64)
            features_ND = F.relu(self.norm(self.blocks(x))).mean(dim=(2, 3))
            return Judged(features_ND, self.classes(features_ND))


class _Block(nn.Module):
    """Two convolutions, each after a norm, beside a linear path."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = nn.GroupNorm(GROUPS, channels), nn.GroupNorm(GROUPS, out)
        self.down = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)  # the norm has one
        self.conv = nn.Conv2d(out, out, 3, padding=1)
        self.path = nn.Conv2d(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(F.relu(self.second(self.down(F.relu(self.first(x))))))
        y: Tensor = h + self.path(x)
        return y
