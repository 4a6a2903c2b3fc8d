"""What the codes have been used for: counts, sums, the exponential window of counts, usage and perplexity, dead codes.

Counting gathers the ids (or the tokens) of the code group, each rank counts for its own rows, and replicas add up. So a
count is over all tokens of all ranks, and lies where the row lies. Nothing here has a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vqscale.codes.rows import Rows, Table
from vqscale.parallel import ops
from vqscale.parallel.mesh import Axis, Mesh


@dataclass
class Statistics:
    """Whether statistics for people are made: their passes over rows and all-reduces are for steps that log.

    The same on all ranks, always. On, but inside `silent`; counting goes on either way.
    """

    on: bool = True


statistics = Statistics()


@contextmanager
def silent() -> Iterator[None]:
    """Without statistics inside. Nothing that is computed for the model depends on it."""
    before, statistics.on = statistics.on, False
    try:
        yield
    finally:
        statistics.on = before


@torch.no_grad()
def counts(ids_N: Tensor, layout: Rows, mesh: Mesh) -> Tensor:
    """How often each row of this rank was taken by any token of any rank: counts_k, int64."""
    ids_B = ops.gather(ids_N, mesh.codes)
    out_k = torch.zeros(layout.count, dtype=torch.int64, device=ids_N.device)
    return ops.sum_over(layout.add_(out_k, ids_B, torch.ones_like(ids_B)), mesh.data)


@torch.no_grad()
def sums(ids_N: Tensor, x_ND: Tensor, layout: Rows, mesh: Mesh) -> Tensor:
    """The sum of the tokens, of any rank, that took each row of this rank: sums_kD, in x's precision."""
    ids_B, x_BD = ops.gather(ids_N, mesh.codes), ops.gather(x_ND, mesh.codes)
    out_kD = x_ND.new_zeros(layout.count, x_ND.shape[1])
    return ops.sum_over(layout.add_(out_kD, ids_B, x_BD), mesh.data)


@torch.no_grad()
def usage(counts_k: Tensor, axis: Axis, num_codes: int, least: float = 0.0) -> dict[str, Tensor]:
    """usage (share of codes with a count above `least`), perplexity exp(H) and the number of dead codes, of all K."""
    c_k = counts_k.to(torch.float64)
    some = (c_k > least).sum().to(torch.float64)
    total, used, clogc = ops.sum_over(torch.stack([c_k.sum(), some, torch.xlogy(c_k, c_k).sum()]), axis)
    entropy = torch.where(total > 0, total.clamp_min(1e-300).log() - clogc / total.clamp_min(1e-300), 0.0)
    return {"usage": used / num_codes, "perplexity": entropy.exp(), "dead": num_codes - used}


def ceiling(num_tokens: int, num_codes: int) -> float:
    """The usage that so many tokens reach on average if every code is as likely: 1 - exp(-T / K). Usage is told beside
    it, because 1000 tokens cannot use 4096 codes."""
    return -math.expm1(-num_tokens / num_codes)


def entropy_of_mean(columns_k: Tensor, num_tokens: int, mesh: Mesh) -> Tensor:
    """Entropy of the mean probability over all tokens of all ranks; columns_k as `Codebook.mix` gives them.

    Every rank has num_tokens tokens. The same number on every rank, and differentiable: K / M numbers travel on the
    data axis, one on the code axis. A code whose mean underflows to zero counts, and pulls, nothing.
    """
    mean_k = ops.sum_over(columns_k, mesh.data) / (num_tokens * mesh.world.size)
    mean_k = mean_k.clamp_min(torch.finfo(mean_k.dtype).tiny)
    return ops.sum_over(-(mean_k * mean_k.log()).sum(), mesh.codes)


class Window(Table):
    """An exponential window of counts over optimiser steps, c <- decay c + (1 - decay) counts, and the age of each row.

    A code is used while its last hit lies within `steps` = 1 / (1 - decay) steps. With decay None the window is as long
    as a code that is used at its fair share needs for FAIR_HITS hits: it follows K and the tokens of a step. A renewed
    row begins again with no hits and age zero; `rate` knows this.
    """

    FAIR_HITS = 5.0
    SHORTEST, LONGEST = 10.0, 10_000.0

    def __init__(self, num_codes: int, mesh: Mesh, decay: float | None = None) -> None:
        super().__init__(Rows(num_codes, mesh.codes.size, mesh.codes.rank))
        self.num_codes, self.axis = num_codes, mesh.codes
        self._follow = decay is None
        first = self.LONGEST if decay is None else 1.0 / (1.0 - decay)
        self.counts_k: Tensor
        self.age_k: Tensor
        self.register_buffer("counts_k", torch.zeros(self.layout.count, device=mesh.device))
        self.register_buffer("age_k", torch.zeros(self.layout.count, device=mesh.device))
        # The same number for every row: a table keeps nothing but rows, and a checkpoint needs it.
        self.length_k: Tensor
        self.register_buffer("length_k", torch.full((self.layout.count,), first, device=mesh.device))
        self._steps: float | None = None

    @property
    def steps(self) -> float:
        """The length of the window; what `add` found last, or a checkpoint brought."""
        if self._steps is None:
            return float(self.length_k[0]) if len(self.length_k) else self.LONGEST
        return self._steps

    def note(self) -> None:
        """Before a pass in a compiled graph, which cannot read the length of the window where the device has it."""
        self._steps = self.steps

    @property
    def decay(self) -> float:
        return 1.0 - 1.0 / self.steps

    @torch.no_grad()
    def add(self, counts_k: Tensor, tokens: int) -> None:
        """Count one optimiser step of so many tokens of all ranks."""
        if self._follow:
            steps = min(max(self.FAIR_HITS * self.num_codes / tokens, self.SHORTEST), self.LONGEST)
            self._steps = torch.tensor(steps).item()  # as a checkpoint holds it
            self.length_k.fill_(self._steps)
        self.counts_k.lerp_(counts_k.to(self.counts_k.dtype), 1.0 - self.decay)
        self.age_k += 1

    @torch.no_grad()
    def restart(self, local_ids: Tensor) -> None:
        """Forget the hits of renewed rows."""
        self.counts_k[local_ids] = 0
        self.age_k[local_ids] = 0

    def rate(self) -> Tensor:
        """Hits per step since the row was renewed, weighted towards the latest steps."""
        return self.counts_k / (1.0 - self.decay**self.age_k).clamp_min(1e-12)

    def usage(self) -> dict[str, Tensor]:
        """usage, perplexity and dead codes of the window, of all K."""
        # What one hit leaves after `steps` steps, with room for rounding.
        return usage(self.counts_k, self.axis, self.num_codes, 0.999 * self.decay**self.steps / self.steps)
