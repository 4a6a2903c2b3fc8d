"""The signal panoptic: the class and the instance of each pixel enter as two numbers, and the logits of both come out;
the image is the context.

Losses are plain means over all pixels of this rank's images. Void is trained as class 0 and instance 0; an instance
beyond the numbers that the signal has is a vector of zeros where it enters, and is asked for nothing (big_vision's
uvim). How much that is stands with the losses, and with the metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vqscale.metrics.panoptic import QUALITIES, PanopticQuality, per_class
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.show import labels
from vqscale.show.pictures import to_bytes
from vqscale.signals import Distance, Distances, Sums
from vqscale.signals.config import DistanceConfig
from vqscale.signals.config_dense import PanopticSignal
from vqscale.signals.labelled import Labelled
from vqscale.signals.summed import Summed


class PanopticSums(Summed):
    """PQ, and the segments of the samples that have no instance number."""

    def __init__(self, config: PanopticSignal, mesh: Mesh) -> None:
        things = range(1, 1 + config.num_things)
        super().__init__(PanopticQuality(config.num_things + config.num_stuff, things, mesh.device), mesh)
        self._last = config.num_instances - 1
        self._beyond = torch.zeros((), dtype=torch.int64, device=mesh.device)

    def add(self, samples: Tensor, predicted: Tensor) -> None:
        super().add(samples, predicted)
        if len(samples):  # the numbers of a sample have no gaps
            self._beyond += (samples[:, 4].flatten(1).amax(1).long() - self._last).clamp(min=0).sum()

    def numbers(self) -> dict[str, float]:
        return super().numbers() | {"beyond_instances": float(ops.sum_over(self._beyond, self.mesh.world))}

    def by_class(self) -> dict[int, dict[str, float]]:
        rows = per_class(ops.sum_over(self.metric.sums(), self.mesh.world)).tolist()
        return {number: dict(zip(QUALITIES, row, strict=True)) for number, row in enumerate(rows) if number}


class Panoptic(Labelled):
    """Segments by their class and their number in the image."""

    config: PanopticSignal

    def enter(self, samples: Tensor) -> tuple[Tensor, ...]:
        return samples[:, 3:5], samples[:, :3]

    def distances(self, config: DistanceConfig, mesh: Mesh) -> Distances:
        semantics_weight = config.reconstruction_weight * self.config.semantics_weight
        instances_weight = config.reconstruction_weight * self.config.instances_weight

        def of(output: Tensor, samples: Tensor, autocast: Callable[[], Any]) -> dict[str, Distance]:
            classes, instances = samples[:, 3:5].long().unbind(1)
            semantic, instance = output.float().split(self.config.labels, 1)
            beyond = instances >= self.config.num_instances
            told = F.cross_entropy(instance, instances.masked_fill(beyond, -1), ignore_index=-1, reduction="sum")
            return {
                "semantics": Distance(semantics_weight, F.cross_entropy(semantic, classes)),
                "instances": Distance(instances_weight, told / instances.numel()),
                "beyond_instances": Distance(0.0, beyond.float().mean()),
            }

        return of

    def predict(self, output: Tensor) -> Tensor:
        """(B, 2, H, W): class and instance; all pixels of an instance take the class of their largest sum of logits."""
        semantic, instance = output.float().split(self.config.labels, 1)
        number_BP = instance.argmax(1).flatten(1)
        logits_BCP = semantic.flatten(2)
        sums_BCI = logits_BCP.new_zeros(*logits_BCP.shape[:2], self.config.num_instances)
        sums_BCI.scatter_add_(2, number_BP[:, None].expand_as(logits_BCP), logits_BCP)
        counts_BI = F.one_hot(number_BP, self.config.num_instances).sum(1)
        large_BP = counts_BI.gather(1, number_BP) > self.config.min_fraction * number_BP.shape[1]
        class_BP = sums_BCI.argmax(1).gather(1, number_BP)
        found = torch.stack([class_BP, number_BP], 1) * large_BP[:, None]
        return found.unflatten(2, output.shape[2:]).float()

    def sums(self, mesh: Mesh, measures: Any = None) -> Sums:
        return PanopticSums(self.config, mesh)

    def label_sums(self, samples: Tensor) -> Tensor:
        """Pixels of each class: the constant is one segment of the most frequent, void left out."""
        return torch.bincount(samples[:, 3].long().flatten(), minlength=self.config.num_classes).double()

    def constant(self, sums: Tensor, samples: Tensor) -> Tensor:
        segment = torch.stack([1 + sums[1:].argmax(), torch.ones((), device=sums.device)]).to(samples.dtype)
        return segment[:, None, None].expand(len(samples), 2, *samples.shape[2:])

    def shown(self, samples: Tensor, *predicted: Tensor) -> list[Tensor]:
        """Segments in a colour each, with their borders; black is void."""
        maps = (samples[:, 3:5], *predicted)
        return [to_bytes(samples[:, :3]), *(labels.segments(*found.long().unbind(1)) for found in maps)]
