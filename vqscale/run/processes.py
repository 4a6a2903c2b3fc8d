"""How the processes of a program meet and how they end, well or not: what fails on one rank ends all.

Status 0 is done, 1 failed on the way, 2 the user's input, 75 stopped on request, 130 interrupted. Every program ends
by `status_of`. Imports no torch.
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
from typing import TYPE_CHECKING

from vqscale.errors import ExplainedError
from vqscale.run.folder import ignore_stop_signals

if TYPE_CHECKING:
    from vqscale.parallel.mesh import Mesh

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
    """cpu or cuda for run.device; auto takes CUDA where there is a GPU. ValueError where some process has none."""
    import torch  # here, so that tools can say what is wrong with their words without it

    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if name == "cpu" or (name == "auto" and not gpus):
        return "cpu"
    if 0 < gpus < local:  # without any, check_engine says what is lacking
        raise ValueError(
            f"there are {gpus} GPUs that torch can use here (CUDA_VISIBLE_DEVICES counts), and {local} processes were "
            f"started on this machine (--nproc_per_node): start {gpus}, or use run.device=cpu (--device cpu)"
        )
    return "cuda"


def check_compiler(device: str) -> None:
    """ValueError where torch.compile would find no compiler: C++ for a CPU, C for what launches kernels on a GPU."""
    names = [os.environ.get("CXX") or "g++"] if device == "cpu" else [os.environ.get("CC") or "gcc", "cc", "clang"]
    if not any(shutil.which(name) for name in names):
        raise ValueError(
            f"run.compile needs a compiler at run time, and there is no {' or '.join(names)} on the PATH of this "
            f"machine: install one, name it in {'CXX' if device == 'cpu' else 'CC'}, or use run.compile=false"
        )


def check_graphs(device: str) -> None:
    """ValueError where there is nothing that replays a CUDA graph."""
    if device != "cuda":
        raise ValueError(
            f"run.cuda_graphs needs a GPU, and this run is on {device} (run.device, where auto takes a GPU if there is "
            "one): use run.cuda_graphs=false"
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

    At its end signals to stop are ignored: the work is done or saved, and one that comes late changes no status.

    `agreed` are the errors that all ranks raise together, after which they part too. After any other they do not part:
    some may wait for this rank where they are, see `status_of`.
    """
    from vqscale.parallel.mesh import Mesh, connect, disconnect

    here = connect(pick_device(device), timeout_s)
    try:
        yield Mesh(*grid, device=here, timeout_s=timeout_s)
    except agreed:
        ignore_stop_signals()
        disconnect()
        raise
    ignore_stop_signals()
    disconnect()


def status_of(work: Callable[[], int]) -> int:
    """The exit status of a program that is work(); what it raises is reported, and a status too.

    Where others may wait for this process it ends here and now: torchrun then ends them.
    """
    try:
        return work()
    except SystemExit:  # of argparse, which has said why
        raise
    except BaseException as error:
        status = report_error(error)
        if _connected():
            os._exit(status)
        return status


def report_error(error: BaseException) -> int:
    """Print why this process ends, and give torchrun the reason; what is unexpected with its traceback. Returns the
    status.
    """
    sys.stdout.flush()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    who = f"[rank {rank} of {world}] " if world > 1 else ""
    text = f"error: {error}" if str(error) else f"error: {type(error).__name__}"
    if isinstance(error, KeyboardInterrupt):
        told = f"{who}interrupted"
    elif isinstance(error, ValueError) and not _connected():
        told = "" if rank else text  # all ranks find what is wrong with the input, and one says it
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        told = f"{who}{text}: a disk is full; make room, and the same command goes on from what is finished"
    elif isinstance(error, ValueError | OSError | FloatingPointError | ExplainedError):
        told = who + text
    elif isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
        told = f"{who}error: lost another rank ({str(error).strip().splitlines()[0][:160]}); its own message says why"
    else:
        traceback.print_exception(error)
        told = f"{who}error: {type(error).__name__}: {error}"
    if told:
        print(told, file=sys.stderr, flush=True)
    _write_error_file(text)
    return 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, ValueError) else 1


def _connected() -> bool:
    """Whether this process is in a group with others; what was never imported has joined none."""
    mesh = sys.modules.get("vqscale.parallel.mesh")
    return mesh is not None and bool(mesh.connected())


def _write_error_file(text: str) -> None:
    """The reason for torchrun, which prints it below its own report of the ranks that ended."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))
