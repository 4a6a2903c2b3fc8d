"""How a colored picture compares with the true one: PSNR, and chroma, of both, as sums over a data set on many ranks.

PSNR rewards gray averages: what is uncertain is best painted as the mean of what it may be. So how colorful the
predictions are stands beside it, and how colorful the truth is. FID is of metrics/fid.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(images: Tensor, predicted: Tensor) -> Tensor:
    """PSNR of each image in decibels: (B, C, H, W) twice, in [-1, 1], -> (B,) float64.

    10 log10(4 / m), m the mean squared difference of one image's values, which are clamped to [-1, 1] and not rounded,
    as colorization is measured (metrics/reconstruction.py rounds to 8 bits). An image that is met exactly counts as if
    one of its values were off by an 8-bit step.
    """
    x, y = images.double().clamp(-1, 1), predicted.double().clamp(-1, 1)
    error = (x - y).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=(1 / 127.5) ** 2 / x.shape[1:].numel()))


def chroma(images: Tensor) -> Tensor:
    """Mean over pixels of max(R, G, B) - min(R, G, B), values brought to [0, 1]: (B, 3, H, W) in [-1, 1] -> (B,)
    float64, 0 for gray pictures."""
    values = images.double().clamp(-1, 1)
    return ((values.amax(1) - values.amin(1)) / 2).flatten(1).mean(1)


class Colors:
    """Sums over the images of this rank, made so that adding the `sums()` of all ranks gives the data set's.

        total = ops.sum_over(colors.sums(), mesh.world)
        Colors.from_sums(total)   # {"psnr": 24.1, "chroma": 0.12, "true_chroma": 0.14, "images": 5000.0}

    Nothing is communicated here. Every image counts once.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, samples: Tensor, predicted: Tensor) -> None:
        """Count (B, 3, H, W) images in [-1, 1] and what was predicted of them."""
        values = torch.stack([psnr(samples, predicted), chroma(predicted), chroma(samples)])
        self._sums[0] += len(samples)
        self._sums[1:] += values.sum(1)

    def sums(self) -> Tensor:
        """(4,) float64 of this rank: images, sums of PSNR, of the predictions' chroma and of the truth's."""
        return self._sums.clone()

    @staticmethod
    def from_sums(sums: Tensor) -> dict[str, float]:
        """Means from sums, of one rank or added over ranks; nan where there was no image."""
        images, *totals = sums.tolist()
        mean = 1 / images if images else float("nan")
        names = ("psnr", "chroma", "true_chroma")
        return {name: total * mean for name, total in zip(names, totals, strict=True)} | {"images": images}
