"""The signal images: what is encoded is what comes out, (B, 3, H, W) in [-1, 1], and there is no context.

Distances are means over the values of this rank's images and talk to nobody: the engine averages gradients over ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from vqscale.metrics.features import FeatureMoments, Measures
from vqscale.metrics.fid import Statistics, frechet
from vqscale.metrics.generation import named
from vqscale.metrics.reconstruction import Reconstruction
from vqscale.nets.lpips import load as load_lpips
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.show import pictures
from vqscale.signals import Distance, Distances, Signal, Sums
from vqscale.signals.config import DistanceConfig, PerceptualConfig


def l1(images: Tensor, recon: Tensor) -> Tensor:
    """mean |x - y| over all values of all images."""
    return (images.float() - recon.float()).abs().mean()


def l2(images: Tensor, recon: Tensor) -> Tensor:
    """mean (x - y)^2 over all values of all images, the mean squared error."""
    return (images.float() - recon.float()).square().mean()


RECONSTRUCTIONS = {"l1": l1, "l2": l2}


def reconstruction(images: Tensor, recon: Tensor, kind: str) -> Tensor:
    """The reconstruction loss called kind, a scalar in float32, of two (B, 3, H, W) batches in the same range."""
    if kind not in RECONSTRUCTIONS:
        raise ValueError(
            f"there is no reconstruction loss {kind!r}, only {', '.join(RECONSTRUCTIONS)}: change the kind of the loss"
        )
    if images.shape != recon.shape:  # subtraction would broadcast, and train towards a mean image
        raise ValueError(
            f"images are {tuple(images.shape)} and their reconstructions {tuple(recon.shape)}: give reconstruction() "
            "two batches of the same shape"
        )
    return RECONSTRUCTIONS[kind](images, recon)


class Perceptual:
    """LPIPS and its weight; frozen, the same on every rank. ValueError where its files are not what they should be."""

    def __init__(self, config: PerceptualConfig, mesh: Mesh) -> None:
        self.weight = config.weight
        lpips = load_lpips(config.vgg, config.heads, vgg_sha256=config.vgg_sha256, heads_sha256=config.heads_sha256)
        self._lpips = lpips.to(mesh.device)

    def distance(self, images: Tensor, recon: Tensor) -> Tensor:
        """The mean over this rank's images, not weighted."""
        return self._lpips(images, recon).mean()


class ImageSums(Sums):
    """PSNR and SSIM; with measures LPIPS, and the distance of Inception's features of reconstructions."""

    def __init__(self, mesh: Mesh, measures: Measures) -> None:
        self.mesh, self.measures = mesh, measures
        self._sums = Reconstruction(mesh.device)
        self._lpips = torch.zeros((), dtype=torch.float64, device=mesh.device)
        inception, names = measures.inception, ["originals"] if measures.reference is None else []
        features = {} if inception is None else {name: FeatureMoments(inception, mesh) for name in (*names, "recon")}
        self._features = features
        self.statistics: dict[str, tuple[Statistics, Statistics]] = {}  # of originals and recon, known with the numbers

    def add(self, samples: Tensor, predicted: Tensor) -> None:
        self._sums.add(samples, predicted)
        if self.measures.lpips is not None and len(samples):
            self._lpips += self.measures.lpips(samples, predicted).double().sum()
        for name, features in self._features.items():
            features.add(samples if name == "originals" else predicted)

    def numbers(self) -> dict[str, float]:
        scores = Reconstruction.from_sums(ops.sum_over(self._sums.sums(), self.mesh.world))
        if self.measures.lpips is not None:
            scores[self.measures.lpips_name] = float(ops.sum_over(self._lpips, self.mesh.world)) / scores["images"]
        self.statistics = {name: features.statistics() for name, features in self._features.items()}
        if self.measures.inception is None:
            return scores
        against = self.measures.reference.pool if self.measures.reference else self.statistics["originals"][0]
        assert against is not None, "Measures takes no reference without statistics"
        distance = frechet(self.statistics["recon"][0], against)
        return named({"rfid": distance}, self.measures.inception.facts) | scores


class Images(Signal):
    """Images without context."""

    def enter(self, samples: Tensor) -> tuple[Tensor, ...]:
        return (samples,)

    def distances(self, config: DistanceConfig, mesh: Mesh) -> Distances:
        perceptual = None if config.perceptual is None else Perceptual(config.perceptual, mesh)

        def of(
            output: Tensor, samples: Tensor, autocast: Callable[[], AbstractContextManager[Any]]
        ) -> dict[str, Distance]:
            distance = reconstruction(samples, output, config.reconstruction)
            found = {config.reconstruction: Distance(config.reconstruction_weight, distance)}
            if perceptual:
                with autocast():
                    found["lpips"] = Distance(perceptual.weight, perceptual.distance(samples, output))
            return found

        return of

    def predict(self, output: Tensor) -> Tensor:
        return output.float().clamp(-1, 1)

    def sums(self, mesh: Mesh, measures: Measures | None = None) -> ImageSums:
        return ImageSums(mesh, measures or Measures())

    def picture(self, samples: Tensor, predicted: Tensor) -> pictures.Picture:
        """Originals, below each its reconstruction."""
        return pictures.grid(samples, predicted, scale=pictures.scale(*samples.shape[2:]))
