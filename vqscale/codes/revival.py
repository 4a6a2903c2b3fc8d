"""What a learned table needs beside its gradient: first values from data, a window of counts, revival of dead codes.

None of it happens by itself: a training loop calls `begin` once and `update` after each optimiser step. A quantizer
that nobody drives keeps the rows that it was built with.

All choices are functions of (seed, step) and of the global batch in its global order, so every rank and every number of
processes makes the same ones. What is sent is bounded by the candidates (P x D), not by K.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqscale.codes import tally
from vqscale.codes.codebook import Codebook
from vqscale.codes.config import UpkeepConfig
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.seed import derive


@torch.no_grad()
def choose(x_ND: Tensor, num: int, mesh: Mesh, seed: int) -> Tensor:
    """`num` tokens of the global batch, drawn without replacement by `seed`: P x D, the same on every rank."""
    total = len(x_ND) * mesh.world.size
    assert num <= total, f"{num} candidates asked of {total} tokens"
    chosen_P = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:num].to(x_ND.device)
    local_P = chosen_P - len(x_ND) * mesh.world.rank
    mine_P = (local_P >= 0) & (local_P < len(x_ND))
    return ops.sum_over(x_ND[torch.where(mine_P, local_P, 0)] * mine_P[:, None], mesh.world)


@torch.no_grad()
def dead_ids(dead_k: Tensor, num: int, first: int, codebook: Codebook) -> Tensor:
    """Up to `num` global ids of dead rows, filled up with -1: in the order of ids, from `first` on and then from 0.

    The same on every rank. `first` is drawn anew each time, or the codes with low ids would always be revived first.
    """
    layout, total = codebook.layout, codebook.num_codes
    dead = torch.nonzero(dead_k)[:, 0] + layout.start
    keys = torch.sort((dead - first) % total).values[:num]
    padded = torch.full((num,), total, dtype=torch.int64, device=dead_k.device)
    padded[: len(keys)] = keys
    keys = torch.sort(ops.gather(padded, codebook.axis)).values[:num]
    return torch.where(keys < total, (keys + first) % total, -1)


class Upkeep(nn.Module):
    """Watches a codebook in training: `observe` in each forward pass, `update` after each optimiser step."""

    def __init__(self, codebook: Codebook, config: UpkeepConfig, mesh: Mesh, seed: int) -> None:
        super().__init__()
        self.config, self.mesh, self.seed = config, mesh, seed
        self._codebook = [codebook]  # in a list: it is the quantizer's child, not also ours
        self.window = tally.Window(codebook.num_codes, mesh, config.window_decay)
        self._tokens = 0
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.driven = False
        self._counts_k: Tensor | None = None
        self._latest_ND: Tensor | None = None

    def begin(self) -> None:
        """From here on a training loop calls `update`; with init: data the warm-up begins."""
        self.driven = True

    @property
    def warming(self) -> bool:
        """True while tokens pass unquantized because the rows have not been drawn from data yet."""
        return self.driven and self.config.init == "data" and int(self.steps) < self.config.warmup_steps

    @torch.no_grad()
    def observe(self, x_ND: Tensor, ids_N: Tensor) -> Tensor | None:
        """Count the tokens of one forward pass; several may come before an `update` (accumulation).

        Returns the counts of these tokens, of all ranks, for the rows here; None where nobody drives.
        """
        if not self.driven:
            return None
        counts_k = tally.counts(ids_N, self.window.layout, self.mesh)
        self._counts_k = counts_k if self._counts_k is None else self._counts_k + counts_k
        self._latest_ND = x_ND.detach()
        self._tokens += len(x_ND) * self.mesh.world.size
        return counts_k

    @torch.no_grad()
    def update(self, stepped: bool = True) -> Tensor:
        """After an optimiser step: count it, then draw first values or revive. Returns the local rows that changed.

        A step that was skipped leaves no trace.
        """
        codebook, config = self._codebook[0], self.config
        changed = torch.zeros(0, dtype=torch.int64, device=codebook.rows.device)
        counts_k, x_ND, tokens = self._counts_k, self._latest_ND, self._tokens
        self._counts_k, self._latest_ND, self._tokens = None, None, 0
        if counts_k is None or x_ND is None or not stepped:
            return changed
        if not self.warming:
            self.window.add(counts_k, tokens)
        step, candidates = int(self.steps), len(x_ND) * self.mesh.world.size
        self.steps += 1
        if config.init == "data" and step < config.warmup_steps:
            left = config.warmup_steps - 1 - step
            changed = self._fill(x_ND, left, min(candidates, codebook.num_codes))
        elif config.revive_every and step % config.revive_every == 0:
            most = max(1, candidates // 4) if config.revive_most is None else config.revive_most
            changed = self._revive(x_ND, step, min(candidates, codebook.num_codes, most), tokens)
        return changed

    def _fill(self, x_ND: Tensor, left: int, num: int) -> Tensor:
        """In the last steps of the warm-up, as many as it takes, draw a part of the rows from the global batch."""
        codebook = self._codebook[0]
        first = codebook.num_codes - (left + 1) * num
        if first <= -num:
            return torch.zeros(0, dtype=torch.int64, device=x_ND.device)
        ids = torch.arange(max(first, 0), first + num, device=x_ND.device)
        values = choose(x_ND, len(ids), self.mesh, derive(self.seed, "fill", left))
        return codebook.replace(ids, values)

    def _revive(self, x_ND: Tensor, step: int, num: int, tokens: int) -> Tensor:
        """Give dead codes, of which a step's `tokens` make too little use, the values of tokens of this batch."""
        codebook, window, config = self._codebook[0], self.window, self.config
        patience = 2 * window.steps if config.revive_after is None else config.revive_after
        dead_k = (window.age_k >= patience) & (window.rate() < config.revive_below * tokens / codebook.num_codes)
        first = derive(self.seed, "turn", step) % codebook.num_codes
        ids = dead_ids(dead_k, num, first, codebook)
        changed = codebook.replace(ids, choose(x_ND, num, self.mesh, derive(self.seed, "revive", step)))
        window.restart(changed)
        return changed
