"""Persistent buffers (running statistics of batch norms and the like), kept equal on all ranks.

Not here: rows of codes and their statistics. They are split over ranks and set aside before an engine sees the module.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh


class Buffers:
    """The persistent buffers of a module, averaged over the world after each step, but for whole numbers: these count
    steps, and are the same on all ranks by themselves.

    They are averaged in float64, in which sums of equal numbers are exact: a constant stays what it is to the bit; so
    do those of a module that says that it is `frozen`, of whatever type, which are not averaged at all. A
    batch that is not finite ruins running statistics in its forward pass already, before its step can be skipped.
    """

    def __init__(self, module: nn.Module, mesh: Mesh) -> None:
        self._module, self._mesh = module, mesh
        self._kept = self._flat()

    def named(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, module in self._module.named_modules():
            for name, buffer in _persistent(module):
                yield f"{prefix}.{name}" if prefix else name, buffer

    def _averaged(self) -> Iterator[Tensor]:
        for module in self._module.modules():
            if getattr(module, "frozen", None) is not True:
                yield from (buffer for _, buffer in _persistent(module) if buffer.is_floating_point())

    def _flat(self) -> Tensor | None:
        parts = [buffer.detach().to(torch.float64).flatten() for buffer in self._averaged()]
        return torch.cat(parts) if parts else None

    @torch.no_grad()
    def average(self) -> None:
        """Average the buffers over the world; what is not finite on some rank goes back to what it last was."""
        if self._kept is None:
            return
        flat = self._flat()
        assert flat is not None
        mean = ops.sum_over(flat, self._mesh.world) / self._mesh.world.size
        self._kept = torch.where(mean.isfinite(), mean, self._kept)
        start = 0
        for buffer in self._averaged():
            buffer.copy_(self._kept[start : start + buffer.numel()].view_as(buffer))
            start += buffer.numel()


def _persistent(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers of a module itself that are saved."""
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer
