"""How near reconstructions are to their sounds: distances of spectra, SI-SDR, and of speech F1 of voicing, and PESQ
and STOI where their packages are installed; sums that add over clips and ranks.

Every clip counts once, however long it is. The measures of speech have no value for some clips (silent, too short,
without a voice): these are counted, and are in no mean. UTMOS is left out, because what computes it is not light:
fairseq and two files of weights.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqscale.metrics import spectra, voicing
from vqscale.metrics.spectra import magnitudes

Wave = NDArray[np.float32]
Measure = Callable[
    [Wave, Wave, int], float
]  # of a clip, its reconstruction and their rate; ValueError where it has none

STFT_WINDOWS = (2048, 1024, 512)
_FLOOR = 1e-5
_PESQ_RATE = 16000


@dataclass(frozen=True)
class MelBands:
    """Which mel bands: of a transform of so many samples, this far apart, at a rate."""

    rate: int
    window: int
    hop: int
    count: int

    def __call__(self, wave_BT: Tensor) -> Tensor:
        """(B, T) -> log of the bands (B, count, frames)."""
        return spectra.log_mel(wave_BT, self.rate, self.window, self.hop, self.count)


def mel_distance(wave_BT: Tensor, recon_BT: Tensor, bands: MelBands) -> Tensor:
    """Mean |log-mel - log-mel| of each clip: (B,)."""
    return (bands(wave_BT) - bands(recon_BT)).abs().flatten(1).mean(1)


def mels_distance(wave_BT: Tensor, recon_BT: Tensor, rate: int, windows: Sequence[int], quiet: float) -> Tensor:
    """Mean |d| of each clip, d = log(M x + quiet) - log(M y + quiet), a mean over the windows: (B,).

    M are the mel bands of magnitudes, one for every 16 samples of a window, a quarter of it apart. Few wide bands say
    about where a lone tone lies long before the narrow ones can; of narrow bands alone, those that hold nothing are so
    many more that the least distance of who knows not where the tone is leaves it out.
    """
    of_windows = []
    for size in windows:
        x, y = (spectra.soft_log_mel(wave, rate, size, size // 4, size // 16, quiet) for wave in (wave_BT, recon_BT))
        of_windows.append((x - y).abs().flatten(1).mean(1))
    return torch.stack(of_windows).mean(0)


def stft_distance(wave_BT: Tensor, recon_BT: Tensor) -> Tensor:
    """Mean |log10 max(magnitude, 1e-5) - the same| of each clip, a mean over windows of 2048, 1024, 512: (B,).

    Hann windows, a quarter of each between them.
    """
    of_windows = []
    for size in STFT_WINDOWS:
        x, y = (magnitudes(wave, size, size // 4).clamp_min(_FLOOR).log10() for wave in (wave_BT, recon_BT))
        of_windows.append((x - y).abs().flatten(1).mean(1))
    return torch.stack(of_windows).mean(0)


def si_sdr(wave_BT: Tensor, recon_BT: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio of each clip in dB: (B,), float64, nan for a clip that is constant.

    Both with their means taken off: 10 log10(|p|^2 / |y - p|^2), p the projection of y on x. Between -100 and 100.
    """
    x, y = (wave.double() - wave.double().mean(1, keepdim=True) for wave in (wave_BT, recon_BT))
    energy = x.square().sum(1, keepdim=True)
    projected = (x * y).sum(1, keepdim=True) / energy * x
    kept, lost = projected.square().sum(1), (y - projected).square().sum(1)
    ratio = (10 * (kept / lost).log10()).nan_to_num(-100, posinf=100, neginf=-100).clamp(-100, 100)
    return torch.where(energy[:, 0] > 0, ratio, torch.nan)


def pesq(wave: Wave, recon: Wave, rate: int) -> float:
    """Wide-band PESQ (ITU-T P.862.2), both at 16 kHz. ValueError for clips that it has no value for."""
    from pesq import PesqError, pesq

    try:
        with np.errstate(invalid="ignore"):  # it divides silence by its largest value
            return float(pesq(_PESQ_RATE, *(_at(x, rate, _PESQ_RATE) for x in (wave, recon)), "wb"))
    except (PesqError, ZeroDivisionError) as error:
        raise ValueError(str(error)) from None


