"""The settings of the net image_vit: vision transformers as encoder and decoder of images. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from vqscale.config import Free
from vqscale.nets.config import NetSettings, miscounted
from vqscale.nets.config.vit import uneven


@dataclass(frozen=True)
class ImageVitConfig(NetSettings):
    """A vision transformer from images to latents, one per patch, and another one back; by default ViT-B twice."""

    module: ClassVar[str] = "vqscale.nets.image_vit:build"
    name: Literal["image_vit"] = "image_vit"
    """which network"""
    patch: int = 16
    """squares of patch x patch pixels are tokens"""
    width: int = 768
    """numbers per token"""
    encoder_layers: int = 12
    """blocks of the encoder"""
    decoder_layers: int = 12
    """blocks of the decoder"""
    num_heads: int = 12
    """heads of every attention; must divide width"""
    mlp_width: int = 3072
    """hidden numbers of the MLP of every block"""
    positions: Literal["sines", "learned"] = "sines"
    """what tells places apart: sines of row and column, for any sides, or learned numbers, for image_size alone"""
    image_size: int = 256
    """for learned positions: pixels of both sides of images"""
    in_channels: int = 3
    """channels of an image"""
    checkpointing: Free[bool] = False
    """recompute every block in the backward pass: less memory, one more forward pass of time"""

    @property
    def strides(self) -> tuple[int, ...]:
        return (self.patch,) * 2

    @property
    def strides_from(self) -> str:
        return f"net.patch {self.patch}"

    @property
    def only_sides(self) -> tuple[int, ...] | None:
        return (self.image_size,) * 2 if self.positions == "learned" else None

    @property
    def num_places(self) -> int:
        """Places that have learned positions; 0 where these are sines."""
        return (self.image_size // self.patch) ** 2 if self.positions == "learned" else 0

    def problems(self) -> Iterable[tuple[str, str]]:
        """(key, message) of all that no network can be built from."""
        counts = ("patch", "width", "encoder_layers", "decoder_layers", "num_heads", "mlp_width", "in_channels")
        yield from miscounted(self, (*counts, "image_size"))
        step = self.patch if self.positions == "learned" else 1
        yield from uneven(self, step, f"patch {self.patch}")
        if self.positions == "sines" and self.width % 4:
            yield (
                "width",
                f"width is {self.width}, and sines and cosines of rows and of columns are four equal parts of it: use "
                "a multiple of 4, or positions: learned",
            )
