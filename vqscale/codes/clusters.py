"""Clusters: which of G clusters every code is in. What is coarse in a coarse-to-fine prior is a cluster's number.

A table of K whole numbers, split as rows are. Every rank knows of its own codes alone; the cluster of an id is asked of
whichever rank owns it, and a cluster's members lie on as many ranks as they happen to. G is no K: what has G numbers is
on every rank. Where clusters come from is kmeans.py; the softmax over the members of one is heads/within.py.

Letters here and there: G clusters, S members of a cluster on this rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vqscale.codes.ids import check_ids
from vqscale.codes.merge import own
from vqscale.codes.rows import Rows, Table
from vqscale.parallel import ops
from vqscale.parallel.mesh import Axis, Mesh


class Members(NamedTuple):
    """The codes of this rank in the order of their clusters: those of cluster g are rows_k[start_g : start_g + 1]."""

    rows_k: Tensor  # numbers of rows of this rank; the lowest first inside a cluster
    start_H: Tensor  # G + 1 places
    size_G: Tensor  # members on all ranks together
    most_G: Tensor  # and on the rank that has the most of them


class Clusters(Table):
    """The cluster of each of num_codes codes, 0 .. num_clusters - 1. At first equal ranges of ids, in their order."""

    def __init__(self, num_codes: int, num_clusters: int, mesh: Mesh) -> None:
        super().__init__(Rows(num_codes, mesh.codes.size, mesh.codes.rank))
        if not 1 <= num_clusters <= num_codes:
            raise ValueError(
                f"num_clusters is {num_clusters}, and there are {num_codes} codes: each is in one cluster, and none is "
                f"empty; use 1 to {num_codes}"
            )
        self.num_codes, self.num_clusters, self.axis = num_codes, num_clusters, mesh.codes
        self.cluster_k: Tensor
        ids_k = torch.arange(self.layout.start, self.layout.stop, device=mesh.device)
        self.register_buffer("cluster_k", ids_k * num_clusters // num_codes)
        self._known: tuple[tuple[int, int], Members] | None = None

    @torch.no_grad()
    def take(self, cluster_k: Tensor) -> None:
        """Let the codes of this rank be in these clusters."""
        self.cluster_k.copy_(cluster_k)

    @torch.no_grad()
    def of(self, ids: Tensor) -> Tensor:
        """The clusters of ids of any shape. Collective: ids are gathered, as many numbers come back.

        ValueError on all ranks of the code group for ids outside 0 .. K - 1; on a GPU the check waits for nobody and
        fails inside the device.
        """
        ids_B = ops.gather(ids.reshape(-1).to(torch.int64), self.axis)
        check_ids(ids_B, 0, self.num_codes, "ids", Axis(self.axis.name))  # all ranks see the same
        mine_B, local_B = self.layout.find(ids_B)
        # Whether there are rows is known to this rank alone, and nothing in this branch talks.
        found_B = self.cluster_k[local_B] * mine_B if self.layout.count else torch.zeros_like(ids_B)
        return own(ops.sum_over(found_B, self.axis), self.axis).view(ids.shape)

    def members(self) -> Members:
        """Whose members are whose; found again when the clusters have changed. Collective where they have."""
        state = (self.cluster_k.data_ptr(), self.cluster_k._version)
        if self._known is None or self._known[0] != state:
            self._known = (state, _members(self.cluster_k, self.num_clusters, self.axis))
        return self._known[1]

    def extra_repr(self) -> str:
        return f"{self.num_codes} codes in {self.num_clusters}, rows {self.layout.start}..{self.layout.stop}"


def _members(cluster_k: Tensor, num_clusters: int, axis: Axis) -> Members:
    count_G = torch.bincount(cluster_k, minlength=num_clusters)
    start_H = torch.cat([count_G.new_zeros(1), count_G.cumsum(0)])
    return Members(cluster_k.argsort(stable=True), start_H, ops.sum_over(count_G, axis), ops.max_over(count_G, axis))
