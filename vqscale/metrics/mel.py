"""The mel scale as HTK has it, and the corners of bands on it. No torch here."""

from __future__ import annotations

import math


def mel(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)


def corners(rate: int, count: int) -> list[float]:
    """In Hz, count + 2 from 0 to rate / 2, evenly on the scale: band n is a triangle over three, from the n-th on."""
    highest = mel(rate / 2)
    return [700 * (10 ** (highest * n / (count + 1) / 2595) - 1) for n in range(count + 2)]


def empty_bands(rate: int, n_fft: int, count: int) -> int:
    """How many bands meet no bin of a transform of n_fft samples."""
    at = [corner * n_fft / rate for corner in corners(rate, count)]
    return sum(math.floor(low) + 1 >= high for low, high in zip(at, at[2:], strict=False))
