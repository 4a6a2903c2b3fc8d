"""What a network is made of, without torch: the configs of the nets, and which there are.

Not here: the quantizer between encoder and decoder, and the size of the images, which a convolutional network does not
need to know.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vqscale.config import Free, OneOf

DEEPEST = 10_000
DEPTHS = ("num_blocks", "num_layers", "encoder_layers", "decoder_layers")
# One line for each net: its name in a config, and where its settings are.
NETS = {
    "conv": "vqscale.nets.config:ConvConfig",
    "magvit": "vqscale.nets.config:MagvitConfig",
    "wave": "vqscale.nets.waves.config:WaveConfig",
    "vit": "vqscale.nets.config.vit:VitConfig",
    "image_vit": "vqscale.nets.config.image_vit:ImageVitConfig",
}


class NetSettings:
    """What the settings of every net say beside their keys."""

    name: str
    module: ClassVar[str]
    """what builds it, as `module:function`: build(config, dim) -> Parts"""
    takes_context: ClassVar[bool] = False
    """whether encoder and decoder are given a context beside what they encode and decode"""
    rounds_up: ClassVar[bool] = False
    """whether a side may be any length, what is left at its end being a latent too; else strides divide sides"""
    context_channels: int = 0
    """of a context with the sides of a sample; 0 where there is none, or one of another form"""
    in_channels: int
    """channels of a sample, as it comes in, and mostly as it goes out"""

    @property
    def only_sides(self) -> tuple[int, ...] | None:
        """The sides that samples must have, where the net was made for these; None: any that its strides divide."""
        return None

    @property
    def strides(self) -> tuple[int, ...]:
        """Steps of the sample's side per latent, of each side: their number is the number of sides."""
        raise NotImplementedError

    @property
    def strides_from(self) -> str:
        """Which settings the strides follow from, for messages."""
        raise NotImplementedError


if TYPE_CHECKING:
    NetConfig = NetSettings
else:
    NetConfig = OneOf(NETS)


@dataclass(frozen=True)
class ConvConfig(NetSettings):
    """The convolutional encoder and decoder of the VQGAN family; by default the net of the published IBQ tokenizers.

    Level i works at 1 / (patch * 2**i) of the image's side with channels * multipliers[i] channels. The encoder walks
    the levels upwards with num_blocks residual blocks each, the decoder downwards with one more.
    """

    module: ClassVar[str] = "vqscale.nets.conv:build"
    name: Literal["conv"] = "conv"
    """which network"""
    channels: int = 128
    """channels that a multiplier of 1 stands for"""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """channels of each level, as multiples of channels; every level after the first halves the side"""
    num_blocks: int = 4
    """residual blocks per level of the encoder; the decoder has one more"""
    attention_levels: tuple[int, ...] = (4,)
    """levels (0 is full resolution) in which attention follows every residual block"""
    mid_attention: bool = True
    """attention between the two middle blocks, as in published VQGANs; false for a network without attention"""
    z_channels: int = 256
    """channels that the encoder gives and the decoder takes"""
    num_groups: int = 32
    """groups of every group normalisation; must divide the channels of every level"""
    dropout: float = 0.0
    """dropout inside the residual blocks, in training only"""
    checkpointing: Free[bool] = False
    """recompute every block in the backward pass: less memory, one more forward pass of time"""
    in_channels: int = 3
    """channels of an image"""
    patch: int = 1
    """squares of patch x patch pixels become channels before the first level, and pixels after the last; 1 is off"""

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per latent."""
        return (self.patch * 2 ** (len(self.multipliers) - 1),) * 2

    @property
    def strides_from(self) -> str:
        return f"{len(self.multipliers)} levels in net.multipliers {list(self.multipliers)}"

    def problems(self) -> Iterable[tuple[str, str]]:
        """(key, message) of all that no network can be built from."""
        counts = ("channels", "num_blocks", "z_channels", "num_groups", "in_channels", "patch")
        yield from _pyramid_problems(self, counts)
        last = len(self.multipliers) - 1
        outside = [level for level in self.attention_levels if not 0 <= level <= last]
        if outside:
            yield (
                "attention_levels",
                f"attention is asked for at levels {outside}, but {len(self.multipliers)} multipliers make levels 0 to "
                f"{last}: change attention_levels or multipliers",
            )
        if not 0 <= self.dropout < 1:
            yield "dropout", f"dropout is {self.dropout}, but a share of zeroed values lies in [0, 1): change dropout"


@dataclass(frozen=True)
class MagvitConfig(NetSettings):
    """The convolutional encoder and decoder of the published SimVQ tokenizers; with `adaptive` that of Open-MAGVIT2.

    Level i works at 1 / 2**i of the image's side with channels * multipliers[i] channels. There is no attention and no
    convolution around the quantizer: z_channels is the quantizer's dim.
    """

    module: ClassVar[str] = "vqscale.nets.magvit:build"
    name: Literal["magvit"] = "magvit"
    """which network"""
    channels: int = 128
    """channels that a multiplier of 1 stands for"""
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    """channels of each level, as multiples of channels; every level after the first halves the side"""
    num_blocks: int = 2
    """residual blocks per level and in the middle, in the encoder and in the decoder"""
    z_channels: int = 128
    """channels that the encoder gives and the decoder takes: the dim of the quantizer"""
    num_groups: int = 32
    """groups of every group normalisation; must divide the channels of every level"""
    checkpointing: Free[bool] = False
    """recompute every block in the backward pass: less memory, one more forward pass of time"""
    in_channels: int = 3
    """channels of an image"""
    adaptive: bool = False
    """normalise before each level of the decoder, scaled and shifted by deviation and mean of the image's codes, as in
    Open-MAGVIT2"""

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.channels * multiplier for multiplier in self.multipliers)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels per latent."""
        return (2 ** (len(self.multipliers) - 1),) * 2

    @property
    def strides_from(self) -> str:
        return f"{len(self.multipliers)} levels in net.multipliers {list(self.multipliers)}"

    def problems(self) -> Iterable[tuple[str, str]]:
        """(key, message) of all that no network can be built from."""
        yield from _pyramid_problems(self, ("channels", "num_blocks", "z_channels", "num_groups", "in_channels"))


