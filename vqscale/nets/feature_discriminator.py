"""A discriminator on the features of a frozen vision transformer: what tells images and reconstructions apart is seen
in features of all depths, and small networks learn it, one for each depth.

Not here: the frozen network (vision.py), which is no part of this module, and what the answers are trained for.
"""

from __future__ import annotations

from torch import Tensor, nn

from vqscale.nets.config.vision import FeatureDiscriminatorConfig
from vqscale.nets.discriminators import Answer, Gather, alone
from vqscale.nets.vision import Held


class FeatureDiscriminator(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> for each depth an answer, a number a feature (B, 1, H // stride, W // stride).

    Gradients pass the frozen network to the images.
    """

    def __init__(self, config: FeatureDiscriminatorConfig, gather: Gather = alone) -> None:
        super().__init__()
        self.config, self._vision = config, Held(config.vision)
        self.parts = nn.ModuleList(_part(config.vision.width, config.channels) for _ in config.layers)

    def forward(self, images: Tensor) -> list[Answer]:
        height, width = (side // self.config.stride for side in images.shape[2:])
        features = self._vision(images, (height, width), self.config.layers)
        return [Answer(part(maps)) for part, maps in zip(self.parts, features, strict=True)]


def _part(width: int, channels: int) -> nn.Module:
    """A look at each feature, one at its neighbours, and a number."""
    return nn.Sequential(
        nn.Conv2d(width, channels, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(channels, 1, 1),
    )
