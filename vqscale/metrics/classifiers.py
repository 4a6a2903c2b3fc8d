"""What the judges of drawn pictures (shapes_classifier.py) and of drawn sounds (sounds_classifier.py) share: a rank's
part of an endless set, and one look of a classifier at it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from vqscale.metrics.fid import Moments, Statistics
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh

BATCH = 100
Samples = Iterator[tuple[Tensor, Tensor]]  # (what the classifier takes, their classes)


class Classifier(Protocol):
    """A network on the mesh's device: samples of its medium -> (features, logits)."""

    @property
    def config(self) -> Any: ...  # of nets/config/classifiers.py
    @property
    def num_features(self) -> int: ...
    def __call__(self, samples: Tensor, /) -> tuple[Tensor, Tensor]: ...


def drawn(numbers: list[int], draws: Callable[[list[int]], tuple[Tensor, Tensor]], mesh: Mesh) -> Samples:
    """This rank's part of the samples with these numbers, as `draws` makes them."""
    count, world = len(numbers), mesh.world
    mine = numbers[count * world.rank // world.size : count * (world.rank + 1) // world.size]
    for at in range(0, len(mine), BATCH):
        yield draws(mine[at : at + BATCH])


@torch.no_grad()
def look(classifier: Classifier, seen: Samples, mesh: Mesh) -> tuple[float, Statistics]:
    """(share recognised as their class, statistics of the features) of the samples of all ranks. Collective."""
    moments, right, count = Moments(classifier.num_features, mesh.device), 0, 0
    for samples, labels in seen:
        features_ND, logits_NC = classifier(samples.to(mesh.device))
        moments.add(features_ND)
        right += int((logits_NC.argmax(1).cpu() == labels).sum())
        count += len(samples)
    sums = ops.sum_over(torch.tensor([right, count], dtype=torch.float64, device=mesh.device), mesh.world).tolist()
    return sums[0] / sums[1], moments.statistics(mesh.world)
