"""Whether a frame of a wave is voiced, and F1 of that between a clip and its reconstruction.

Published numbers come from CREPE, a network of 22 million parameters that takes 15 seconds of a processor for a second
of sound. This is a light measure of the same thing, by autocorrelation, with the range of pitch, the hop and the level
of silence that are published: numbers of it compare with one another, not with those of CREPE.

A frame is voiced where its middle 40 ms, not quieter than -60 dB, are found again one period later: where their
normalised correlation with what stands 1/550 to 1/50 s later reaches 0.5 at some lag between two that lie lower. The
last condition leaves out hisses, whose neighbouring samples are alike at every short lag.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Wave = NDArray[np.float32]

LOWEST_HZ, HIGHEST_HZ = 50, 550
SILENT_DB = -60.0  # root mean square, of 1; published: A-weighted
_HOPS_PER_S = 100
_WINDOW_S = 0.04
_PERIODIC = 0.5


def f1(wave: Wave, recon: Wave, rate: int) -> float:
    """2 both / (voiced in wave + voiced in recon), counted in frames. ValueError where neither has a voiced frame."""
    first, second = voiced(wave, rate), voiced(recon, rate)
    count = int(first.sum() + second.sum())
    if not count:
        raise ValueError("no frame is voiced")
    return 2 * int((first & second).sum()) / count


def voiced(wave: Wave, rate: int) -> NDArray[np.bool_]:
    """Of every frame of 10 ms; those too near the end for a window and the longest period are left out."""
    window, longest = round(_WINDOW_S * rate), rate // LOWEST_HZ + 1
    hop, span = rate // _HOPS_PER_S, window + longest
    if len(wave) < span:
        return np.zeros(0, np.bool_)
    frames = np.lib.stride_tricks.sliding_window_view(wave.astype(np.float64), span)[::hop]
    correlation = _correlations(frames, window)
    loud = np.square(frames[:, :window]).mean(1) >= 10 ** (SILENT_DB / 10)
    inner, begin = correlation[:, 1:-1], rate // HIGHEST_HZ
    peaks = (inner >= correlation[:, :-2]) & (inner > correlation[:, 2:]) & (inner >= _PERIODIC)
    return loud & peaks[:, begin - 1 :].any(1)


def _correlations(frames: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """(frames, span) -> (frames, span - window + 1): normalised correlation of the first `window` samples with as many
    that begin at each lag. 0 where these are silent."""
    span = frames.shape[1]
    size = 1 << (span + window - 1).bit_length()
    first = np.fft.rfft(frames[:, :window], size).conj()
    products = np.fft.irfft(np.fft.rfft(frames, size) * first, size)[:, : span - window + 1]
    sums = np.pad(np.cumsum(np.square(frames), axis=1), ((0, 0), (1, 0)))
    energy = np.maximum(sums[:, window:] - sums[:, : span - window + 1], 0)
    both = np.sqrt(energy[:, :1] * energy)
    return np.divide(products, both, out=np.zeros_like(products), where=both > 1e-12)