def miscounted(config: Any, counts: Iterable[str]) -> Iterable[tuple[str, str]]:
    """(key, message) of each of these keys of a network that is below 1, or deeper than anything that can be built."""
    for key in counts:
        count = getattr(config, key)
        if count < 1:
            yield key, f"{key} is {count}, but a network has at least 1 of them: raise {key}"
        elif key in DEPTHS and count > DEEPEST:
            yield key, f"{key} is {count}, and a network has at most {DEEPEST} of them: lower {key}"


def _pyramid_problems(config: ConvConfig | MagvitConfig, counts: tuple[str, ...]) -> Iterable[tuple[str, str]]:
    yield from miscounted(config, counts)
    if not config.multipliers or min(config.multipliers) < 1:
        yield (
            "multipliers",
            f"multipliers are {list(config.multipliers)}, but every level needs channels: give one number of at "
            "least 1 per level, such as [1, 2, 4]",
        )
    # the encoder's first block normalises the plain channels; where they divide, so do all their multiples
    elif config.num_groups >= 1 and config.channels % config.num_groups:
        yield (
            "num_groups",
            f"{config.num_groups} groups do not divide {config.channels} channels, which the first "
            "block normalises: change num_groups or channels",
        )


def grid(net: NetConfig, sides: Sequence[int]) -> tuple[int, ...]:
    """Latents of a sample with these sides, by side. ValueError for a sample that the net cannot cut into latents."""
    if len(sides) != len(net.strides):
        raise ValueError(
            f"the net {net.name} takes samples of {len(net.strides)} sides, and these have {len(sides)} "
            f"({by(sides)}): change tokenizer.net, or give it the samples that it is for"
        )
    if net.only_sides not in (None, tuple(sides)):
        raise ValueError(
            f"the net {net.name} of this config has learned positions for samples of {by(net.only_sides)} (net."
            f"image_size), and these are {by(sides)}: change the size of the samples or the net"
        )
    if not net.rounds_up and any(side % stride for side, stride in zip(sides, net.strides, strict=True)):
        raise ValueError(
            f"samples of {by(sides)} cannot be cut into tokens of {by(net.strides)}, the stride of the "
            f"{net.strides_from}: change the size of the samples or the net"
        )
    return tuple(-(-side // stride) for side, stride in zip(sides, net.strides, strict=True))


def example(net: NetConfig, sides: Sequence[int], count: int = 1) -> list[tuple[int, ...]]:
    """The shapes of what the encoder is given of so many samples with these sides: samples, and a context or none."""
    context = [(count, net.context_channels, *sides)] if net.takes_context else []
    return [(count, net.in_channels, *sides), *context]


def by(numbers: Sequence[int]) -> str:
    """`256 x 256`: sides as people write them."""
    return " x ".join(map(str, numbers))
