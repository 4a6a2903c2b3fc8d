"""The settings of the vision transformers of UViM: of the net vit, which tokenizes dense labels, and of the image
encoder of its stage 2. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Literal

from vqscale.config import Free
from vqscale.nets.config import NetSettings, miscounted


@dataclass(frozen=True)
class VitConfig(NetSettings):
    """Encoder and decoder of UViM's stage 1, which both see an image, their context; by default of the published size.

    A sample has a channel for each number of `labels`: of class numbers 0 .. labels - 1, or (1) of values. What comes
    out has so many channels for each: logits of the classes, or values.
    """

    module: ClassVar[str] = "vqscale.nets.vit:build"
    takes_context: ClassVar[bool] = True
    name: Literal["vit"] = "vit"
    """which network"""
    labels: tuple[int, ...] = (256,)
    """classes of each channel, 1 for a channel of values: depth [256], panoptic [134, 100], color [1, 1, 1]"""
    image_size: int = 512
    """pixels of both sides of samples and contexts, for positions are learned"""
    patch: int = 16
    """squares of patch x patch pixels are tokens of the transformers"""
    bottleneck: int = 2
    """tokens of the transformers per id, along each side: the grid is shrunk by it after the encoder"""
    width: int = 768
    """numbers per token"""
    encoder_layers: int = 6
    """blocks of the encoder"""
    decoder_layers: int = 12
    """blocks of the decoder"""
    num_heads: int = 12
    """heads of every attention; must divide width"""
    mlp_width: int = 3072
    """hidden numbers of the MLP of every block"""
    context_channels: int = 3
    """channels of the context"""
    checkpointing: Free[bool] = False
    """recompute every block in the backward pass: less memory, one more forward pass of time"""

    @property
    def in_channels(self) -> int:  # type: ignore[override]
        return len(self.labels)

    @property
    def strides(self) -> tuple[int, ...]:
        return (self.patch * self.bottleneck,) * 2

    @property
    def strides_from(self) -> str:
        return f"net.patch {self.patch} times net.bottleneck {self.bottleneck}"

    @property
    def only_sides(self) -> tuple[int, ...]:
        return (self.image_size,) * 2

    @property
    def side(self) -> int:
        """Tokens of the transformers along a side."""
        return self.image_size // self.patch

    def groups(self) -> Iterator[tuple[int, int]]:
        """(channels, classes) that have a dense map of their own, in order: each channel of classes, and neighbouring
        channels of values together."""
        for values, found in groupby(self.labels, key=lambda classes: classes == 1):
            numbers = list(found)
            yield from [(len(numbers), 1)] if values else [(1, classes) for classes in numbers]

    def problems(self) -> Iterable[tuple[str, str]]:
        """(key, message) of all that no network can be built from."""
        if not self.labels or min(self.labels) < 1:
            yield (
                "labels",
                f"labels are {list(self.labels)}: give the number of classes of each channel of a sample, such as "
                "[256], and 1 for a channel of values",
            )
        counts = ("patch", "bottleneck", "encoder_layers", "decoder_layers", "context_channels")
        yield from miscounted(self, (*counts, *VIT_COUNTS))
        yield from uneven(self, self.patch * self.bottleneck, f"patch {self.patch} x bottleneck {self.bottleneck}")


@dataclass(frozen=True)
class ImageEncoderConfig:
    """A vision transformer over images of one size, by default that of UViM's "large" design."""

    channels: int = 3
    """channels of an image"""
    image_size: int = 512
    """pixels of both sides, for positions are learned"""
    patch: int = 16
    """squares of patch x patch pixels are tokens"""
    pool: int = 1
    """tokens per vector that comes out, along each side: their mean"""
    width: int = 1024
    """numbers per token"""
    num_layers: int = 24
    """blocks of attention and MLP"""
    num_heads: int = 16
    """heads of every attention; must divide width"""
    mlp_width: int = 4096
    """hidden numbers of the MLP of every block"""
    checkpointing: Free[bool] = False
    """recompute every block in the backward pass: less memory, one more forward pass of time"""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image."""
        return self.channels, self.image_size, self.image_size

    @property
    def num_vectors(self) -> int:
        """Of an image, that come out."""
        return (self.image_size // (self.patch * self.pool)) ** 2

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from miscounted(self, ("channels", "patch", "pool", "num_layers", *VIT_COUNTS))
        yield from uneven(self, self.patch * self.pool, f"patch {self.patch} x pool {self.pool}")


VIT_COUNTS = ("image_size", "width", "num_heads", "mlp_width")


def uneven(config: Any, step: int, made_of: str) -> Iterable[tuple[str, str]]:
    """What does not divide: an image into steps of so many pixels, the width into heads."""
    if step >= 1 and config.image_size % step:
        yield (
            "image_size",
            f"image_size {config.image_size} cannot be cut into squares of {step} pixels ({made_of}): change one of "
            "these",
        )
    if config.num_heads >= 1 and config.width % config.num_heads:
        yield (
            "num_heads",
            f"{config.num_heads} heads do not divide a width of {config.width}: change num_heads or width",
        )
