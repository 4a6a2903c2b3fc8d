"""The signal sounds: what is encoded is what comes out, (B, 1, T) with values about [-1, 1], and there is no context.

The distance mel is as the published SimVQ tokenizers of speech have it: the mean over this rank's values of
|log max(M x, 1e-7) - log max(M y, 1e-7)|, M x the mel bands of magnitudes. The distance mels is ours, of bands of
several widths (metrics/sound.py). Both are in float32 whatever the autocast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqscale.disk import wav
from vqscale.metrics.reconstruction import to_bytes
from vqscale.metrics.sound import MelBands, SoundScores, SpeechMeasures, mel_distance, mels_distance
from vqscale.parallel.mesh import Mesh
from vqscale.show import spectrograms
from vqscale.show.pictures import Picture
from vqscale.signals import Distance, Distances, Signal, Sums
from vqscale.signals.config import DistanceConfig
from vqscale.signals.config_sounds import SoundsSignal
from vqscale.signals.summed import Summed


def bands(config: SoundsSignal) -> MelBands:
    """The mel bands of a config."""
    return MelBands(config.sample_rate, config.mel_window, config.mel_hop, config.num_mels)


class Sounds(Signal):
    """Sounds without context."""

    def enter(self, samples: Tensor) -> tuple[Tensor, ...]:
        return (samples,)

    def distances(self, config: DistanceConfig, mesh: Mesh) -> Distances:
        apart = self._apart(config.reconstruction)

        def of(
            output: Tensor, samples: Tensor, autocast: Callable[[], AbstractContextManager[Any]]
        ) -> dict[str, Distance]:
            if output.shape != samples.shape:  # a longer wave would be compared with nothing
                raise ValueError(
                    f"sounds are {tuple(samples.shape)} and their reconstructions {tuple(output.shape)}: train on "
                    "windows whose length is a multiple of the hop of the net"
                )
            value = apart(samples.flatten(0, 1), output.flatten(0, 1)).mean()
            return {config.reconstruction: Distance(config.reconstruction_weight, value)}

        return of

    def _apart(self, name: str) -> Callable[[Tensor, Tensor], Tensor]:
        of = self.config
        if name == "mel":
            return functools.partial(mel_distance, bands=bands(of))
        return functools.partial(mels_distance, rate=of.sample_rate, windows=of.mels_windows, quiet=of.quiet)

    def predict(self, output: Tensor) -> Tensor:
        return output.float().clamp(-1, 1)

    def sums(self, mesh: Mesh, measures: SpeechMeasures | None = None) -> Sums:
        """Distances of spectra and SI-SDR; with measures those of speech too."""
        return Summed(SoundScores(bands(self.config), measures, mesh.device), mesh)

    def picture(self, samples: Tensor, predicted: Tensor) -> Picture:
        """Mel spectra of originals, below each its reconstruction's."""
        return spectrograms.grid(*(bands(self.config)(waves.flatten(0, 1)) for waves in (samples, predicted)))

    def stored(self, drawn: Tensor) -> NDArray[np.int16]:
        """int16 (B, T)."""
        return (self.predict(drawn)[:, 0] * 32767).round().to(torch.int16).cpu().numpy()

    def tiles(self, stored: NDArray[np.int16]) -> Tensor:
        return to_bytes(spectrograms.coloured(bands(self.config)(torch.from_numpy(stored) / 32767)))

    def file(self, stored: NDArray[np.int16]) -> tuple[str, bytes]:
        return "wav", wav.encoded(stored, self.config.sample_rate)
