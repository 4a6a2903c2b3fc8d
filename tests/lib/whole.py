"""Whole tables and global batches, made once from a seed, and how tests cut them over ranks and join what comes back.

A comparison with one process holds only if nothing about the data depends on the number of ranks: everything is made
whole on every rank and cut. Results of ranks come in world order, rank = data * M + codes.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vqscale.codes.codebook import Codebook
from vqscale.parallel.mesh import Mesh

# (data, codes); the global batch and the table are the same on all of them.
FOUR = [pytest.mark.dist, pytest.mark.slow]  # two cores are shared by four processes
GRIDS = [
    (1, 1),
    pytest.param((1, 2), marks=pytest.mark.dist),
    pytest.param((1, 4), marks=FOUR),
    pytest.param((2, 2), marks=FOUR),
]
CODES = [1, pytest.param(2, marks=pytest.mark.dist), pytest.param(4, marks=FOUR)]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def integers(*shape: int, seed: int, most: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers: their products and sums are exact, so that equal scores are equal in every bit."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def mine(x: Tensor, mesh: Mesh) -> Tensor:
    """This rank's part of a global batch."""
    return x.chunk(mesh.world.size)[mesh.world.rank].clone()


def put(codebook: Codebook, whole_KD: Tensor) -> Codebook:
    """Give a codebook this rank's slice of a whole table, in the table's precision."""
    codebook.to(whole_KD.dtype)
    codebook.rows.data = whole_KD[codebook.layout.start : codebook.layout.stop].clone()
    return codebook


def table(parts: list[Tensor], codes: int) -> Tensor:
    """The whole table of the slices of all ranks; every replica has the same."""
    for start in range(codes, len(parts), codes):
        for part, first in zip(parts[start : start + codes], parts[:codes], strict=True):
            assert torch.equal(part, first), "replicas of a slice differ"
    return torch.cat(parts[:codes])


def engine_gradient(parts: list[Tensor], codes: int) -> Tensor:
    """What an engine makes of the gradients of the slices: divided by M and averaged over the data axis; whole."""
    world = len(parts)
    return torch.cat([sum(parts[rank::codes]) / world for rank in range(codes)])


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
