"""What a user can choose about the grid of processes (mesh.py). Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass


def check_product(data: int, codes: int, world: int) -> None:
    """Raise the ValueError that a user can act on when the grid does not fit the processes."""
    if data < 1 or codes < 1:
        raise ValueError(f"mesh.data {data} and mesh.codes {codes} must both be at least 1: change the mesh")
    if data * codes != world:
        raise ValueError(
            f"data {data} x codes {codes} = {data * codes} processes, but {world} "
            f"{'was' if world == 1 else 'were'} started: change mesh.data, mesh.codes or --nproc_per_node"
        )


PER_NODE = 8


@dataclass(frozen=True)
class MeshConfig:
    """The grid of processes: data x codes = all of them."""

    data: int | None = None
    """replicas of the whole codebook; null: what `codes` leaves"""
    codes: int | None = None
    """processes that share one codebook; null: those of one machine (LOCAL_WORLD_SIZE, which torchrun sets) where they
    divide all, for tokens x dim numbers go between them in every step; with `data`, all processes / data"""

    def planned(self, world: int) -> tuple[int, int]:
        """`resolve` for processes that nobody started: PER_NODE of them on each machine, unless torchrun has started so
        many and says how they lie.
        """
        started = os.environ.get("WORLD_SIZE") == str(world)
        return self.resolve(world, None if started else min(world, PER_NODE))

    def problems(self) -> Iterable[tuple[str, str]]:
        for key, size in (("data", self.data), ("codes", self.codes)):
            if size is not None and size < 1:
                yield key, f"an axis has at least 1 process, not {size}: give a positive number, or null to derive it"

    def resolve(self, world: int, local: int | None = None) -> tuple[int, int]:
        """(data, codes) for `world` processes, `local` of them on each machine; ValueError where they do not fit."""
        given = self.data if self.data is not None else self.codes
        if given is not None and world % given:
            key = "data" if self.data is not None else "codes"
            raise ValueError(
                f"mesh.{key} {given} does not divide the {world} processes that were started: "
                f"change mesh.{key} or --nproc_per_node"
            )
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) if local is None else local
        near = local if local and world % local == 0 else world
        data = self.data if self.data is not None else world // (self.codes or near)
        codes = self.codes if self.codes is not None else world // data
        check_product(data, codes, world)
        return data, codes