def stoi(wave: Wave, recon: Wave, rate: int) -> float:
    """Short-time objective intelligibility, not extended. ValueError for clips of too little sound."""
    from pystoi import stoi

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(stoi(wave, recon, rate))
        except RuntimeWarning as error:
            raise ValueError(str(error)) from None


def _at(wave: Wave, rate: int, wanted: int) -> Wave:
    if rate == wanted:
        return wave
    import soxr

    found: Wave = soxr.resample(wave, rate, wanted)
    return found


_OF_PACKAGES: dict[str, tuple[Measure, tuple[str, ...]]] = {
    "pesq": (pesq, ("pesq", "soxr")),
    "stoi": (stoi, ("pystoi",)),
    "voicing_f1": (voicing.f1, ()),
}


@dataclass(frozen=True)
class SpeechMeasures:
    """The measures of speech whose packages are installed, and a line for each that is left out."""

    measures: dict[str, Measure]
    left_out: tuple[str, ...]

    @classmethod
    def installed(cls) -> SpeechMeasures:
        found, missing = dict[str, Measure](), []
        for name, (measure, packages) in _OF_PACKAGES.items():
            try:
                for package in packages:
                    importlib.import_module(package)
                found[name] = measure
            except ImportError as error:
                missing.append(f"{name} is left out ({error}): pip install 'vqscale[audio]'")
        return cls(found, tuple(missing))


class SoundScores:
    """Sums over the clips of this rank, made so that adding the `sums()` of all ranks gives the data set's.

        total = ops.sum_over(scores.sums(), mesh.world)
        scores.from_sums(total)      # {"mel": 0.41, "stft": ..., "si_sdr": ..., "images": 512.0}

    Nothing is communicated here.
    """

    def __init__(self, bands: MelBands, speech: SpeechMeasures | None = None, device: Any = "cpu") -> None:
        self.bands, self.measures = bands, speech.measures if speech else {}
        self._clips, self._distances = 0, torch.zeros(2, dtype=torch.float64, device=device)
        # of each of the others: sum and number of the clips that have a value
        self._others = {name: torch.zeros(2, dtype=torch.float64) for name in ("si_sdr", *self.measures)}

    def add(self, waves: Tensor, recon: Tensor) -> None:
        """Count clips (B, 1, T) and reconstructions, which are cut to the clips' length where they are longer."""
        x_BT, y_BT = waves.flatten(0, 1), recon[..., : waves.shape[-1]].flatten(0, 1)
        if not len(x_BT):
            return
        self._clips += len(x_BT)
        both = torch.stack([mel_distance(x_BT, y_BT, self.bands), stft_distance(x_BT, y_BT)])
        self._distances += both.double().sum(1)
        for ratio in si_sdr(x_BT, y_BT).tolist():
            self._count("si_sdr", ratio)
        for x, y in zip(x_BT.float().cpu().numpy(), y_BT.float().cpu().numpy(), strict=True):
            for name, measure in self.measures.items():
                try:
                    self._count(name, measure(x, y, self.bands.rate))
                except ValueError:
                    continue

    def _count(self, name: str, value: float) -> None:
        if np.isfinite(value):
            self._others[name] += torch.tensor([value, 1.0], dtype=torch.float64)

    def sums(self) -> Tensor:
        """float64: clips, the two distances, then sum and number of each other measure, of this rank."""
        clips = torch.tensor([self._clips], dtype=torch.float64)
        others = [pair.to(self._distances.device) for pair in self._others.values()]
        return torch.cat([clips.to(self._distances.device), self._distances, *others])

    def from_sums(self, sums: Tensor) -> dict[str, float]:
        """Means from sums, of one rank or added over ranks; nan where no clip had a value. `NAME_without` are the clips
        that a measure of speech has no value for."""
        clips, mel, stft, *others = sums.tolist()
        found = {"mel": _mean(mel, clips), "stft": _mean(stft, clips)}
        for number, name in enumerate(self._others):
            total, count = others[2 * number : 2 * number + 2]
            found[name] = _mean(total, count)
            if name in self.measures:
                found[f"{name}_without"] = clips - count
        return found | {"images": clips}


def _mean(total: float, count: float) -> float:
    return total / count if count else float("nan")
