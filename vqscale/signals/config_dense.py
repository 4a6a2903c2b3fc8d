"""The settings of the signals that have a label for every pixel, and of colour: what is tokenized of an image that
encoder and decoder both see. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from vqscale.config import Free
from vqscale.data.config import MediumConfig
from vqscale.data.config_dense import DepthConfig, PanopticConfig
from vqscale.signals.config import DistanceConfig, SignalSettings

DepthPrediction = Literal["argmax", "expectation"]


@dataclass(frozen=True)
class DepthSignal(SignalSettings):
    """Depth as a class of each pixel, a bin of metres; the image is the context."""

    module: ClassVar[str] = "vqscale.signals.depth:Depth"
    media: ClassVar[tuple[str, ...]] = (DepthConfig.kind,)
    distances: ClassVar[tuple[str, ...]] = ("cross_entropy",)
    returns_samples: ClassVar[bool] = False
    name: Literal["depth"] = "depth"
    """which signal"""
    num_bins: int = 256
    """classes, bins of equal width between near_m and far_m; 0 is also what is missing"""
    near_m: float = 1e-3
    """metres where the first bin begins"""
    far_m: float = 10.0
    """metres where the last bin ends; what is farther is trained as the last bin, and not measured"""
    predict: Free[DepthPrediction] = "argmax"
    """metres of an output: the centre of the likeliest bin, or the mean of all centres by their probability"""

    @property
    def labels(self) -> tuple[int, ...]:
        return (self.num_bins,)

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.num_bins < 2:
            yield "num_bins", f"num_bins is {self.num_bins}, but bin 0 is what is missing: use at least 2"
        if not 0 < self.near_m < self.far_m:
            yield (
                "near_m",
                f"bins lie between near_m {self.near_m} and far_m {self.far_m}: use metres with 0 < near_m < far_m",
            )


@dataclass(frozen=True)
class ColorSignal(SignalSettings):
    """The colours of an image whose luminance is the context."""

    module: ClassVar[str] = "vqscale.signals.color:Color"
    media: ClassVar[tuple[str, ...]] = ("images",)
    distances: ClassVar[tuple[str, ...]] = ("l1", "l2")
    name: Literal["color"] = "color"
    """which signal"""

    @property
    def labels(self) -> tuple[int, ...]:
        return 1, 1, 1


@dataclass(frozen=True)
class PanopticSignal(SignalSettings):
    """The class and the instance of each pixel, two classes; the image is the context."""

    module: ClassVar[str] = "vqscale.signals.panoptic:Panoptic"
    media: ClassVar[tuple[str, ...]] = (PanopticConfig.kind,)
    distances: ClassVar[tuple[str, ...]] = ("cross_entropy",)
    returns_samples: ClassVar[bool] = False
    name: Literal["panoptic"] = "panoptic"
    """which signal"""
    num_things: int = 80
    """categories of things, classes 1 to num_things; class 0 is void"""
    num_stuff: int = 53
    """categories of stuff, the classes after those of things"""
    num_instances: int = 100
    """instance numbers, of which 0 is void; segments of an image beyond them are not trained, and counted"""
    semantics_weight: float = 1.0
    """weight of the cross entropy of classes"""
    instances_weight: float = 1.0
    """weight of the cross entropy of instance numbers"""
    min_fraction: Free[float] = 0.0
    """predicted instances with no larger share of the pixels become void"""

    @property
    def num_classes(self) -> int:
        return 1 + self.num_things + self.num_stuff

    @property
    def labels(self) -> tuple[int, ...]:
        return self.num_classes, self.num_instances

    def problems(self) -> Iterable[tuple[str, str]]:
        for key, least in (("num_things", 0), ("num_stuff", 0), ("num_instances", 2)):
            if getattr(self, key) < least:
                yield key, f"{key} is {getattr(self, key)}: use at least {least}"
        if self.num_classes < 2:
            yield "num_things", "there are 0 categories of things and 0 of stuff: give at least one of them"
        for key in ("semantics_weight", "instances_weight"):
            if getattr(self, key) <= 0:
                yield key, f"{key} is {getattr(self, key)}, and nothing else trains this output: use a positive number"
        if not 0 <= self.min_fraction < 1:
            yield "min_fraction", f"min_fraction is {self.min_fraction}, but a share of the pixels lies in [0, 1)"

    def misfits(self, medium: MediumConfig, loss: DistanceConfig) -> Iterable[tuple[str, str]]:
        yield from super().misfits(medium, loss)
        counts = medium.counts() if isinstance(medium, PanopticConfig) else None
        if counts not in (None, (self.num_things, self.num_stuff)):
            yield (
                "tokenizer.signal.num_things",
                f"data.train has categories of {counts[0]} things and {counts[1]} stuff, and tokenizer.signal is for "
                f"num_things {self.num_things} and num_stuff {self.num_stuff}: change these, or the shards",
            )
