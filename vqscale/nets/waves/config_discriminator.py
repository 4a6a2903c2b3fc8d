"""The settings of the discriminator of waves, without torch. What it answers is in discriminator.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Literal

from vqscale.nets.config.discriminators import DiscriminatorSettings, Objective

WaveLoss = Literal["hinge", "least_squares"]


class PartSettings:
    """What the settings of every part say beside their keys."""

    loss: WaveLoss
    weight: float

    @property
    def num_answers(self) -> int:
        raise NotImplementedError

    @property
    def least_side(self) -> int:
        """The shortest wave of which it has something to say, in samples."""
        raise NotImplementedError

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The papers sum the losses of both sides, of which the house takes the mean: twice the weight."""
        weight = self.weight / self.num_answers
        generator: Literal["clipped_hinge", "least_squares"] = (
            "clipped_hinge" if self.loss == "hinge" else "least_squares"
        )
        return (Objective(self.loss, generator, weight, 2 * weight),) * self.num_answers

    def problems(self) -> Iterable[tuple[str, str]]:
        for key in ("periods", "channels", "windows", "period_channels"):
            found = getattr(self, key, None)
            numbers = (found,) if isinstance(found, int) else found
            if numbers is not None and (not numbers or min(numbers) < 1):
                yield key, f"{key} is {found}, but takes numbers of at least 1, one for each: change {key}"
        if self.weight <= 0:
            yield "weight", f"weight is {self.weight}: use a positive number, or null for this part"


@dataclass(frozen=True)
class PeriodsConfig(PartSettings):
    """HiFi-GAN's: the wave as rows of a period, judged along its columns; an answer for each period."""

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    """samples of a row"""
    channels: tuple[int, ...] = (32, 128, 512, 1024, 1024)
    """channels of the convolutions; all but the last have stride 3"""
    loss: WaveLoss = "hinge"
    """what the answers are trained for, and the tokenizer from them: relu(1 - D), relu(1 + D), or squares"""
    weight: float = 1.0
    """weight of the mean over the answers, of both players' losses and of feature matching"""

    @property
    def num_answers(self) -> int:
        return len(self.periods)

    @property
    def least_side(self) -> int:
        return max(self.periods)


@dataclass(frozen=True)
class ResolutionsConfig(PartSettings):
    """UnivNet's: magnitudes of a short-time Fourier transform; an answer for each window."""

    windows: tuple[int, ...] = (1024, 2048, 512)
    """samples of a window, of which a hop is a quarter"""
    channels: int = 64
    """channels of every convolution"""
    loss: WaveLoss = "hinge"
    """as for periods"""
    weight: float = 1.0
    """as for periods"""

    @property
    def num_answers(self) -> int:
        return len(self.windows)

    @property
    def least_side(self) -> int:
        return max(self.windows) // 2 + 1

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        yield from _window_problems(self.windows)


@dataclass(frozen=True)
class NormalisedConfig(PartSettings):
    """DAC's: the wave at peak 0.8, in periods and in bands of complex spectra; an answer for each period and window."""

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    """samples of a row"""
    period_channels: tuple[int, ...] = (32, 128, 512, 1024, 1024)
    """channels of the convolutions over periods; all but the last have stride 3"""
    windows: tuple[int, ...] = (2048, 1024, 512)
    """samples of a window, of which a hop is a quarter"""
    band_ends: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75)
    """where a band of frequencies ends and the next begins, as shares of all; each band has its own convolutions"""
    channels: int = 32
    """channels of every convolution over bands"""
    peak_floor: float = 1e-3
    """added to the peak of a wave before it is divided by it: the gradient to a silent wave is at most 0.8 over this;
    published: 1e-9"""
    loss: WaveLoss = "least_squares"
    """as for periods"""
    weight: float = 8.0
    """as for periods; 8 makes the mean over the eight published answers their sum"""

    @property
    def num_answers(self) -> int:
        return len(self.periods) + len(self.windows)

    @property
    def least_side(self) -> int:
        return max(*self.periods, max(self.windows) // 2) + 1

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        yield from _window_problems(self.windows)
        ends = (0.0, *self.band_ends, 1.0)
        if any(first >= second for first, second in pairwise(ends)):
            yield (
                "band_ends",
                f"band_ends are {list(self.band_ends)}, but bands begin where the last one ends, between 0 and 1: give "
                "growing shares between them",
            )
        elif self.windows and any(not all(bands(window, self.band_ends)) for window in self.windows):
            yield (
                "band_ends",
                f"a window of {min(self.windows)} samples leaves some band of {list(self.band_ends)} without a "
                "frequency: use longer windows or wider bands",
            )
        if self.peak_floor <= 0:
            yield "peak_floor", f"peak_floor is {self.peak_floor}, by which silence is divided: use a positive number"


def bands(window: int, ends: tuple[float, ...]) -> list[range]:
    """The frequencies of each band."""
    count = window // 2 + 1
    edges = [int(share * count) for share in (0.0, *ends, 1.0)]
    return [range(first, last) for first, last in pairwise(edges)]


def _window_problems(windows: tuple[int, ...]) -> Iterable[tuple[str, str]]:
    if any(window < 4 or window % 4 for window in windows):
        yield "windows", f"windows are {list(windows)}, but a hop is a quarter of one: use multiples of 4"


@dataclass(frozen=True)
class WaveDiscriminatorConfig(DiscriminatorSettings):
    """The discriminators of the published SimVQ tokenizers of speech as one: 84.2 M parameters in sixteen parts. Each
    part says itself what its answers are trained for: the losses in loss.adversarial are not for it."""

    module: ClassVar[str] = "vqscale.nets.waves.discriminator:WaveDiscriminator"
    shows_features: ClassVar[bool] = True
    name: Literal["wave"] = "wave"
    """which network"""
    periods: PeriodsConfig | None = field(default_factory=PeriodsConfig)
    """of the wave in periods; null is none"""
    resolutions: ResolutionsConfig | None = field(default_factory=ResolutionsConfig)
    """of magnitudes; null is none"""
    normalised: NormalisedConfig | None = field(default_factory=NormalisedConfig)
    """of the wave at one peak; null is none"""

    def parts(self) -> Iterator[PartSettings]:
        """In the order of their answers."""
        yield from (part for part in (self.periods, self.resolutions, self.normalised) if part is not None)

    @property
    def num_answers(self) -> int:
        return sum(part.num_answers for part in self.parts())

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return tuple(objective for part in self.parts() for objective in part.objectives)

    @property
    def least_side(self) -> int:
        """The shortest wave of which it has something to say, in samples."""
        return max(part.least_side for part in self.parts())

    def problems(self) -> Iterable[tuple[str, str]]:
        if not any(self.parts()):
            yield "periods", "all parts of the discriminator are null: give one of periods, resolutions and normalised"
