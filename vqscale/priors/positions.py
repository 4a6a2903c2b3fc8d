"""Which positions of a batch a loss is about, and what each weighs in the mean of its image.

All of them, or those of positive weight: then the head, whose cost is N x K, is asked about these alone. Ranks of a
code group have equal N, so lists are filled up to the longest of the group with positions that weigh nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vqscale.parallel import ops
from vqscale.parallel.mesh import Axis


class Positions:
    """N positions of B images of T each. `weight_BT` None is all, alike."""

    def __init__(self, shape: Sequence[int], weight_BT: Tensor | None, axis: Axis) -> None:
        """Collective where there are weights."""
        self._shape, self._place_N, self._share_N = tuple(shape), None, None
        if weight_BT is not None:
            share_BT = weight_BT.double() / weight_BT.double().sum(1, keepdim=True)
            place_N = weight_BT.flatten().nonzero()[:, 0]
            self._count = len(place_N)
            most = int(ops.max_over(place_N.new_full((), self._count), axis))
            self._place_N = F.pad(place_N, (0, most - self._count))
            self._share_N = share_BT.flatten()[self._place_N]
            self._share_N[self._count :] = 0.0

    def of(self, x_BT: Tensor, beyond: int | None = None) -> Tensor:
        """The N values of x_BT..., and `beyond` at those that only fill up."""
        x_N = x_BT.flatten(0, 1)
        if self._place_N is None:
            return x_N
        x_N = x_N[self._place_N]
        if beyond is not None:
            x_N[self._count :] = beyond
        return x_N

    def weights(self, like_N: Tensor) -> Tensor:
        """What `mean` weighs each of the N values with, in float64."""
        if self._share_N is None:
            return torch.full((len(like_N),), 1.0 / len(like_N), dtype=torch.float64, device=like_N.device)
        return self._share_N / self._shape[0]

    def mean(self, values_N: Tensor) -> Tensor:
        """The mean over images of `means_of_images`."""
        return values_N.mean() if self._place_N is None else self.means_of_images(values_N).mean()

    def means_of_images(self, values_N: Tensor) -> Tensor:
        """Of each image, the weighted mean of its values."""
        if self._place_N is None or self._share_N is None:
            return values_N.unflatten(0, self._shape).mean(1)
        sums_B = values_N.new_zeros(self._shape[0])
        return sums_B.index_add(0, self._place_N // self._shape[1], values_N * self._share_N.to(values_N))
