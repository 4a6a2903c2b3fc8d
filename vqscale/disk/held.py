"""What a rank holds of the tensors of a training, and which of it a rank writes. Pure arithmetic on views."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Held:
    """Elements of a flattened tensor from `start` on, as they lie in this rank's memory: to be read, or filled.

    With `shared` every rank holds the same elements; else no other rank holds any of these.
    """

    flat: Tensor
    start: int
    shape: tuple[int, ...]
    """of the whole tensor"""
    shared: bool = False

    def part(self, low: int, high: int) -> Held:
        """Elements [low, high) of what is held."""
        return Held(self.flat[low:high], self.start + low, self.shape, self.shared)


def shared(tensor: Tensor) -> Held:
    """A tensor that every rank holds all of."""
    return Held(tensor.detach().view(-1), 0, tuple(tensor.shape), shared=True)


def share(held: Mapping[str, Held], rank: int, size: int) -> dict[str, Held]:
    """What rank `rank` of `size` writes: all that it alone holds, and one part of the line of what all hold."""
    line = sum(each.flat.numel() for each in held.values() if each.shared)
    first, last, at = line * rank // size, line * (rank + 1) // size, 0
    out = {}
    for name, each in held.items():
        low, high = 0, each.flat.numel()
        if each.shared:
            at += high
            low, high = max(0, first - at + high), min(high, last - at + high)
        if low < high:
            out[name] = each.part(low, high)
    return out
