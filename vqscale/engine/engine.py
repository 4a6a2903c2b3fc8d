"""Engine: forward, backward and step of one network, whose rows over the code axis are stepped beside the rest.

                        gradients of a rank                       what the step uses
    replicated          of its own loss                           their mean over the world
    rows (K split)      of the losses of its code group, summed   their sum over the data axis / (M x replicas)

so that a fixed global batch gives the same step on any mesh. With `communication: bf16` the first row is sent rounded,
and held in float32. One norm over both kinds, every parameter counted once, clips both. A step whose gradients are not
finite anywhere is skipped everywhere. The replicated part is DeepSpeed's (zero.py) or the plain twin's (replicated.py);
all of this file is the same for both. Not here: what is trained, in which order, and when to save.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vqscale.disk.held import Held, shared
from vqscale.engine import optimisers
from vqscale.engine.buffers import Buffers
from vqscale.engine.config import EngineConfig, OptimConfig
from vqscale.engine.replicated import Replicated
from vqscale.engine.schedule import decay_share, learning_rate
from vqscale.parallel import ops
from vqscale.parallel.clock import clock
from vqscale.parallel.mesh import Mesh

SQUARED_TOGETHER = {"cpu": 2**18, "cuda": 2**22}


@dataclass(frozen=True)
class StepReport:
    """What `step` did: the same on every rank. Between accumulated micro-batches only `lr` says something."""

    boundary: bool
    """the last micro-batch of a step, whether or not the step was taken"""
    stepped: bool
    """parameters changed; False at a boundary means that the gradients were not finite"""
    grad_norm: float
    """over all parameters, each counted once, before clipping; nan or inf where the step was skipped"""
    lr: float


class Dense(Protocol):
    """The replicated parameters of a module: how they are held, averaged and stepped. See replicated.py, zero.py."""

    whole: bool
    """`gradients` gives all of them on every rank; else each rank has a part and the parts are disjoint"""
    divided: bool
    """what a rank holds of a parameter is a share of it, so that join and put are collective"""

    def forward(self, *args: Any) -> Any: ...
    def backward(self, loss: Tensor) -> None: ...
    def advance(self) -> None: ...
    def gradients(self) -> list[Tensor]: ...
    def apply(self, lr: float, decay_share: float, skip: bool) -> None: ...
    def held(self) -> dict[str, Held]: ...
    def loaded(self, steps: int) -> None: ...

    # The live values of what learns, for averages of weights: each rank may hold a part of each parameter.
    def parts(self) -> dict[str, Tensor]: ...
    def join(self, name: str, part: Tensor) -> Tensor: ...
    def held_part(self, name: str, part: Tensor) -> Held: ...
    def put(self, name: str, whole: Tensor) -> None: ...


def _dense(module: nn.Module, config: EngineConfig, optim: OptimConfig, mesh: Mesh) -> Dense:
    if config.name == "torch":
        return Replicated(module, config, optim, mesh)
    from vqscale.engine.zero import Zero  # imports deepspeed, which takes seconds and wants a compiler

    return Zero(module, config, optim, mesh)


class Engine:
    """Engine(module, rows, ...): `module` holds what all ranks have, `rows` this rank's slices by name (k x ...).

    Making one is collective. All ranks start from rank 0's parameters and buffers, and from the first replica's rows.
    For every micro-batch: call the engine, `backward`, `step`; `module` stays usable for everything but a forward pass
    that is trained through at stage 3. `dense` holds the parameters of `module`.
    """

    def __init__(
        self,
        module: nn.Module,
        rows: Mapping[str, nn.Parameter],
        config: EngineConfig,
        optim: OptimConfig,
        mesh: Mesh,
        total_steps: int,
    ) -> None:
        self.module, self.rows, self.mesh = module, dict(rows), mesh
        self._config, self._optim, self._total_steps = config, optim, total_steps
        with torch.no_grad():
            every = [*module.parameters(), *module.buffers()]
            # a count that the host keeps (codes/revival.py) begins at the same number everywhere
            ops.broadcast_([x for x in every if x.device.type == mesh.device.type], mesh.world)
            ops.broadcast_(list(self.rows.values()), mesh.data)
        self._buffers = Buffers(module, mesh)
        self._learned = {name: row for name, row in self.rows.items() if row.requires_grad}
        self._rows_adam = None
        if self._learned:
            group = {"params": list(self._learned.values()), "weight_decay": optim.rows_weight_decay}
            self._rows_adam = optimisers.AdamW([group], optim, fused=True)
            self._rows_adam.prepare(self._learned.values())
        self.dense = _dense(module, config, optim, mesh)
        self._micro = self._boundaries = self._skipped = self._skipped_in_a_row = 0

    @property
    def lr(self) -> float:
        """The learning rate of the step that is being gathered."""
        return learning_rate(self._boundaries, self._optim, self._total_steps)

    @property
    def skipped(self) -> int:
        """Steps skipped so far because gradients were not finite."""
        return self._skipped

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the forward pass, for calls that do not go through the engine."""
        return torch.autocast(self.mesh.device.type, torch.bfloat16, enabled=self._config.precision == "bf16")

    @clock.span("forward")
    def __call__(self, *args: Any) -> Any:
        with self.autocast():
            return self.dense.forward(*args)

    @clock.span("backward")
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, a mean over this rank's tokens, divided by the number of micro-batches."""
        self.dense.backward(loss / self._config.accumulation)

    @clock.span("step")
    def step(self) -> StepReport:
        """End a micro-batch; with the last one of a step, average, clip and step. Collective, the same on all ranks.

        FloatingPointError on all ranks when more than max_skipped steps in a row were skipped.
        """
        lr = self.lr
        self._micro += 1
        if self._micro < self._config.accumulation:
            self.dense.advance()
            return StepReport(False, False, 0.0, lr)
        self._micro = 0
        dense, rows = self.dense.gradients(), self._rows_gradients()
        norm = self._norm(dense, rows)
        finite = math.isfinite(norm)
        if finite and 0 < self._config.clip_norm < norm:
            for gradient in dense + rows:
                gradient.mul_(self._config.clip_norm / norm)
        share = decay_share(self._boundaries, self._total_steps)
        self.dense.apply(lr, share, skip=not finite)
        if self._rows_adam is not None and finite:
            self._rows_adam.set_rates(lr * self._optim.rows_lr_factor, share)
            self._rows_adam.step()
        for row in self.rows.values():
            row.grad = None
        self._buffers.average()
        self._boundaries += 1
        self._count(finite, norm)
        return StepReport(True, finite, norm, lr)

    @torch.no_grad()
    def _rows_gradients(self) -> list[Tensor]:
        """The averaged gradients of this rank's rows, zeros where there were none."""
        for row in self._learned.values():
            row.grad = torch.zeros_like(row) if row.grad is None else row.grad
            row.grad = ops.sum_over(row.grad, self.mesh.data).div_(self.mesh.codes.size * self.mesh.data.size)
        return [row.grad for row in self._learned.values() if row.grad is not None]

    def _norm(self, dense: list[Tensor], rows: list[Tensor]) -> float:
        """The norm over all parameters of the world, the same on all ranks; not finite if any gradient is not."""
        parts = dense if not self.dense.whole or self.mesh.world.rank == 0 else []
        parts = parts + rows if self.mesh.data.rank == 0 else parts
        square = _sum_of_squares(parts, self.mesh.device)
        return math.sqrt(ops.sum_over(square, self.mesh.world).item())

    def _count(self, finite: bool, norm: float) -> None:
        self._skipped += not finite
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        if self._skipped_in_a_row > self._config.max_skipped:
            raise FloatingPointError(
                f"{self._skipped_in_a_row} steps in a row had gradients that are not finite (the last norm: {norm}), "
                f"and engine.max_skipped allows {self._config.max_skipped}: lower optim.lr or engine.clip_norm, "
                "look at the batches of these steps, or resume from an older checkpoint"
            )

    @torch.no_grad()
    def forget(self, parameter: nn.Parameter, local_indices: Tensor) -> None:
        """Zero the moments of these rows (local numbers): they stand for something new."""
        if self._rows_adam is not None and parameter in self._rows_adam.state:
            for key in optimisers.MOMENTS:
                self._rows_adam.state[parameter][key][local_indices] = 0

    def held(self) -> tuple[dict[str, Held], dict[str, Tensor], dict[str, Any]]:
        """(held, rows, facts): everything a step depends on, by name, as this rank holds it; rows are its slices.

        Names and shapes are the same whatever the engine, the stage and the world. Nothing is copied or sent: tensors
        change with the next step, and who fills them goes on from other ones, see `loaded`. Between steps only.
        """
        assert self._micro == 0, f"{self._micro} micro-batches of a step are under way"
        buffers = {f"buffer/{name}": shared(buffer) for name, buffer in self._buffers.named()}
        facts = {"boundaries": self._boundaries, "skipped": self._skipped, "in_a_row": self._skipped_in_a_row}
        return {**self.dense.held(), **buffers}, self._rows_tensors(), facts

    @torch.no_grad()
    def loaded(self, facts: Mapping[str, Any]) -> None:
        """Continue from what `held` showed, now that all of it was filled from another engine, stage or world with
        these facts. Collective."""
        self._boundaries, self._skipped = int(facts["boundaries"]), int(facts["skipped"])
        self._skipped_in_a_row = int(facts["in_a_row"])
        steps = self._boundaries - self._skipped
        self.dense.loaded(steps)
        if self._rows_adam is not None:
            self._rows_adam.set_steps(steps)

    def _rows_tensors(self) -> dict[str, Tensor]:
        out = {f"parameter/{name}": row.detach() for name, row in self.rows.items()}
        if self._rows_adam is not None:
            for key in optimisers.MOMENTS:
                out |= {f"{key}/{name}": self._rows_adam.state[row][key] for name, row in self._learned.items()}
        return out


def _sum_of_squares(parts: list[Tensor], device: torch.device) -> Tensor:
    """In float64, where the square of a finite float32 stays finite and the order of summing does not show; in pieces
    that stay in the caches, because a whole gradient in float64 takes twice its memory, and three times as long.
    """
    piece = torch.empty(SQUARED_TOGETHER[device.type], dtype=torch.float64, device=device)
    square = torch.zeros((), dtype=torch.float64, device=device)
    for part in parts:
        for values in part.reshape(-1).split(len(piece)):
            wide = piece[: len(values)].copy_(values)
            square += wide.dot(wide)
    return square
