"""A network that a tokenizer learns against, with an engine of its own: a discriminator, the map of an alignment.

Its weights are frozen but for its own block: a backward pass of the tokenizer that reached them would fill the buckets
of the other engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from vqscale.disk.held import Held
from vqscale.engine.engine import Engine


class Beside:
    """Abstract: what is the same of all of them. In a checkpoint it is under its `name` (loop.Kept)."""

    name: str

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        engine.module.requires_grad_(False)

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Gradients reach its weights inside, and nowhere else."""
        self.engine.module.requires_grad_(True)
        yield
        self.engine.module.requires_grad_(False)

    def held(self) -> tuple[dict[str, Held], dict[str, Tensor], dict[str, Any]]:
        """(held, rows, facts) as an engine's."""
        with self.learning():  # ZeRO-3 has no moments to show of what is frozen
            return self.engine.held()

    def loaded(self, facts: Mapping[str, Any]) -> None:
        """Go on from what was filled; collective."""
        with self.learning():
            self.engine.loaded(facts)
