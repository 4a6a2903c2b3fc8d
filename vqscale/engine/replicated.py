"""The plain engine of the replicated parameters: every rank holds all of them, their gradients and their moments.

It is what the DeepSpeed engine (zero.py) is compared with, step by step, and it needs neither it nor a compiler.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from vqscale.disk.held import Held, shared
from vqscale.engine import optimisers
from vqscale.engine.config import EngineConfig, OptimConfig
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh


class Replicated:
    """One module's trainable parameters, averaged and stepped the plain way."""

    whole = True  # every rank holds all gradients, so one of them counts in the norm
    divided = False

    def __init__(self, module: nn.Module, config: EngineConfig, optim: OptimConfig, mesh: Mesh) -> None:
        self._module, self._mesh, self._low = module, mesh, config.sends_bf16
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._adam = optimisers.build(module, optim) if self._parameters else None
        if self._adam is not None:
            self._adam.prepare(self._parameters.values())

    def forward(self, *args: Any) -> Any:
        return self._module(*args)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def advance(self) -> None:
        """A micro-batch that is not the last of its step: gradients stay where they are."""

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        """All gradients, averaged over the world in one flat buffer per dtype; zeros where there were none. In bfloat16
        every rank rounds its own, and each sum is rounded."""
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = defaultdict(list)
        for p in self._parameters.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            by_dtype[p.dtype].append(p)
        for members in by_dtype.values() if self._mesh.world.size > 1 else ():
            flat = torch.cat([p.grad.flatten() for p in members if p.grad is not None])
            sent = flat.bfloat16() if self._low else flat
            flat = ops.sum_over(sent, self._mesh.world).div_(self._mesh.world.size).to(flat.dtype)
            for p, part in zip(members, flat.split([p.numel() for p in members]), strict=True):
                p.grad = part.view_as(p)
        return [p.grad for p in self._parameters.values() if p.grad is not None]

    def apply(self, lr: float, decay_share: float, skip: bool) -> None:
        """Step with what `gradients` returned, or change nothing; either way the gradients are gone afterwards."""
        if self._adam is not None and not skip:
            self._adam.set_rates(lr, decay_share)
            self._adam.step()
        for p in self._parameters.values():
            p.grad = None

    def held(self) -> dict[str, Held]:
        """What this rank holds of parameters and moments, alive: parameter/NAME, exp_avg/NAME, exp_avg_sq/NAME (of
        matrices under Muon momentum_buffer/NAME). All names on every rank, though it may hold nothing of one."""
        return held_whole(self._module, self._parameters, self._adam)

    def loaded(self, steps: int) -> None:
        """Go on from what `held` gave, which has been filled, after `steps` steps. Collective at ZeRO stage 3."""
        if self._adam is not None:
            self._adam.set_steps(steps)

    def parts(self) -> dict[str, Tensor]:
        """The live values of what learns, as far as this rank holds them: here all. To be read, not changed."""
        return {name: p.detach() for name, p in self._parameters.items()}

    def join(self, name: str, part: Tensor) -> Tensor:
        """The whole of what has the form of a part. Collective where parts are not whole."""
        return part

    def held_part(self, name: str, part: Tensor) -> Held:
        """What has the form of a part, as what this rank holds of a whole."""
        return shared(part)

    @torch.no_grad()
    def put(self, name: str, tensor: Tensor) -> None:
        """Other values for a parameter, to compute with until the next `put`; the optimiser does not see them, so that
        the values it left must be back before the next step. Collective where parts are not whole."""
        self._parameters[name].copy_(tensor)


def held_whole(module: nn.Module, trainable: dict[str, nn.Parameter], adam: optimisers.AdamW | None) -> dict[str, Held]:
    """`held` where every rank holds whole parameters and moments."""
    out = {f"parameter/{name}": shared(p) for name, p in module.named_parameters()}
    for name, p in trainable.items() if adam is not None else ():
        assert adam is not None
        out |= {f"{key}/{name}": shared(moment) for key, moment in adam.moments(p).items()}
    return out
