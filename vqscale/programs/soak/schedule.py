"""What is done to a training and when: a pure function of the seed, the round and the training. No torch here.

An attack comes when the training has logged its step, so every training gets to its end: one that is thrown back does
some steps again and then meets the next attack, which is not earlier.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "kill one rank",
    "kill all",
    "stop one rank",
    "stop all",
    "TERM to one rank",
    "TERM to all ranks",
    "TERM to the launcher",
    "damage the newest checkpoint",
    "fill the disk",
]
KINDS: tuple[Kind, ...] = Kind.__args__  # type: ignore[attr-defined]
ENDS = frozenset(kind for kind in KINDS if kind.startswith(("kill", "TERM", "damage")))
"""what no training survives; the others it may"""
WHILE_SAVING = ("kill one rank", "kill all", "stop one rank", "damage the newest checkpoint", "fill the disk")
WHILE_STARTING = ("kill all", "TERM to the launcher")

Moment = Literal["a step", "a save", "the start"]


@dataclass(frozen=True)
class Attack:
    """One thing that is done to a training."""

    kind: Kind
    moment: Moment
    step: int
    """of the training when it is done; of a save the step that is saved; nothing at the start"""
    seconds: float
    """that a rank stands still, the disk is full, or, at the start, passed since it"""
    share: float
    """which rank, or which file and byte: this share of them, below 1"""
    processes: int
    """of the start after it, if it ends the training"""

    def one_of(self, number: int) -> int:
        """The one of so many that it is done to."""
        return int(self.share * number)


def schedule(
    seed: int, place: str, number: int, steps: int, save_every: int, processes: Sequence[int]
) -> tuple[Attack, ...]:
    """The attacks on a training of so many steps; `place` names it, `processes` are what its starts may have. Every
    kind is there before any is there again."""
    draw = random.Random(f"{seed} {place}")
    at = sorted(draw.randrange(1, max(2, steps)) for _ in range(number))
    kinds = [kind for _ in range(-(-number // len(KINDS))) for kind in draw.sample(KINDS, len(KINDS))]
    return tuple(
        _attack(draw, kind, step, steps, save_every, processes) for kind, step in zip(kinds[:number], at, strict=True)
    )


def _attack(
    draw: random.Random, kind: Kind, step: int, steps: int, save_every: int, processes: Sequence[int]
) -> Attack:
    chance, seconds, share, then = draw.random(), draw.uniform(0.5, 8.0), draw.random(), draw.choice(processes)
    saved = -(-step // save_every) * save_every
    if kind in WHILE_STARTING and chance < 0.3:
        return Attack(kind, "the start", 0, seconds, share, then)
    if kind in WHILE_SAVING and chance < 0.5 and saved < steps:
        return Attack(kind, "a save", saved, seconds, share, then)
    return Attack(kind, "a step", step, seconds, share, then)
