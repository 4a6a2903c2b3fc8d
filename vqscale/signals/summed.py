"""Metrics that know no ranks, added over the ranks."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.signals import Sums


class Metric(Protocol):
    """Sums over the samples of one rank, such as metrics/depth.py's."""

    def add(self, samples: Tensor, predicted: Tensor) -> None: ...

    def sums(self) -> Tensor: ...

    def from_sums(self, sums: Tensor) -> dict[str, float]: ...


class Summed(Sums):
    """The numbers of a metric over the samples of all ranks."""

    def __init__(self, metric: Metric, mesh: Mesh) -> None:
        self.metric, self.mesh = metric, mesh

    def add(self, samples: Tensor, predicted: Tensor) -> None:
        if len(samples):
            self.metric.add(samples, predicted)

    def numbers(self) -> dict[str, float]:
        return self.metric.from_sums(ops.sum_over(self.metric.sums(), self.mesh.world))
