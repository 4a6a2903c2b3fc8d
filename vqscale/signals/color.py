"""The signal color: an image in [-1, 1] enters and comes out, and its luminance is the context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vqscale.metrics.chroma import Colors
from vqscale.parallel.mesh import Mesh
from vqscale.show.pictures import to_bytes
from vqscale.signals import Distance, Distances, Sums
from vqscale.signals.config import DistanceConfig
from vqscale.signals.images import reconstruction
from vqscale.signals.labelled import Labelled
from vqscale.signals.summed import Summed

LUMINANCE = (0.2989, 0.587, 0.114)


def luminance(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> the same shape, gray: three equal channels. Of values from 0 to 1 the weights are, and
    they add to 0.9999.
    """
    weights = torch.tensor(LUMINANCE, dtype=images.dtype, device=images.device)
    gray = torch.einsum("bchw,c->bhw", (images + 1) / 2, weights) * 2 - 1
    return gray[:, None].expand(-1, 3, -1, -1).contiguous()


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
        return Summed(Colors(mesh.device), mesh)

    def label_sums(self, samples: Tensor) -> Tensor:
        """Sums of what each channel has above the luminance, and pixels: the constant is the luminance and their means,
        the one tint of all images."""
        above = (samples - luminance(samples)).double().sum((0, 2, 3))
        return torch.cat([above, above.new_tensor([samples[:, 0].numel()])])

    def constant(self, sums: Tensor, samples: Tensor) -> Tensor:
        return (luminance(samples) + (sums[:3] / sums[3]).to(samples.dtype)[:, None, None]).clamp(-1, 1)

    def shown(self, samples: Tensor, *predicted: Tensor) -> list[Tensor]:
        return [to_bytes(images) for images in (luminance(samples), samples, *predicted)]
