"""Code dropout: which codes of an image a decoder is given, so that it learns to do with any number of them, or none.

UViM's: u uniform in (0, 1); the i-th of n codes is kept where 1 - i / (n + 1) > u, and which these are is any
permutation's choice. So the number kept is uniform on 0 .. n, and given it every set of so many is equally likely. What
decides are keys of images (codes/noise.py): an image's codes are the same on any number of ranks and in any batch. Not
here: what a decoder sees in place of a dropped code (model.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vqscale.codes import noise

DROPS = 3  # derives the keys of dropped codes from those of images, as the priors' masks have 1 and their noise 2


def random_kept(keys_B: Tensor, grid: Sequence[int]) -> Tensor:
    """kept (B, *grid) of images in training: any number of codes, and any of them."""
    num = torch.Size(grid).numel()
    uniform_BV = noise.uniform(noise.keys(DROPS, keys_B), 0, 1 + num)
    importance_T = 1 - torch.arange(1, num + 1, device=keys_B.device) / (num + 1)
    count_B = (importance_T > uniform_BV[:, :1]).sum(1)
    return noise.lowest(uniform_BV[:, 1:], count_B).unflatten(1, tuple(grid))
