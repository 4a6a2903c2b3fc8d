"""What Inception sees in a set of images on many ranks: moments of its features, and some of them as points; and which
networks judge images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vqscale.data.order import permutation
from vqscale.metrics.fid import Moments, Reference, Statistics
from vqscale.metrics.generation import FeatureNetwork
from vqscale.metrics.reconstruction import to_bytes
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.seed import derive


@dataclass(frozen=True)
class Measures:
    """Networks with weights, on the mesh's device. None: what it measures is left out.

    inception: see metrics.generation.FeatureNetwork. lpips(images, recon), both (B, 3, H, W) in [-1, 1] -> (B,); its
    number is called `lpips_name`. reference: statistics that reconstructions are compared with, instead of their
    originals'.
    """

    inception: FeatureNetwork | None = None
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None
    lpips_name: str = "lpips"
    reference: Reference | None = None

    def __post_init__(self) -> None:
        assert self.reference is None or self.reference.pool is not None, "a reference for reconstructions states mu"


class FeatureMoments:
    """Moments of the pooled and spatial features of one set of images of all ranks."""

    def __init__(self, inception: FeatureNetwork, mesh: Mesh) -> None:
        self.inception, self.mesh = inception, mesh
        self._pool, self._spatial = (Moments(dim, mesh.device) for dim in inception.dims[:2])

    def add(self, images: Tensor) -> Tensor:
        """Count images (B, 3, H, W) in [-1, 1] of this rank, as 8-bit images; B may be 0. Returns pooled features."""
        if not len(images):
            return images.new_zeros(0, self.inception.dims[0])
        pool, spatial, _ = self.inception(to_bytes(images))
        self._pool.add(pool)
        self._spatial.add(spatial)
        return pool

    def statistics(self) -> tuple[Statistics, Statistics]:
        """(pooled, spatial) over all ranks, the same on every rank. Collective."""
        return self._pool.statistics(self.mesh.world), self._spatial.statistics(self.mesh.world)


class Points:
    """Pooled features, float32, of `most` images of a data set, for precision and recall against it.

    Which ones their numbers alone say, drawn from all: another number of ranks, another batch, the same points.
    """

    def __init__(self, num_images: int, most: int, dim: int, mesh: Mesh) -> None:
        self.mesh, chosen = mesh, torch.from_numpy(permutation(num_images, derive("points"))[:most])
        self._place = torch.full((num_images,), -1, device=mesh.device)
        self._place[chosen.to(mesh.device)] = torch.arange(len(chosen), device=mesh.device)
        self._rows = torch.zeros(len(chosen), dim + 1, device=mesh.device)  # the last column: 1 where one was seen

    def add(self, pool_ND: Tensor, numbers_N: Tensor) -> None:
        """Take those that are chosen from features of images of this rank."""
        place_N = self._place[numbers_N]
        taken_N = place_N >= 0
        self._rows[place_N[taken_N]] = torch.nn.functional.pad(pool_ND[taken_N].float(), (0, 1), value=1.0)

    def all(self) -> Tensor:
        """Of all ranks, on every rank, without images that could not be read. Collective."""
        rows = ops.sum_over(self._rows, self.mesh.world)
        return rows[rows[:, -1] > 0, :-1]
