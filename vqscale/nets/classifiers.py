"""The networks of the classifiers: drawn pictures, or mel bands of drawn sounds -> features, and how likely a class is.

They are small enough for a minute's training and judge only what is like that which they were trained on; nothing they
say compares with Inception's features. No statistic of a batch enters, so that features depend on one sample alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqscale.nets.config.classifiers import ShapesClassifierConfig, SoundsClassifierConfig

GROUPS, RANGE = 8, 8.0


class Judged(NamedTuple):
    """Of N samples."""

    features_ND: Tensor
    logits_NC: Tensor


class _Classifier(nn.Module):
    """(N, channels, H, W) -> Judged, D = 4 x width; in float32 whatever the autocast.

    A quarter of the places enters a stem, then three residual blocks at 1/2, 1/4 and 1/8 of a side; features are means
    over places.
    """

    def __init__(self, channels: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.num_features = 4 * width
        self.stem = nn.Conv2d(channels, width, 4, stride=2, padding=1)
        self.blocks = nn.Sequential(
            _Block(width, width, 1), _Block(width, 2 * width, 2), _Block(2 * width, 4 * width, 2)
        )
        self.norm = nn.GroupNorm(GROUPS, 4 * width)
        self.classes = nn.Linear(4 * width, num_classes)

    def forward(self, samples: Tensor) -> Judged:
        with torch.autocast(samples.device.type, enabled=False):
            features_ND = F.relu(self.norm(self.blocks(self.stem(self.scaled(samples))))).mean(dim=(2, 3))
            return Judged(features_ND, self.classes(features_ND))

    def scaled(self, samples: Tensor) -> Tensor:
        """What enters the stem, with values of about 1."""
        raise NotImplementedError


class ShapesClassifier(_Classifier):
    """uint8 pictures (N, 3, H, W) -> Judged."""

    def __init__(self, config: ShapesClassifierConfig, num_classes: int) -> None:
        super().__init__(3, config.width, num_classes)
        self.config = config

    def scaled(self, samples: Tensor) -> Tensor:
        assert samples.dtype == torch.uint8, f"the shapes classifier takes uint8 pictures, not {samples.dtype}"
        return (samples.float() - 127.5) / 64


class SoundsClassifier(_Classifier):
    """Natural logarithms of mel bands (N, num_mels, frames) of any number of frames -> Judged.

    How loud a sound is does not matter, nor what lies more than RANGE (70 dB) below its loudest place.
    """

    def __init__(self, config: SoundsClassifierConfig, num_classes: int) -> None:
        super().__init__(1, config.width, num_classes)
        self.config = config

    def scaled(self, samples: Tensor) -> Tensor:
        bands = samples.float()[:, None]
        return (bands - bands.amax((2, 3), keepdim=True)).clamp_min(-RANGE) / 2 + 2


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
