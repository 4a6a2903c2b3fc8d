"""Ids that are wrong in a known way: a share of an image's ids swapped for codes near to theirs, or for any others.

A decoder meets such ids behind a prior, which draws likely ones and not those of an image. Which are swapped, and for
what, keys of images say (noise.py): the same on any number of ranks and in any batch. Neighbours are exact
(heads/neighbours.py), by the distance of what codes decode to. Not here: what is done with such ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vqscale.codes import noise
from vqscale.codes.heads import neighbours
from vqscale.codes.heads.neighbours import Neighbours
from vqscale.codes.merge import own
from vqscale.codes.rows import Rows, decoded
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh

SWAPS = 4  # derives the keys of swaps from those of images, as DROPS (tokenizer/code_dropout.py) has 3


@dataclass(frozen=True)
class Swaps:
    """Swaps ids of a table of num_codes codes, each for one of its neighbours; without a table of these for any other
    code. All as likely."""

    num_codes: int
    near: Neighbours | None = None

    @classmethod
    def among_neighbours(cls, decode: Callable[[Tensor], Tensor], num_codes: int, count: int, mesh: Mesh) -> Swaps:
        """For one of the `count` codes nearest to each, by ids_N -> z_ND, a quantizer's `decode`. Collective: 2 K k D
        operations on each rank, once."""
        layout = Rows(num_codes, mesh.codes.size, mesh.codes.rank)
        z_kD = torch.cat(list(decoded(decode, layout, mesh.device)))
        return cls(num_codes, neighbours.find(z_kD, layout, mesh.codes, min(count + 1, num_codes), 1.0))

    @torch.no_grad()
    def __call__(self, ids_BT: Tensor, keys_B: Tensor, share: float | Tensor) -> Tensor:
        """ids_BT of this rank's images, each swapped with the probability `share`, a number or one per image.
        Collective on the code axis where there are neighbours."""
        num, shares_B1 = ids_BT.shape[1], torch.as_tensor(share, device=ids_BT.device).view(-1, 1)
        uniform_BV = noise.uniform(noise.keys(SWAPS, keys_B), 0, 2 * num, torch.float64)
        swapped_BT = uniform_BV[:, :num] < shares_B1
        others_BT = self._others(ids_BT.flatten(), uniform_BV[:, num:].flatten()).view_as(ids_BT)
        return torch.where(swapped_BT, others_BT, ids_BT)

    def _others(self, ids_N: Tensor, uniform_N: Tensor) -> Tensor:
        """Another code for each id; the id itself where there is no other."""
        if self.near is None:
            other_N = (uniform_N * (self.num_codes - 1)).long()
            return (other_N + (other_N >= ids_N).long()).clamp(max=self.num_codes - 1)
        axis = self.near.axis
        near_Bm = self.near.of(ops.gather(ids_N, axis))[0]  # a code itself comes first
        near_Nm = own(near_Bm, axis)
        count = near_Nm.shape[1] - 1
        if count < 1:
            return ids_N
        return near_Nm.gather(1, (uniform_N * count).long()[:, None] + 1)[:, 0]


def random_shares(keys_B: Tensor, most: float) -> Tensor:
    """A share of each image, uniform between 0 and `most`, that its keys decide."""
    return most * noise.uniform(noise.keys(SWAPS, keys_B, 1), 0, 1, torch.float64)[:, 0]
