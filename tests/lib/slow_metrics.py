"""A small stand-in for the Inception of FID, with few features, and slow forms of what is made of features."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor
from torch.nn import functional as F


class Small:
    """uint8 (N, 3, H, W) -> (N, 6), (N, 5), (N, 7): squashed maps of a 2 x 2 average of the image."""

    dims = (6, 5, 7)

    def __init__(self, published: bool = False, seed: int = 5) -> None:
        self.facts = {"file": "small.pth", "sha256": f"{seed:064x}", "published": published}
        generator = torch.Generator().manual_seed(seed)
        self.maps = torch.randn(12, sum(self.dims), generator=generator, dtype=torch.float64)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert images.dtype == torch.uint8
        small = F.adaptive_avg_pool2d(images.double() / 64 - 2, 2).flatten(1)
        return (small @ self.maps).tanh().split(self.dims, dim=1)

    def to(self, device) -> Small:
        return self


def slow_frechet(x: np.ndarray, y: np.ndarray) -> float:
    """The distance of two sets of features, by numpy's covariance and scipy's square root of a matrix."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b)
    means = x.mean(0) - y.mean(0)
    return float(means @ means + np.trace(a) + np.trace(b) - 2 * np.trace(root.real))


def slow_score(logits: np.ndarray, part: int) -> float:
    """Inception score, image by image."""
    scores = []
    for begin in range(0, len(logits), part):
        rows = [np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in logits[begin : begin + part]]
        mean = sum(rows) / len(rows)
        scores.append(np.exp(sum((p * np.log(p / mean)).sum() for p in rows) / len(rows)))
    return float(np.mean(scores))


def slow_precision(reference: np.ndarray, samples: np.ndarray, neighbours: int = 3) -> float:
    """Share of samples that lie as near to some point of the reference as its third neighbour does."""
    inside = 0
    for sample in samples:
        for i, centre in enumerate(reference):
            others = sorted(((centre - other) ** 2).sum() for j, other in enumerate(reference) if j != i)
            if ((sample - centre) ** 2).sum() <= others[neighbours - 1]:
                inside += 1
                break
    return inside / len(samples)
