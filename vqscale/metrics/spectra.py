"""Spectra of waves: the magnitudes of a short-time Fourier transform, and the logarithm of their mel bands.

In float32 or better whatever the autocast. Gradients are finite for silence: that of a magnitude is 0 at 0, and below
the floor the logarithm has none.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from vqscale.metrics.mel import corners, empty_bands


def magnitudes(wave_BT: Tensor, n_fft: int, hop: int) -> Tensor:
    """|STFT| under a periodic Hann window, centred, with mirrored ends: (B, T) -> (B, n_fft / 2 + 1, T // hop + 1).

    A wave too short to be mirrored is padded with zeros at its end.
    """
    wave_BT = wave_BT if wave_BT.dtype == torch.float64 else wave_BT.float()
    wave_BT = F.pad(wave_BT, (0, max(0, n_fft // 2 + 1 - wave_BT.shape[-1])))
    window = torch.hann_window(n_fft, dtype=wave_BT.dtype, device=wave_BT.device)
    return torch.stft(wave_BT, n_fft, hop, window=window, return_complex=True).abs()


@functools.lru_cache(maxsize=32)
def mel_filters(
    rate: int, n_fft: int, count: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    """(count, n_fft / 2 + 1): triangles from 0 to rate / 2 whose corners lie evenly on the mel scale, their tops at 1.

    Kept where they are: a copy to a device waits for it. ValueError where a triangle meets no bin of the transform.
    """
    if empty_bands(rate, n_fft, count):
        raise ValueError(
            f"{count} mel bands up to {rate // 2} Hz are too many for a window of {n_fft} samples, some meet no "
            "frequency of it: lower num_mels or raise mel_window"
        )
    with torch.inference_mode(False):  # kept for gradients too
        at = torch.tensor(corners(rate, count), dtype=torch.float64)
        bins = torch.arange(n_fft // 2 + 1, dtype=torch.float64) * (rate / n_fft)
        low, top, high = (at[n : n + count, None] for n in range(3))
        filters = torch.minimum((bins - low) / (top - low), (high - bins) / (high - top)).clamp_min(0)
        return filters.to(device, dtype, non_blocking=True)


def log_mel(wave_BT: Tensor, rate: int, n_fft: int, hop: int, count: int, floor: float = 1e-7) -> Tensor:
    """Natural logarithm of the mel bands of magnitudes, not below log(floor): (B, T) -> (B, count, T // hop + 1)."""
    return _mel(wave_BT, rate, n_fft, hop, count).clamp_min(floor).log()


def soft_log_mel(wave_BT: Tensor, rate: int, n_fft: int, hop: int, count: int, quiet: float) -> Tensor:
    """The same of each band plus `quiet`, which bends where log_mel's floor breaks: bands below it have a gradient."""
    return (_mel(wave_BT, rate, n_fft, hop, count) + quiet).log()


def _mel(wave_BT: Tensor, rate: int, n_fft: int, hop: int, count: int) -> Tensor:
    found = magnitudes(wave_BT, n_fft, hop)
    with torch.autocast(found.device.type, enabled=False):
        return mel_filters(rate, n_fft, count, found.dtype, found.device) @ found
