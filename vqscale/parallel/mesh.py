"""The grid of ranks: world = data x codes.

    codes axis  ->   the M ranks of a code group own the rows of the codebook together
    data axis   |    ranks with the same rows
                v

    rank = data.rank * M + codes.rank        (a code group is made of neighbours: the fast wires of one machine)

Every rank has its own images; `world` is the axis that replicated parameters are averaged over. With one process
nothing is initialised and every axis has size one. Nothing here knows what the axes are used for.
"""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from vqscale.parallel.config import check_product

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Axis:
    """A line of the mesh through this rank: its size, this rank's place on it, and the group that talks."""

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)


def connect(device: str = "cpu", timeout_s: float = 600.0) -> torch.device:
    """Join the processes that torchrun started (RANK, WORLD_SIZE, ...) and return this process's device.

    gloo on a CPU, NCCL where there are GPUs; every group made from it has `timeout_s`. With one process it only
    chooses the device. Call it once, after the configuration has been checked. Where they meet on MASTER_ADDR 127.0.0.1
    and no agent of torchrun has opened a place for it, nothing listens but on loopback.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = torch.device("cuda", local) if device == "cuda" else torch.device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        wait = timedelta(seconds=timeout_s)
        alone = os.environ.get("MASTER_ADDR") == LOOPBACK and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        store, rank, world = _on_loopback(wait) if alone else (None, -1, -1)
        dist.init_process_group(
            backend="nccl" if chosen.type == "cuda" else "gloo",
            timeout=wait,
            store=store,
            rank=rank,
            world_size=world,
            device_id=chosen if chosen.type == "cuda" else None,
        )
    return chosen


def _on_loopback(wait: timedelta) -> tuple[dist.Store, int, int]:
    """(store, rank, world) of processes of one machine; torch's own store would listen on every interface."""
    rank, world, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo" if sys.platform == "linux" else "lo0")
    opened = None if rank else socket.create_server((LOOPBACK, port)).detach()
    return dist.TCPStore(LOOPBACK, port, world, rank == 0, wait, master_listen_fd=opened), rank, world


def connected() -> bool:
    """Whether this process is in a group with others, who may wait for it."""
    return dist.is_initialized() and dist.get_world_size() > 1


def disconnect() -> None:
    """Leave the processes joined by `connect`; nothing with one process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """How many processes there are: what torch.distributed says, else what torchrun promised, else one."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def world_group(device: torch.device) -> Any:
    """The group of all processes, for a library that talks by itself: what `connect` made, or one of this process."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


class Mesh:
    """Mesh(data, codes): this rank's axes. Checks its own product; one process needs nothing initialised.

    Making a mesh is collective: every rank makes the same ones in the same order, because the groups are made here. A
    collective that waits longer than `timeout_s` fails.
    """

    def __init__(
        self, data: int = 1, codes: int = 1, device: torch.device | str | None = None, timeout_s: float = 600.0
    ) -> None:
        world = dist.get_world_size() if dist.is_initialized() else 1
        check_product(data, codes, world)
        self.device = torch.device(device) if device is not None else _default_device()
        if world == 1:
            self.world, self.data, self.codes = Axis("world"), Axis("data"), Axis("codes")
            return
        rank = dist.get_rank()
        self.world = Axis("world", world, rank, dist.group.WORLD)
        # Every rank takes part in the making of every group, also of those that it is not in.
        rows = [list(range(d * codes, (d + 1) * codes)) for d in range(data)]
        columns = [list(range(c, world, codes)) for c in range(codes)]
        self.codes = _axis("codes", rows, rank, timeout_s)
        self.data = _axis("data", columns, rank, timeout_s)

    def __repr__(self) -> str:
        return (
            f"Mesh(data {self.data.size} x codes {self.codes.size} = {self.world.size} processes; "
            f"here data {self.data.rank}, codes {self.codes.rank}, {self.device})"
        )


def _axis(name: str, lines: list[list[int]], rank: int, timeout_s: float) -> Axis:
    if len(lines[0]) == 1:
        return Axis(name)
    group, _ = dist.new_subgroups_by_enumeration(lines, timeout=timedelta(seconds=timeout_s))
    mine = next(line for line in lines if rank in line)
    return Axis(name, len(mine), mine.index(rank), group)


def _default_device() -> torch.device:
    """The device of this process's collectives: where `connect` put it, a CPU otherwise."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
