"""What a learned table needs beside its gradient: first values from data, a window of counts, revival of dead codes.

None of it happens by itself: a training loop calls `begin` once and `update` after each optimiser step. A quantizer
that nobody drives keeps the rows that it was built with.

All choices are functions of (seed, step) and of the global batch in its global order, so every rank and every number of
processes makes the same ones. What is sent is bounded by the candidates (P x D), not by K, and where no code is dead it
is one number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vqscale.codes import noise, tally
from vqscale.codes.codebook import Codebook, look_up
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
    return _tokens_at(chosen_P, x_ND, mesh)


@torch.no_grad()
def choose_by_use(x_ND: Tensor, use_N: Tensor, num: int, mesh: Mesh, seed: int) -> Tensor:
    """`num` tokens of the global batch, drawn without replacement in proportion to use_N: P x D, the same on every
    rank, in the order of the draw.

    The largest of log(use) + Gumbel noise, which is a function of (seed, place in the global batch). Every rank sends
    as many numbers, and then what is left is as in `choose`.
    """
    count, world = len(x_ND), mesh.world
    assert num <= count * world.size, f"{num} candidates asked of {count * world.size} tokens"
    places_N = torch.arange(count, device=x_ND.device) + count * world.rank
    score_N = (
        use_N.double().clamp_min(1e-30).log() + noise.gumbel(noise.keys(seed, places_N), 0, 1, torch.float64)[:, 0]
    )
    mine = score_N.topk(min(num, count))
    score_P, places_P = ops.gather(mine.values, world), ops.gather(places_N[mine.indices], world)
    return _tokens_at(places_P[score_P.topk(num).indices], x_ND, mesh)


def _tokens_at(places_P: Tensor, x_ND: Tensor, mesh: Mesh) -> Tensor:
    """The tokens at these places of the global batch, P x D, on every rank: each from the rank that has it."""
    local_P = places_P - len(x_ND) * mesh.world.rank
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


@dataclass(frozen=True)
class Filled:
    """Of the first values of a table: the last `drawn` of its codes became tokens, of the `tokens` that were seen."""

    tokens: int
    drawn: int
    num_codes: int


class Upkeep(nn.Module):
    """Watches a codebook in training: `observe` in each forward pass, `update` after each optimiser step."""

    def __init__(self, codebook: Codebook, config: UpkeepConfig, mesh: Mesh, seed: int) -> None:
        super().__init__()
        self.config, self.mesh, self.seed = config, mesh, seed
        self._codebook = [codebook]  # in a list: it is the quantizer's child, not also ours
        self.window = tally.Window(codebook.num_codes, mesh, config.window_decay)
        self._tokens = 0
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # always in host memory, see _apply
        self.driven = self.settled = self.frozen = False
        self.filled: Filled | None = None  # by the last update, if it was the one that completed the first values
        self._counts_k: Tensor | None = None
        self._latest: tuple[Tensor, Tensor] | None = None
        self._noted: tuple[bool, float | Tensor] | None = None  # warming and landing, as a graph reads them
        self._share: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Upkeep:
        """Move all to a device but the number of steps: every step looks at it, and must not wait for a GPU."""
        steps = self._buffers.pop("steps")
        try:
            return super()._apply(fn, recurse)
        finally:
            self._buffers["steps"] = steps

    def begin(self) -> None:
        """From here on a training loop calls `update`; with init: data the warm-up begins."""
        self.driven = True

    def settle(self) -> None:
        """The rows are those of another training: no warm-up, no first values from data, no landing."""
        self.settled = True

    def freeze(self) -> None:
        """The rows stand still: hits are counted, and no row is drawn or revived."""
        self.settled = self.frozen = True

    @property
    def _from_data(self) -> bool:
        return self.config.init == "data" and not self.settled

    @property
    def warming(self) -> bool:
        """True while tokens pass unquantized because the rows have not been drawn from data yet."""
        if self._noted is not None and torch.compiler.is_compiling():
            return self._noted[0]
        return self.driven and self._from_data and int(self.steps) < self.config.warmup_steps

    @property
    def beginning(self) -> tuple[int, int]:
        """(steps of the warm-up, steps until tokens are given whole codes) of a driven training."""
        if self.settled:
            return 0, 0
        first = self.config.warmup_steps if self.config.init == "data" else 0
        return first, first + self.config.landing_steps

    @property
    def landing(self) -> float | Tensor:
        """How much of its code a token is given: 0 in the warm-up, 1 when landing_steps more are over."""
        if self._noted is not None and torch.compiler.is_compiling():
            return self._noted[1]
        return self._landing()

    def _landing(self) -> float:
        first, landed = self.beginning
        if not self.driven or landed == 0:
            return 1.0
        return min(1.0, max(0, int(self.steps) - first + 1) / (landed - first + 1))

    def note(self) -> None:
        """Before a pass in a compiled graph: what the number of steps decides, which no graph can ask the host for.

        What changes a few times in a run is a constant, and a graph of its own each time. The share of a landing, which
        changes with every step, is a tensor at one address: nothing is compiled, or captured, again for it.
        """
        landing: float | Tensor = self._landing()
        if 0.0 < landing < 1.0:
            if self._share is None:
                self._share = torch.zeros((), dtype=torch.float64, device=self._codebook[0].rows.device)
            landing = self._share.fill_(landing)
        self._noted = self.warming, landing
        self.window.note()

    def shortages(self, tokens: int) -> list[str]:
        """What is told beforehand of a warm-up that sees too few tokens, `tokens` of all ranks in a pass."""
        warmup, num_codes = self.config.warmup_steps, self._codebook[0].num_codes
        if not self._from_data or num_codes <= warmup * tokens:
            return []
        revived = (
            f"revival gives them to tokens, at most {self._most(tokens):,} a time"
            if self.config.revive_every
            else "and without revival (revive_every: 0) that is what most of them stay"
        )
        return [
            f"warning: {num_codes:,} codes (num_codes) are more than the {warmup:,} steps of the warm-up x {tokens:,} "
            f"tokens = {warmup * tokens:,} that rows are drawn from: the other {num_codes - warmup * tokens:,} rows "
            f"begin normal with the mean and covariance of those, {revived}. "
            f"A warm-up of {-(-num_codes // tokens):,} steps (warmup_steps) has a token for every row"
        ]

    @torch.no_grad()
    def observe(self, x_ND: Tensor, ids_N: Tensor) -> Tensor | None:
        """Count the tokens of one forward pass; several may come before an `update` (accumulation).

        Returns the counts of these tokens, of all ranks, for the rows here; None where nobody drives.
        """
        if not self.driven:
            return None
        counts_k = tally.counts(ids_N, self.window.layout, self.mesh)
        self._counts_k = counts_k if self._counts_k is None else self._counts_k + counts_k
        self._latest = (x_ND.detach(), ids_N)
        self._tokens += len(x_ND) * self.mesh.world.size
        return counts_k

    @torch.no_grad()
    def update(self, stepped: bool = True, back: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """After an optimiser step: count it, then draw first values or revive. Returns the local rows that changed.

        `back` makes rows of the tokens with which codes are revived, where a code is not its row. A step that was
        skipped leaves no trace.
        """
        codebook, config = self._codebook[0], self.config
        changed = torch.zeros(0, dtype=torch.int64, device=codebook.rows.device)
        counts_k, latest, tokens = self._counts_k, self._latest, self._tokens
        self._counts_k, self._latest, self._tokens, self.filled = None, None, 0, None
        if counts_k is None or latest is None or not stepped:
            return changed
        x_ND, ids_N = latest
        if not self.warming:
            self.window.add(counts_k, tokens)
        step, candidates = int(self.steps), len(x_ND) * self.mesh.world.size
        self.steps += 1
        if self.frozen:
            return changed
        if self._from_data and step < config.warmup_steps:
            left = config.warmup_steps - 1 - step
            num = min(candidates, codebook.num_codes)
            changed = self._fill(x_ND, left, num)
            if not left:
                self.filled = self._summed_up(num, candidates)
        elif config.revive_every and step % config.revive_every == 0:
            most = min(candidates, codebook.num_codes, self._most(candidates))
            changed = self._revive(x_ND, ids_N, step, most, tokens, back)
        return changed

    def _fill(self, x_ND: Tensor, left: int, num: int) -> Tensor:
        """In the last steps of the warm-up, as many as it takes, draw a part of the rows from the global batch."""
        codebook = self._codebook[0]
        first = codebook.num_codes - (left + 1) * num
        if first <= -num:
            return torch.zeros(0, dtype=torch.int64, device=x_ND.device)
        ids = torch.arange(max(first, 0), first + num, device=x_ND.device)
        values = choose(x_ND, len(ids), self.mesh, derive(self.seed, "fill", left))
        return self._put(ids, values)

    def _summed_up(self, num: int, candidates: int) -> Filled:
        """The first values, `num` of so many tokens in each of the steps that it took or that there were."""
        steps = min(self.config.warmup_steps, -(-self._codebook[0].num_codes // num))
        drawn = min(self._codebook[0].num_codes, steps * num)
        return Filled(steps * candidates, drawn, self._codebook[0].num_codes)

    def _most(self, candidates: int) -> int:
        """How many codes are revived at a time, at most."""
        return max(1, candidates // 4) if self.config.revive_most is None else self.config.revive_most

    def _put(self, ids: Tensor, values: Tensor) -> Tensor:
        """Replace rows by values that are numbers; a row whose token is none stays. Returns the local rows."""
        return self._codebook[0].replace(torch.where(values.isfinite().all(1), ids, -1), values)

    def _revive(
        self,
        x_ND: Tensor,
        ids_N: Tensor,
        step: int,
        num: int,
        tokens: int,
        back: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """Give dead codes, of which a step's `tokens` make too little use, the values of tokens of this batch."""
        codebook, window = self._codebook[0], self.window
        dead_k = self._dead(tokens)
        num = min(num, int(ops.sum_over(dead_k.sum(), codebook.axis)))
        if not num:
            return torch.zeros(0, dtype=torch.int64, device=dead_k.device)
        first = derive(self.seed, "turn", step) % codebook.num_codes
        ids = dead_ids(dead_k, num, first, codebook)
        values = self._candidates(x_ND, ids_N, num, derive(self.seed, "revive", step))
        changed = self._put(ids, values if back is None else back(values))
        window.restart(changed)
        return changed

    def _dead(self, tokens: int) -> Tensor:
        """Which rows of this rank had their time, and have less than a share of their fair share of hits."""
        window, config = self.window, self.config
        patience = config.revive_patience / window.FAIR_HITS * window.steps
        patience = patience if config.revive_after is None else config.revive_after
        rare_k = window.rate() < config.revive_below * tokens / self._codebook[0].num_codes
        return (window.age_k >= patience) & rare_k

    def _candidates(self, x_ND: Tensor, ids_N: Tensor, num: int, seed: int) -> Tensor:
        if self.config.revive_from == "tokens":
            return choose(x_ND, num, self.mesh, seed)
        counts_k1, codebook = self.window.counts_k[:, None], self._codebook[0]
        use_N = look_up(counts_k1, ids_N, codebook.layout, codebook.axis)[:, 0]
        return choose_by_use(x_ND, use_N, num, self.mesh, seed)
