"""Run a function on n CPU processes that talk over gloo: for tests and tools, not for training.

Importing torch costs more than most calls, so it is done once, by a server that all processes are forked from, and they
are kept in a pool between calls. Each call meets by a file of its own, so that calls cannot mix. The first exception of
any rank is raised here with its traceback, the processes of the call are killed, and a call that does not end within
`timeout_s` is an error that names the ranks still running.
"""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

_forks = mp.get_context("forkserver")
_forks.set_forkserver_preload([__name__])


class RankError(RuntimeError):
    """A rank failed or did not answer; the message has its rank and its traceback."""


def _serve(pipe: Connection) -> None:
    """The life of a pooled process: wait for a call, join its group, run it, answer, leave the group.

    It leaves when it is told that every rank has answered: before that one may still be connecting to it.
    """
    torch.set_num_threads(1)
    while True:
        try:
            call = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        except Exception:  # the function's module cannot be imported here
            pipe.send((time.monotonic(), False, f"cannot load what it shall run: {traceback.format_exc()}"))
            continue
        function, args, rank, world, meeting, timeout_s = call
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        try:
            if world > 1:
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{meeting}",
                    rank=rank,
                    world_size=world,
                    timeout=timedelta(seconds=timeout_s),
                )
            answer = (time.monotonic(), True, function(*args))
        except BaseException as error:  # the parent decides what an error of a rank means
            answer = (time.monotonic(), False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        try:
            pipe.send(answer)
        except Exception as error:
            pipe.send((time.monotonic(), False, f"the result of rank {rank} cannot be sent back: {error}"))
        try:
            pipe.recv_bytes()
        except (EOFError, KeyboardInterrupt):
            return
        if dist.is_initialized():
            dist.destroy_process_group()


class _Worker:
    def __init__(self) -> None:
        self.pipe, theirs = _forks.Pipe()
        self.process = _forks.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


_idle: list[_Worker] = []


@atexit.register
def _close() -> None:
    while _idle:
        _idle.pop().kill()


def run(function: Callable[..., Any], n: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """function(*args) on n processes, each in one gloo group of n; the results in rank order.

    `function` is importable (a module's top level). Tensors in results travel by pickle. Raises RankError with the
    message of the rank that failed first; the other processes of the call are killed, and none is left behind.
    """
    workers = [_idle.pop() if _idle else _Worker() for _ in range(n)]
    with tempfile.TemporaryDirectory(prefix="vqscale-spawn-") as folder:
        for rank, worker in enumerate(workers):
            worker.pipe.send((function, args, rank, n, os.path.join(folder, "meeting"), timeout_s))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        try:
            while len(results) < n:
                _collect(workers, results, deadline, timeout_s)
        except BaseException:
            for worker in workers:
                worker.kill()
            raise
    for worker in workers:
        worker.pipe.send_bytes(b"all have answered")
    _idle.extend(workers)
    return [results[rank] for rank in range(n)]


def _collect(workers: list[_Worker], results: dict[int, Any], deadline: float, timeout_s: float) -> None:
    """Wait for the next answers or deaths of processes; put answers into `results` or raise RankError."""
    running = {worker.pipe: rank for rank, worker in enumerate(workers) if rank not in results}
    ready = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
    if not ready:
        ranks = ", ".join(str(rank) for rank in sorted(running.values()))
        raise RankError(f"no answer from rank {ranks} of {len(workers)} within {timeout_s:g} s: a hang, or timeout_s")
    failures = _receive(ready, running, results)
    if failures:
        # The others fail of this failure (their peer is gone): the earliest is the cause.
        rest = [pipe for pipe, rank in running.items() if pipe not in ready]
        failures += _receive(wait(rest, timeout=0.5) if rest else [], running, results)
        _, rank, message = min(failures)
        raise RankError(f"rank {rank} of {len(workers)} {message}")


def _receive(ready: list[Any], running: dict[Connection, int], results: dict[int, Any]) -> list[tuple[float, int, str]]:
    """Read the answers that are there; failures as (when, rank, what)."""
    failures = []
    for pipe in ready:
        rank = running[pipe]
        try:
            when, good, value = pipe.recv()
        except EOFError:
            failures.append((0.0, rank, "died without a word (killed, or out of memory)"))
            continue
        if good:
            results[rank] = value
        else:
            failures.append((when, rank, f"failed: {value}"))
    return failures
