"""Sums of metrics that know no ranks, added over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.signals import Sums


class Metric(Protocol):
    """Sums over the samples of one rank, as metrics/reconstruction.py has them."""

    def sums(self) -> Tensor: ...

    def from_sums(self, sums: Tensor) -> dict[str, float]: ...


class Summed(Sums):
    """The numbers of a metric over all ranks; `count(samples, predicted)` adds to it."""

    def __init__(self, mesh: Mesh, metric: Metric, count: Callable[[Tensor, Tensor], Any]) -> None:
        self.mesh, self.metric, self.count = mesh, metric, count

    def add(self, samples: Tensor, predicted: Tensor) -> None:
        if len(samples):
            self.count(samples, predicted)

    def numbers(self) -> dict[str, float]:
        return self.metric.from_sums(ops.sum_over(self.metric.sums(), self.mesh.world))


class DepthError:
    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, metres: Tensor, predicted: Tensor) -> None:
        valid = (metres > 1e-3) & (metres < 10)
        square = ((predicted - metres).double().square() * valid).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(
            min=1
        )
        self._sums += torch.stack([torch.full_like(square.sum(), len(metres)), square.sqrt().sum()])

    def sums(self) -> Tensor:
        return self._sums.clone()

    @staticmethod
    def from_sums(sums: Tensor) -> dict[str, float]:
        images, error = sums.tolist()
        return {"rmse": error / images if images else float("nan"), "images": images}


class Agreement:
    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, classes: Tensor, predicted: Tensor) -> None:
        right = (classes == predicted).double().flatten(1).mean(1)
        self._sums += torch.stack([torch.full_like(right.sum(), len(right)), right.sum()])

    def sums(self) -> Tensor:
        return self._sums.clone()

    @staticmethod
    def from_sums(sums: Tensor) -> dict[str, float]:
        images, right = sums.tolist()
        return {"right": right / images if images else float("nan"), "images": images}
