"""How the processes of a tool meet and how they end, well or not: what fails on one rank ends all, and is said once.

Status 0 is done, 1 failed on the way, 2 the user's input, 75 stopped on request, 130 interrupted. Training ends with
the same errors and leaves the same word; what it prints is in launch/train.py. Imports no torch.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from vqscale.parallel.mesh import Mesh

T = TypeVar("T")
EXPLAINED = ("RunError", "CheckpointError", "CacheError", "BrokenData")  # by name: most of their modules import torch
LOST_PEER = re.compile(r"Connection (closed|reset|refused)|Timed out waiting|Broken pipe|NCCL|remote process exited")


def divide(codes: int = 1) -> tuple[int, int]:
    """(data, codes): how the processes that were started share the codes. ValueError where they cannot."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if codes < 1 or world % codes:
        raise ValueError(
            f"--codes {codes} does not divide the {world} processes that were started: change --codes or "
            "--nproc_per_node"
        )
    return world // codes, codes


def pick_device(name: str) -> str:
    """cpu or cuda for run.device; auto takes CUDA where there is a device for every local process."""
    import torch  # here, so that tools can say what is wrong with their words without it

    if name != "auto":
        return name
    return "cuda" if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")) else "cpu"


def check_compiler(device: str) -> None:
    """ValueError where torch.compile would find no compiler: C++ for a CPU, C for what launches kernels on a GPU."""
    names = [os.environ.get("CXX") or "g++"] if device == "cpu" else [os.environ.get("CC") or "gcc", "cc", "clang"]
    if not any(shutil.which(name) for name in names):
        raise ValueError(
            f"run.compile needs a compiler at run time, and there is no {' or '.join(names)} on the PATH of this "
            f"machine: install one, name it in {'CXX' if device == 'cpu' else 'CC'}, or use run.compile=false"
        )


@contextmanager
def joined(
    device: str,
    grid: tuple[int, int],
    timeout_s: float = 600.0,
    *,
    agreed: tuple[type[Exception], ...] = (ValueError,),
) -> Iterator[Mesh]:
    """The mesh of all processes, joined for what is done inside and parted at its end. Collective.

    `agreed` are the errors that all ranks raise together, after which they part too. After any other a rank leaves
    without a farewell: the others may wait for it where they are.
    """
    from vqscale.parallel.mesh import Mesh, connect, disconnect

    here = connect(pick_device(device), timeout_s)
    try:
        yield Mesh(*grid, device=here, timeout_s=timeout_s)
    except agreed:
        disconnect()
        raise
    disconnect()


def first(work: Callable[[], T], mesh: Mesh) -> T:
    """What work() gives on rank 0, or raises there, on all ranks. Collective."""
    from vqscale.parallel import ops  # here, so that tools can say what is wrong with their words without torch

    outcome: tuple[Any, Exception | None] = (None, None)
    if mesh.world.rank == 0:
        try:
            outcome = (work(), None)
        except (ValueError, OSError, RuntimeError) as raised:
            outcome = (None, raised)
    result, error = ops.gather_objects(outcome, mesh.world)[0]
    if error is not None:
        raise error
    return result


def tell(tool: str, error: BaseException) -> int:
    """Print why this process ends: what all ranks find is said once, what is unexpected with its traceback. Returns the
    status.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    who = f"[rank {rank} of {world}] " if world > 1 else ""
    text = f"{tool}: {error}" if str(error) else f"{tool}: {type(error).__name__}"
    if isinstance(error, ValueError):
        if rank == 0:
            print(text, file=sys.stderr)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        print(f"{who}{text}: a disk is full; make room, and the same command goes on", file=sys.stderr)
    elif isinstance(error, OSError | FloatingPointError) or type(error).__name__ in EXPLAINED:
        print(who + text, file=sys.stderr)
    elif isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
        print(f"{who}{tool}: lost another rank; its own message says why", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        print(f"{who}interrupted", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stderr.flush()
    leave_word(text)
    return 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, ValueError) else 1


def leave_word(text: str) -> None:
    """Give torchrun the reason, which it prints below its own report of the ranks that ended."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))


def leave(status: int) -> int:
    """The status to return; where there are other ranks a failure ends this process at once, because they may wait for
    it, and torchrun ends them.
    """
    if status not in (0, 2, 75) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(status)
    return status
