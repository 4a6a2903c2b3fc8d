"""The signal depth: bins of metres, of which a number of each pixel enters, and the logits of all come out; the image
is the context.

Losses are plain means over all pixels of this rank's images. What is missing counts in the mean and is asked for
nothing; what is beyond the last bin is trained as the last (big_vision's uvim).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vqscale.metrics.depth import DepthErrors, is_valid
from vqscale.parallel.mesh import Mesh
from vqscale.show import labels
from vqscale.show.pictures import to_bytes
from vqscale.signals import Distance, Distances, Sums
from vqscale.signals.config import DistanceConfig
from vqscale.signals.config_dense import DepthSignal
from vqscale.signals.labelled import Labelled
from vqscale.signals.summed import Summed


def split(samples: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 4, H, W) of the medium depth -> images (B, 3, H, W) in [-1, 1], metres (B, H, W) with 0 where missing."""
    return samples[:, :3], samples[:, 3]


class Depth(Labelled):
    """Depth by bins."""

    config: DepthSignal

    def bins(self, metres: Tensor) -> Tensor:
        """The bin of each depth, int64; depths outside fall into the first and the last."""
        share = (metres.float() - self.config.near_m) / (self.config.far_m - self.config.near_m)
        return (share * self.config.num_bins).floor().long().clamp(0, self.config.num_bins - 1)

    def centres(self, device: torch.device) -> Tensor:
        """Metres of the middle of each bin."""
        numbers = torch.arange(self.config.num_bins, dtype=torch.float32, device=device) + 0.5
        return self.config.near_m + numbers * ((self.config.far_m - self.config.near_m) / self.config.num_bins)

    def enter(self, samples: Tensor) -> tuple[Tensor, ...]:
        images, metres = split(samples)
        return self.bins(metres)[:, None].to(samples.dtype), images

    def distances(self, config: DistanceConfig, mesh: Mesh) -> Distances:
        def of(output: Tensor, samples: Tensor, autocast: Callable[[], Any]) -> dict[str, Distance]:
            _, metres = split(samples)
            total = F.cross_entropy(output.float(), self.bins(metres), ignore_index=0, reduction="sum")
            return {"cross_entropy": Distance(config.reconstruction_weight, total / metres.numel())}

        return of

    def predict(self, output: Tensor) -> Tensor:
        """(B, 1, H, W): metres."""
        centres = self.centres(output.device)
        if self.config.predict == "argmax":
            return centres[output.argmax(1, keepdim=True)]
        return torch.einsum("bkhw,k->bhw", output.float().softmax(1), centres)[:, None]

    def sums(self, mesh: Mesh, measures: Any = None) -> Sums:
        return Summed(DepthErrors(mesh.device), mesh)

    def label_sums(self, samples: Tensor) -> Tensor:
        """Metres and pixels where depth is valid: the constant is their mean."""
        _, metres = split(samples)
        valid = is_valid(metres)
        return torch.stack([torch.where(valid, metres.double(), 0.0).sum(), valid.sum().double()])

    def constant(self, sums: Tensor, samples: Tensor) -> Tensor:
        return (sums[0] / sums[1]).to(samples.dtype).expand(len(samples), 1, *samples.shape[2:])

    def shown(self, samples: Tensor, *predicted: Tensor) -> list[Tensor]:
        """Near is bright; black is missing."""
        images, metres = split(samples)
        depths = (metres, *(found[:, 0] for found in predicted))
        return [to_bytes(images), *(labels.depth(depth, self.config.far_m) for depth in depths)]
