"""How many sounds the classifier of drawn sounds takes for the class they are of: recordings, what a tokenizer makes of
them, and noise; and of samples.

    recognised_real      share of the recordings that it names right: what can be reached
    recognised           the same of their reconstructions
    recognised_noise     the same of noise of each recording's own mean spectrum: what needs no tokenizer
    recognised_samples   share of what a prior drew that it takes for the class it was drawn as

It knows sounds made by data/made/sounds.py alone. Not here: the network (an argument) and its training
(train/classifiers.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from vqscale.data.made.sounds import CLASS_NAMES, draw
from vqscale.metrics.classifiers import BATCH, Classifier
from vqscale.metrics.sound import MelBands
from vqscale.metrics.spectra import magnitudes
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.seed import derive

NUM_CLASSES = len(CLASS_NAMES)
OF = ("recognised_real", "recognised", "recognised_noise")
_WINDOW = 1024  # samples over which a mean spectrum is taken


def bands(config: Any) -> MelBands:
    """The mel bands that a SoundsClassifierConfig looks at."""
    return MelBands(config.sample_rate, config.mel_window, config.mel_hop, config.num_mels)


def spectra(numbers: list[int], config: Any) -> tuple[Tensor, Tensor]:
    """(mel bands (n, num_mels, frames), classes) of the sounds with these numbers of the classifier's endless set."""
    length, seed = round(config.seconds * config.sample_rate), derive("sounds classifier", config.seed)
    drawn = [draw(number, length, config.sample_rate, seed) for number in numbers]
    waves = torch.from_numpy(np.stack([wave for wave, _ in drawn])) / 32768
    return bands(config)(waves), torch.tensor([label for _, label in drawn])


def noise_like(wave_T: Tensor, seed: int) -> Tensor:
    """Noise of the mean spectrum and the level of a wave (T,), drawn by the seed."""
    white = torch.randn(len(wave_T), generator=torch.Generator().manual_seed(seed)).to(wave_T)
    mean = magnitudes(wave_T[None], _WINDOW, _WINDOW // 4).square().mean(-1).sqrt()
    shape = F.interpolate(mean[None], len(wave_T) // 2 + 1, mode="linear", align_corners=True)[0, 0]
    noise = torch.fft.irfft(torch.fft.rfft(white) * shape, len(wave_T))
    return noise * wave_T.norm() / noise.norm().clamp_min(1e-9)


def named(classifier: Classifier, wave_BT: Tensor) -> Tensor:
    """The class that each of these waves (B, T) on the classifier's device is taken for."""
    return classifier(bands(classifier.config)(wave_BT))[1].argmax(1)


class Recognised:
    """How many of the sounds of this rank are taken for their class; nothing is communicated before `numbers`."""

    def __init__(self, classifier: Classifier, mesh: Mesh) -> None:
        self.classifier, self.mesh = classifier, mesh
        self._right = torch.zeros(len(OF) + 1, NUM_CLASSES, dtype=torch.float64)  # the last row: how many there are

    def add(self, wave_T: Tensor, recon_T: Tensor, label: int, seed: int) -> None:
        """Count a recording of a class, its reconstruction, and noise like it."""
        for row, wave in enumerate((wave_T, recon_T, noise_like(wave_T, seed))):
            self._right[row, label] += named(self.classifier, wave[None]).item() == label
        self._right[-1, label] += 1

    def numbers(self) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """(the shares, the shares of each class there is); the same on every rank. Collective."""
        *right, count = ops.sum_over(self._right.to(self.mesh.device), self.mesh.world).cpu()
        by_class = {
            name: {of: float(row[label] / count[label]) for of, row in zip(OF, right, strict=True)}
            for label, name in enumerate(CLASS_NAMES)
            if count[label]
        }
        return {of: float(row.sum() / count.sum()) for of, row in zip(OF, right, strict=True)}, by_class


def of_samples(
    kept: NDArray[np.int16], labels: NDArray[np.int64], classifier: Classifier, whose: str
) -> dict[str, float]:
    """recognised_samples, the share of what a prior drew (N, T) that is taken for the class it was drawn as; nothing
    where it was drawn without."""
    of_class = labels >= 0
    if not of_class.any():
        return {}
    check_labels(labels[of_class], whose)
    waves, right = torch.from_numpy(kept[of_class]).float() / 32767, 0
    for some, told in zip(waves.split(BATCH), torch.from_numpy(labels[of_class]).split(BATCH), strict=True):
        right += int((named(classifier, some).cpu() == told).sum())
    return {"recognised_samples": right / len(waves), "samples": len(waves)}


def check_labels(labels: NDArray[np.integer], whose: str) -> None:
    """ValueError where these are not classes of drawn sounds."""
    if len(labels) and (labels.min() < 0 or labels.max() >= NUM_CLASSES):
        none = int((labels < 0).sum())
        said = f"{none} of {len(labels)} have none" if none else f"one is of class {labels.max()}"
        raise ValueError(
            f"the sounds classifier knows the classes 0 .. {NUM_CLASSES - 1} ({', '.join(CLASS_NAMES)}), and of "
            f"{whose} {said}: give drawn sounds with their classes, or leave --classifier out"
        )


def check_rate(rate: int, config: Any, whose: str) -> None:
    """ValueError where sounds of this rate are none that the classifier of this config knows."""
    if rate != config.sample_rate:
        raise ValueError(
            f"{whose} has {rate} samples per second, and this sounds classifier was trained on {config.sample_rate}: "
            f"train one with `vqscale classifier --medium sounds --sample-rate {rate}`"
        )
