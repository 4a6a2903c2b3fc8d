"""The discriminators of waves: of periods (HiFi-GAN), of magnitudes (UnivNet), and both kinds on the wave brought to
one peak, its spectra complex and in bands (DAC). Every convolution is weight-normed, with a LeakyReLU of 0.1 after all
but the last.

Waves and spectra are float32 whatever the autocast; convolutions follow it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqscale.nets.discriminators import Answer, Gather, alone
from vqscale.nets.waves.config_discriminator import (
    NormalisedConfig,
    PeriodsConfig,
    ResolutionsConfig,
    WaveDiscriminatorConfig,
    bands,
)
from vqscale.nets.waves.weight_norm import NormedConv

Pair = tuple[int, int]
PEAK = 0.8


def _conv(channels: int, out: int, kernel: Pair, stride: Pair = (1, 1)) -> NormedConv:
    """Padded by half its kernel on all sides."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    return NormedConv(nn.Conv2d(channels, out, kernel, stride, padding))


class Stack(nn.Module):
    """Convolutions one after the other: x -> all their activations."""

    def __init__(self, channels: list[int], kernels: list[Pair], strides: list[Pair]) -> None:
        super().__init__()
        sizes = zip(channels[:-1], channels[1:], kernels, strides, strict=True)
        self.convs = nn.ModuleList(_conv(*each) for each in sizes)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            maps.append(x)
        return maps


class Period(nn.Module):
    """Waves (B, 1, T) -> a number per third of a third ... of the rows of each of `period` columns.

    HiFi-GAN's shows the maps from the second on and its answer. DAC's (`normalised`) shows all maps without the answer,
    and lengthens a wave that the period divides by a whole period.
    """

    def __init__(self, period: int, channels: tuple[int, ...], normalised: bool = False) -> None:
        super().__init__()
        self.period, self.normalised = period, normalised
        strides: list[Pair] = [(3, 1)] * (len(channels) - 1) + [(1, 1)]
        self.stack = Stack([1, *channels], [(5, 1)] * len(channels), strides)
        self.post = _conv(channels[-1], 1, (3, 1))

    def forward(self, waves: Tensor) -> Answer:
        rest = waves.shape[-1] % self.period
        missing = self.period - rest if rest or self.normalised else 0
        rows = F.pad(waves, (0, missing), mode="reflect") if missing else waves
        maps = self.stack(rows.unflatten(-1, (-1, self.period)))
        values = self.post(maps[-1])
        return Answer(values, tuple(maps) if self.normalised else (*maps[1:], values))


class Resolution(nn.Module):
    """Waves (B, 1, T) -> numbers for the magnitudes of windows of `window` samples; shows all maps and its answer."""

    kernels: tuple[Pair, ...] = ((7, 5), (5, 3), (5, 3), (3, 3), (3, 3))
    strides: tuple[Pair, ...] = ((2, 2), (2, 1), (2, 2), (2, 1), (2, 2))

    def __init__(self, window: int, channels: int) -> None:
        super().__init__()
        self.window = window
        self.stack = Stack([1, *[channels] * len(self.kernels)], list(self.kernels), list(self.strides))
        self.post = _conv(channels, 1, (3, 3))

    def forward(self, waves: Tensor) -> Answer:
        maps = self.stack(stft(waves, self.window).abs().unsqueeze(1))
        values = self.post(maps[-1])
        return Answer(values, (*maps, values))


class Bands(nn.Module):
    """Waves (B, 1, T) -> numbers for complex spectra, each band of which has convolutions of its own; shows all their
    maps."""

    kernels: tuple[Pair, ...] = ((3, 9), (3, 9), (3, 9), (3, 9), (3, 3))
    strides: tuple[Pair, ...] = ((1, 1), (1, 2), (1, 2), (1, 2), (1, 1))

    def __init__(self, window: int, ends: tuple[float, ...], channels: int) -> None:
        super().__init__()
        self.window, self.bands = window, bands(window, ends)
        sizes = [2, *[channels] * len(self.kernels)]
        self.stacks = nn.ModuleList(Stack(sizes, list(self.kernels), list(self.strides)) for _ in self.bands)
        self.post = _conv(channels, 1, (3, 3))

    def forward(self, waves: Tensor) -> Answer:
        spectra = torch.view_as_real(stft(waves, self.window)).permute(0, 3, 2, 1)  # (B, 2, frames, frequencies)
        parts = [spectra[..., band.start : band.stop] for band in self.bands]
        maps = [stack(part) for stack, part in zip(self.stacks, parts, strict=True)]
        values = self.post(torch.cat([each[-1] for each in maps], dim=-1))
        return Answer(values, tuple(x for each in maps for x in each))


def stft(waves: Tensor, window: int) -> Tensor:
    """(B, 1, T) -> (B, window // 2 + 1, frames) complex: a flat window every quarter of it, the ends mirrored."""
    flat = torch.ones(window, device=waves.device)
    return torch.stft(waves.squeeze(1), window, window // 4, window=flat, return_complex=True)


def normalised(waves: Tensor, floor: float) -> Tensor:
    """Waves without their mean, at a peak of 0.8 where they are not silent."""
    centred = waves - waves.mean(dim=-1, keepdim=True)
    return PEAK * centred / (centred.abs().amax(dim=-1, keepdim=True) + floor)


class Normalised(nn.Module):
    """DAC's discriminator: periods and bands of the wave at one peak."""

    def __init__(self, config: NormalisedConfig) -> None:
        super().__init__()
        self.floor = config.peak_floor
        periods = [Period(period, config.period_channels, normalised=True) for period in config.periods]
        spectra = [Bands(window, config.band_ends, config.channels) for window in config.windows]
        self.parts = nn.ModuleList([*periods, *spectra])

    def forward(self, waves: Tensor) -> list[Answer]:
        level = normalised(waves, self.floor)
        return [part(level) for part in self.parts]


class Group(nn.Module):
    """Parts that look at the wave as it is."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, waves: Tensor) -> list[Answer]:
        return [part(waves) for part in self.parts]


class WaveDiscriminator(nn.Module):
    """Waves (B, 1, T) -> an answer of each part, in the order of the config's objectives. Nothing is gathered."""

    def __init__(self, config: WaveDiscriminatorConfig, gather: Gather = alone) -> None:
        super().__init__()
        self.periods = None if config.periods is None else _periods(config.periods)
        self.resolutions = None if config.resolutions is None else _resolutions(config.resolutions)
        self.normalised = None if config.normalised is None else Normalised(config.normalised)

    def forward(self, waves: Tensor) -> list[Answer]:
        waves = waves.float()
        groups = [group for group in (self.periods, self.resolutions, self.normalised) if group is not None]
        return [answer for group in groups for answer in group(waves)]


def _periods(config: PeriodsConfig) -> Group:
    return Group([Period(period, config.channels) for period in config.periods])


def _resolutions(config: ResolutionsConfig) -> Group:
    return Group([Resolution(window, config.channels) for window in config.windows])
