"""The settings of discriminators, and which there are, without torch. What they answer is in discriminators.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vqscale.config import OneOf

# One line for each discriminator: its name in a config, and where its settings are.
DISCRIMINATORS = {"patchgan": "vqscale.nets.config_discriminators:PatchGANConfig"}


class DiscriminatorSettings:
    """What the settings of every discriminator say beside their keys."""

    name: str
    module: ClassVar[str]
    """the discriminator's class, as `module:Class`"""
    num_answers: ClassVar[int] = 1
    """parts, each of which gives an answer"""

    @property
    def least_side(self) -> int:
        """The smallest side of a sample of which it has something to say."""
        raise NotImplementedError


if TYPE_CHECKING:
    DiscriminatorConfig = DiscriminatorSettings
else:
    DiscriminatorConfig = OneOf(DISCRIMINATORS)


@dataclass(frozen=True)
class PatchGANConfig(DiscriminatorSettings):
    """PatchGAN: 4x4 convolutions, num_layers of stride 2 and two of stride 1; by default the published one."""

    module: ClassVar[str] = "vqscale.nets.patchgan:PatchGAN"
    name: Literal["patchgan"] = "patchgan"
    """which network"""
    channels: int = 64
    """channels of the first layer; each layer doubles them, up to eight times"""
    num_layers: int = 3
    """layers that halve the side"""
    norm: Literal["batch", "group", "sync"] = "batch"
    """batch norm over this process's images, group norm, or sync: batch norm over the images of all processes"""
    num_groups: int = 32
    """for norm group: groups, of which twice the channels of the first layer have a whole number"""
    in_channels: int = 3
    """channels of an image"""

    @property
    def least_side(self) -> int:
        """The smallest side of an image of which one patch is left."""
        return 3 * 2**self.num_layers

    def problems(self) -> Iterable[tuple[str, str]]:
        for key in ("channels", "num_layers", "num_groups", "in_channels"):
            if getattr(self, key) < 1:
                yield key, f"{key} is {getattr(self, key)}, but a network has at least 1 of them: raise {key}"
        if self.norm == "group" and self.num_groups > 0 and 2 * self.channels % self.num_groups:
            yield (
                "num_groups",
                f"{self.num_groups} groups do not divide {2 * self.channels} channels, which the first norm has: "
                "change num_groups or channels",
            )
