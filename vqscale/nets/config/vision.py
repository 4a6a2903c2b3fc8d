"""The settings of a frozen vision transformer whose features others learn from, and of a discriminator on them. No
torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from vqscale.config import Free
from vqscale.nets.config import miscounted
from vqscale.nets.config.discriminators import DiscriminatorSettings
from vqscale.nets.config.vit import VIT_COUNTS, uneven


@dataclass(frozen=True)
class VisionConfig:
    """A plain vision transformer with the weights of a file that you fetch, by the names of DINOv2; the defaults are
    the size of dinov2_vitb14."""

    weights: Free[str]
    """path of the weights, .safetensors or .pth"""
    sha256: str | None = None
    """first digits of the sha256 that the file must have; null checks nothing"""
    patch: int = 14
    """squares of patch x patch pixels are tokens"""
    width: int = 768
    """numbers per token"""
    num_layers: int = 12
    """blocks of attention and MLP"""
    num_heads: int = 12
    """heads of every attention; must divide width"""
    mlp_width: int = 3072
    """hidden numbers of the MLP of every block"""
    image_size: int = 518
    """pixels of both sides of the images that its positions were learned for; for others they are interpolated"""

    def problems(self) -> Iterable[tuple[str, str]]:
        """(key, message) of all that no network can be built from."""
        yield from miscounted(self, ("patch", "num_layers", *VIT_COUNTS))
        yield from uneven(self, self.patch, f"patch {self.patch}")


@dataclass(frozen=True)
class FeatureDiscriminatorConfig(DiscriminatorSettings):
    """A discriminator on features of a frozen vision transformer: after each of some blocks a small network that is
    trained, which gives every place a number. The vision transformer learns nothing, and is in no checkpoint."""

    module: ClassVar[str] = "vqscale.nets.feature_discriminator:FeatureDiscriminator"
    vision: VisionConfig
    """the frozen vision transformer"""
    name: Literal["features"] = "features"
    """which network"""
    layers: tuple[int, ...] = (3, 6, 9, 12)
    """blocks, numbered from 1, after which features are taken: one answer each"""
    stride: int = 16
    """pixels of a sample per feature, along each side: samples are resized so that a patch has as many"""
    channels: int = 64
    """channels of each small network"""

    @property
    def num_answers(self) -> int:
        return len(self.layers)

    @property
    def least_side(self) -> int:
        """The smallest side of an image with two features."""
        return 2 * self.stride

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from miscounted(self, ("stride", "channels"))
        last = self.vision.num_layers
        if not self.layers or list(self.layers) != sorted({*self.layers} & {*range(1, last + 1)}):
            yield (
                "layers",
                f"layers are {list(self.layers)}, and vision has blocks 1 to {last} (vision.num_layers): give some of "
                "them, each once, in their order",
            )
