"""The signal color: an image in [-1, 1] enters and comes out, and its luminance is the context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vqscale.metrics.chroma import Colors
from vqscale.metrics.features import FeatureMoments, Measures
from vqscale.metrics.fid import frechet
from vqscale.metrics.generation import named
from vqscale.parallel.mesh import Mesh
from vqscale.show.pictures import to_bytes
from vqscale.signals import Distance, Distances, Sums
from vqscale.signals.config import DistanceConfig
from vqscale.signals.images import reconstruction
from vqscale.signals.labelled import Labelled
from vqscale.signals.summed import Summed

LUMINANCE = (0.2989, 0.587, 0.114)
FID_SIDE = 256  # pixels that the published distance is taken at


def luminance(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> the same shape, gray: three equal channels. Of values from 0 to 1 the weights are, and
    they add to 0.9999.
    """
    weights = torch.tensor(LUMINANCE, dtype=images.dtype, device=images.device)
    gray = torch.einsum("bchw,c->bhw", (images + 1) / 2, weights) * 2 - 1
    return gray[:, None].expand(-1, 3, -1, -1).contiguous()


def as_published(predicted: Tensor) -> Tensor:
    """Predictions (B, 3, H, W) in [-1, 1] as FID-5k takes them: larger ones brought to 256 pixels by area, then values
    round((x + 1) 128) of 0 .. 255, which are given back in [-1, 1]."""
    if predicted.shape[-1] > FID_SIDE:
        predicted = F.interpolate(predicted, (FID_SIDE, FID_SIDE), mode="area")
    return ((predicted + 1) * 128).round().clamp(0, 255) / 127.5 - 1


class ColorSums(Summed):
    """PSNR and chroma, and with Inception the Fréchet distance of what is predicted from a reference (ColTran's)."""

    def __init__(self, mesh: Mesh, measures: Measures) -> None:
        super().__init__(Colors(mesh.device), mesh)
        self._reference = measures.reference
        self._features = FeatureMoments(measures.inception, mesh) if measures.inception else None

    def add(self, samples: Tensor, predicted: Tensor) -> None:
        super().add(samples, predicted)
        if self._features:
            self._features.add(as_published(predicted))

    def numbers(self) -> dict[str, float]:
        found = super().numbers()
        if self._features and self._reference and self._reference.pool:
            distance = frechet(self._features.statistics()[0], self._reference.pool)
            found |= named({"fid": distance}, self._features.inception.facts)
        return found


class Color(Labelled):
    """Images of which the luminance is known."""

    def enter(self, samples: Tensor) -> tuple[Tensor, ...]:
        return samples, luminance(samples)

    def distances(self, config: DistanceConfig, mesh: Mesh) -> Distances:
        def of(output: Tensor, samples: Tensor, autocast: Callable[[], Any]) -> dict[str, Distance]:
            distance = reconstruction(samples, output, config.reconstruction)
            return {config.reconstruction: Distance(config.reconstruction_weight, distance)}

        return of

    def predict(self, output: Tensor) -> Tensor:
        return output.float().clamp(-1, 1)

    def sums(self, mesh: Mesh, measures: Any = None) -> Sums:
        return ColorSums(mesh, measures or Measures())

    def label_sums(self, samples: Tensor) -> Tensor:
        """Sums of what each channel has above the luminance, and pixels: the constant is the luminance and their means,
        the one tint of all images."""
        above = (samples - luminance(samples)).double().sum((0, 2, 3))
        return torch.cat([above, above.new_tensor([samples[:, 0].numel()])])

    def constant(self, sums: Tensor, samples: Tensor) -> Tensor:
        return (luminance(samples) + (sums[:3] / sums[3]).to(samples.dtype)[:, None, None]).clamp(-1, 1)

    def shown(self, samples: Tensor, *predicted: Tensor) -> list[Tensor]:
        return [to_bytes(images) for images in (luminance(samples), samples, *predicted)]
