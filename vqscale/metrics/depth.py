"""How near predicted depth is to its truth, in metres: every error per image over its valid pixels, then the mean over
images, as sums over a data set on many ranks.

The definitions are those of NYU Depth v2's evaluations. One RMSE over the pixels of all images together is another
number: errors of 0 and 2 m in two images are 1.0 here and 1.41 there. Which part of a picture is evaluated differs too:
it is chosen where samples are read (evaluation_crop of data/config_dense.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NEAREST, FARTHEST = 1e-3, 10.0  # metres; a pixel is valid between the two, neither included
ERRORS = ("rmse", "abs_rel", "log10", "delta1", "delta2", "delta3")


def is_valid(truth: Tensor) -> Tensor:
    """Where depth is known and near enough to be evaluated: metres, any shape -> bool."""
    return (truth > NEAREST) & (truth < FARTHEST)


def errors(truth: Tensor, predicted: Tensor) -> Tensor:
    """(images, ERRORS) float64 of metres (B, H, W) twice; nan for an image without a pixel in 1e-3 < truth < 10.

    Over an image's valid pixels, g the truth and p the prediction: rmse = sqrt(mean (p - g)^2), abs_rel = mean
    |p - g| / g, log10 = mean |log10 p - log10 g|, delta_k = share of max(p / g, g / p) < 1.25^k. Predictions below a
    millimetre count as one, for logarithms and ratios need them positive.
    """
    valid = is_valid(truth)
    g, p = truth.double(), predicted.double().clamp(min=NEAREST)
    g = torch.where(valid, g, 1.0)
    pixels = valid.flatten(1).sum(1)

    def mean(values: Tensor) -> Tensor:
        return torch.where(valid, values.double(), 0.0).flatten(1).sum(1) / pixels

    ratio = torch.maximum(p / g, g / p)
    shares = [mean(ratio < 1.25**power) for power in (1, 2, 3)]
    rmse = mean((p - g).square()).sqrt()
    return torch.stack([rmse, mean((p - g).abs() / g), mean((p.log10() - g.log10()).abs()), *shares], 1)


class DepthErrors:
    """Sums over the images of this rank, made so that adding the `sums()` of all ranks gives the data set's.

        total = ops.sum_over(depth.sums(), mesh.world)
        DepthErrors.from_sums(total)   # {"rmse": 0.47, ..., "delta3": 0.98, "images": 654.0, "without_depth": 0.0}

    Nothing is communicated here. Every image with a valid pixel counts once; those without are counted apart.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(2 + len(ERRORS), dtype=torch.float64, device=device)

    def add(self, samples: Tensor, predicted: Tensor) -> None:
        """Count (B, C, H, W) samples and predictions; the last channel of each is metres, 0 where there is no truth.

        A prediction of other sides is brought to those of the truth, each pixel to its nearest.
        """
        truth, predicted = samples[:, -1], predicted[:, -1:]
        if predicted.shape[-2:] != truth.shape[-2:]:
            predicted = F.interpolate(predicted, truth.shape[-2:], mode="nearest-exact")
        found, counted = errors(truth, predicted[:, 0]), is_valid(truth).flatten(1).any(1)
        self._sums[0] += counted.sum()
        self._sums[1] += (~counted).sum()
        self._sums[2:] += found[counted].sum(0)

    def sums(self) -> Tensor:
        """(8,) float64 of this rank: images counted, images without a valid pixel, the sum of each of ERRORS."""
        return self._sums.clone()

    @staticmethod
    def from_sums(sums: Tensor) -> dict[str, float]:
        """Means from sums, of one rank or added over ranks; nan where no image had a valid pixel."""
        images, without, *totals = sums.tolist()
        mean = 1 / images if images else float("nan")
        means = {name: total * mean for name, total in zip(ERRORS, totals, strict=True)}
        return means | {"images": images, "without_depth": without}
