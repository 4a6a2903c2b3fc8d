"""Hits of codes that have no table: a quantizer that computes its codes counts them without a tensor of all K.

Up to DENSE_MOST codes there is a count for every code, split over the code axis as rows are. Beyond, only codes that
were taken are held, each by the rank `id modulo world`, so that no rank holds all of them and K may be 2^62. Counts are
over all tokens of all ranks and exact; the ids travel (8 bytes per token), K does not. Nothing here has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqscale.codes import tally
from vqscale.codes.rows import Rows
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh

DENSE_MOST = 2**22


class Hits:
    """How often each code was taken, by all ranks, in all that was added. With one process nothing is sent."""

    def __init__(self, num_codes: int, mesh: Mesh) -> None:
        self.num_codes, self.mesh = num_codes, mesh
        self.dense = num_codes <= DENSE_MOST
        self._axis = mesh.codes if self.dense else mesh.world
        self._layout = Rows(num_codes, mesh.codes.size, mesh.codes.rank)
        self._ids = torch.zeros(0, dtype=torch.int64, device=mesh.device)  # of codes held here, if not dense
        count = self._layout.count if self.dense else 0
        self._counts = torch.zeros(count, dtype=torch.int64, device=mesh.device)

    def add(self, ids_N: Tensor) -> None:
        """Count the ids of this rank, as many as every other rank has; a negative id is nobody's. Collective."""
        if self.dense:
            self._counts += tally.counts(ids_N, self._layout, self.mesh)
            return
        world = self.mesh.world
        ids = ops.gather(ids_N, world)
        ids = torch.cat([self._ids, ids[(ids >= 0) & (ids % world.size == world.rank)]])
        ones = self._counts.new_ones(len(ids) - len(self._ids))
        self._ids, place = torch.unique(ids, return_inverse=True)
        self._counts = torch.zeros_like(self._ids).index_add_(0, place, torch.cat([self._counts, ones]))

    def usage(self) -> dict[str, Tensor]:
        """usage, perplexity and dead codes, of all K: the same numbers on every rank. Collective."""
        return tally.usage(self._counts, self._axis, self.num_codes)

    def per_code(self) -> Tensor:
        """Hits of every code in id order; beyond DENSE_MOST only of those taken, in any order. On the CPU. Collective.

        All of it on every rank: for a picture now and then, not for a step.
        """
        return torch.cat(ops.gather_objects(self._counts.cpu(), self._axis))


class Usage(nn.Module):
    """usage, perplexity and dead codes in training, for a quantizer without rows.

    Up to DENSE_MOST codes, of an exponential window of optimiser steps (a Table, which checkpoints cut by row); beyond,
    and where no training loop calls `update`, of the global batch at hand.
    """

    def __init__(self, num_codes: int, mesh: Mesh, decay: float | None) -> None:
        super().__init__()
        self.num_codes, self.mesh = num_codes, mesh
        self.window = tally.Window(num_codes, mesh, decay) if num_codes <= DENSE_MOST else None
        self.driven = False
        self._counts_k: Tensor | None = None
        self._tokens = 0

    def begin(self) -> None:
        """From here on a training loop calls `update`."""
        self.driven = True

    def note(self) -> None:
        """Before a pass in a compiled graph."""
        if self.window is not None:
            self.window.note()

    @torch.no_grad()
    def observe(self, ids_N: Tensor) -> dict[str, Tensor]:
        """Count the tokens of one forward pass, in training mode for the window; returns what there is to say.

        Nothing where tally.statistics is off.
        """
        windowed = self.window is not None and self.driven and self.training
        if not windowed and not tally.statistics.on:
            return {}
        if self.window is None or not windowed:
            hits = Hits(self.num_codes, self.mesh)
            hits.add(ids_N)
            return hits.usage()
        counts_k = tally.counts(ids_N, self.window.layout, self.mesh)
        self._counts_k = counts_k if self._counts_k is None else self._counts_k + counts_k
        self._tokens += len(ids_N) * self.mesh.world.size
        return self.window.usage() if tally.statistics.on else {}

    def update(self, stepped: bool = True) -> None:
        """After an optimiser step; one that was skipped leaves no trace."""
        if self.window is not None and self._counts_k is not None and stepped:
            self.window.add(self._counts_k, self._tokens)
        self._counts_k, self._tokens = None, 0
