"""The settings of discriminators, and which there are, without torch. What they answer is in discriminators.py."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vqscale.config import OneOf
from vqscale.nets.config import miscounted

# One line for each discriminator: its name in a config, and where its settings are.
DISCRIMINATORS = {
    "patchgan": "vqscale.nets.config.discriminators:PatchGANConfig",
    "features": "vqscale.nets.config.vision:FeatureDiscriminatorConfig",
    "wave": "vqscale.nets.waves.config_discriminator:WaveDiscriminatorConfig",
}

PatchMean = Literal["before", "after"]
DiscriminatorLoss = Literal["hinge", "nonsaturating", "least_squares"]
GeneratorLoss = Literal["hinge", "clipped_hinge", "nonsaturating", "least_squares"]


@dataclass(frozen=True)
class Objective:
    """What one answer is trained for, and the generator from it: the formulas are in train/adversarial_losses.py."""

    discriminator: DiscriminatorLoss
    generator: GeneratorLoss
    weight: float
    """of the generator's loss, and of matching features"""
    discriminator_weight: float
    discriminator_patch_mean: PatchMean = "after"
    generator_patch_mean: PatchMean = "after"


class DiscriminatorSettings:
    """What the settings of every discriminator say beside their keys."""

    name: str
    module: ClassVar[str]
    """the discriminator's class, as `module:Class`"""
    shows_features: ClassVar[bool] = False
    """whether its answers come with feature maps"""

    @property
    def num_answers(self) -> int:
        """Parts, each of which gives an answer."""
        return 1

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """Of each answer, where the discriminator says it itself; (): all are alike, as the losses of a run say."""
        return ()

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
        yield from miscounted(self, ("channels", "num_layers", "num_groups", "in_channels"))
        if self.norm == "group" and self.num_groups > 0 and 2 * self.channels % self.num_groups:
            yield (
                "num_groups",
                f"{self.num_groups} groups do not divide {2 * self.channels} channels, which the first norm has: "
                "change num_groups or channels",
            )
