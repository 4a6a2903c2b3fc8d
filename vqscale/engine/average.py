"""A moving average of the weights of a tokenizer: evaluated, and saved beside the weights, which training goes on with.

Every rank keeps the average of what it holds, its part of each parameter at ZeRO stage 3 and its rows of each table, so
that a step costs no message. Rows that an optimiser does not step (moving averages already) have no other average.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vqscale.disk.held import Held
from vqscale.engine.config import AverageConfig
from vqscale.engine.engine import Engine


class Average:
    """The average of the engine's parameters and rows, from their values now on; with decay 0 all of it does nothing.

    In a checkpoint: average/<parameter> and, for rows, average/<table>.<tensor>.
    """

    name = "average"

    def __init__(self, engine: Engine, config: AverageConfig) -> None:
        self._engine, self._config = engine, config
        self.on = config.decay > 0
        self._parts = {name: x.clone() for name, x in engine.dense.parts().items()} if self.on else {}
        self._rows = {name: x.detach().clone() for name, x in engine.rows.items()} if self.on else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """a <- decay a + (1 - decay) w after optimiser step number `step`, from 1; talks to nobody."""
        if not self.on:
            return
        decay = self._config.decay
        if self._config.warmup:
            decay = min(decay, (1 + step) / (10 + step))
        live = self._engine.dense.parts()
        averages = [*self._parts.values(), *self._rows.values()]
        torch._foreach_lerp_(averages, [*(live[name] for name in self._parts), *self._engine.rows.values()], 1 - decay)

    @torch.no_grad()
    def forget(self, parameter: nn.Parameter, local_indices: Tensor) -> None:
        """These rows stand for something new: their averages begin again where they are."""
        for name, average in self._rows.items():
            if self._engine.rows[name] is parameter:
                average[local_indices] = parameter.detach()[local_indices]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The engine's module and rows have the averages inside the block, and their own values again, to the bit,
        after it. Not to be stepped inside. Collective.

        After an error inside they are put back too, but for parameters that are divided over ranks (ZeRO stage 3):
        that is collective, and the error may be of this rank alone.
        """
        own = {name: x.clone() for name, x in self._engine.dense.parts().items()} if self.on else {}
        own_rows = {name: self._engine.rows[name].detach().clone() for name in self._rows}
        self._put(self._parts, self._rows)
        try:
            yield
        except BaseException:
            self._put({} if self._engine.dense.divided else own, own_rows)
            raise
        self._put(own, own_rows)

    @torch.no_grad()
    def _put(self, parts: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> None:
        for name, part in parts.items():
            self._engine.dense.put(name, self._engine.dense.join(name, part))
        for name, row in rows.items():
            self._engine.rows[name].copy_(row)

    def held(self) -> tuple[dict[str, Held], dict[str, Tensor], dict[str, Any]]:
        """(held, rows, facts) as an engine's; empty without an average."""
        part = self._engine.dense.held_part
        return {name: part(name, x) for name, x in self._parts.items()}, dict(self._rows), {}

    def loaded(self, facts: Mapping[str, Any]) -> None:
        """Nothing is left to do when what `held` gave has been filled."""
