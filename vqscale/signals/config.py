"""The settings of signals, which signals there are, and the distances that they are trained for. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vqscale.config import Free, OneOf, load_class
from vqscale.data.config import MEDIA, MediumConfig
from vqscale.nets.config import NetConfig

# One line for each signal: its name in a config, and where its settings are.
SIGNALS = {
    "images": "vqscale.signals.config:ImagesSignal",
    "depth": "vqscale.signals.config_dense:DepthSignal",
    "color": "vqscale.signals.config_dense:ColorSignal",
    "panoptic": "vqscale.signals.config_dense:PanopticSignal",
    "sounds": "vqscale.signals.config_sounds:SoundsSignal",
}

LEAST_PERCEPTUAL = 16  # pixels of a side, which LPIPS halves four times


@dataclass(frozen=True)
class PerceptualConfig:
    """LPIPS with VGG16, of files that you fetch: nothing is downloaded at run time."""

    vgg: Free[str]
    """path of torchvision's ImageNet VGG16, vgg16-397923af.pth"""
    heads: Free[str]
    """path of the linear heads of LPIPS 0.1 for VGG, vgg.pth"""
    vgg_sha256: str | None = "397923af"
    """first digits of the sha256 that the file vgg must have; null checks nothing"""
    heads_sha256: str | None = None
    """first digits of the sha256 that the file heads must have; null checks nothing"""
    weight: float = 1.0
    """weight of the mean LPIPS distance of images and reconstructions"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.weight <= 0:
            yield (
                "weight",
                f"weight is {self.weight}: use a positive number, or perceptual: null to train without LPIPS",
            )
        for key in ("vgg_sha256", "heads_sha256"):
            digits = getattr(self, key)
            if digits is not None and (not digits or set(digits.lower()) - set("0123456789abcdef")):
                yield (
                    key,
                    f"{key} is {digits!r}, no digits of a sha256: use hexadecimal digits, or null to check nothing",
                )


@dataclass(frozen=True)
class DistanceConfig:
    """How far a reconstruction is from its sample: what the signal knows of what a tokenizer is trained for."""

    reconstruction: str = "l2"
    """distance of samples, by a name that the signal has: l1 or l2 of images, mel or mels of sounds"""
    reconstruction_weight: float = 1.0
    """its weight"""
    perceptual: PerceptualConfig | None = None
    """LPIPS, of images; null trains without it"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.reconstruction_weight <= 0:
            yield (
                "reconstruction_weight",
                f"reconstruction_weight is {self.reconstruction_weight}, and nothing else trains the decoder: "
                "use a positive number",
            )


class SignalSettings:
    """What the settings of every signal say beside their keys."""

    name: str
    module: ClassVar[str]
    """the signal's class, as `module:Class`"""
    media: ClassVar[tuple[str, ...]]
    """the media (data.config.MEDIA, by kind) whose samples it takes"""
    distances: ClassVar[tuple[str, ...]]
    """names for loss.reconstruction"""
    perceptual: ClassVar[bool] = False
    """whether LPIPS can say how near two of it are"""
    returns_samples: ClassVar[bool] = True
    """whether the decoder gives back what entered in its form, so that a discriminator can tell the two apart"""

    @property
    def labels(self) -> tuple[int, ...] | None:
        """Of each channel that enters the encoder the number of its classes, 1 for values, where the net has a map of
        its own for each (net.labels); None where it has not."""
        return None

    def net_misfits(self, net: NetConfig) -> Iterable[tuple[str, str]]:
        """(key of a tokenizer, message) of what in its net is not for this signal."""
        labels = getattr(net, "labels", None)
        if labels != self.labels:
            wants = "a net without labels" if self.labels is None else f"one with labels {list(self.labels)}"
            yield (
                "net",
                f"signal {self.name} is for {wants}, and the net {net.name} has "
                f"{'none' if labels is None else list(labels)}: change net or signal",
            )

    def misfits(self, medium: MediumConfig, loss: DistanceConfig) -> Iterable[tuple[str, str]]:
        """(key of a run, message) of what in a run's data and losses is not for this signal."""
        if medium.kind not in self.media:
            yield (
                "data.train",
                f"the shards hold {medium.kind}, and tokenizer.signal {self.name} takes {' or '.join(self.media)}: "
                "change data.train or tokenizer.signal",
            )
        if loss.reconstruction not in self.distances:
            yield (
                "loss.reconstruction",
                f"expected {' | '.join(self.distances)}, the distances of tokenizer.signal {self.name}, found "
                f"{loss.reconstruction}: choose one of them",
            )
        if loss.perceptual is not None and not self.perceptual:
            yield "loss.perceptual", f"LPIPS is for images, and tokenizer.signal is {self.name}: use perceptual: null"


if TYPE_CHECKING:
    SignalConfig = SignalSettings
else:
    SignalConfig = OneOf(SIGNALS)


@dataclass(frozen=True)
class ImagesSignal(SignalSettings):
    """Images that become images again: an autoencoder without context."""

    module: ClassVar[str] = "vqscale.signals.images:Images"
    media: ClassVar[tuple[str, ...]] = ("images",)
    distances: ClassVar[tuple[str, ...]] = ("l1", "l2")
    perceptual: ClassVar[bool] = True
    name: Literal["images"] = "images"
    """which signal"""

    def misfits(self, medium: MediumConfig, loss: DistanceConfig) -> Iterable[tuple[str, str]]:
        yield from super().misfits(medium, loss)
        size = medium.least_side
        if loss.perceptual is not None and size < LEAST_PERCEPTUAL:
            yield (
                "loss.perceptual",
                f"LPIPS halves the side of an image four times, and data.train.image_size is {size}: use images of "
                f"at least {LEAST_PERCEPTUAL} pixels, or loss.perceptual: null",
            )


def seen(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings of samples, as the file of a run has them, those that ids depend on; what is not said, or is
    nothing, is left out."""
    medium = MEDIA.get(str(given.get("medium", "images")))
    keys = load_class(medium).seen if medium else ()
    return {key: given[key] for key in keys if given.get(key)}
