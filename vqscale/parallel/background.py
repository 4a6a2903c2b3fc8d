"""Work beside the step, and waiting for it without a collective that lasts as long as the work does.

A collective gives up after its timeout, so ranks that wait for another's disk ask each other again and again instead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh

T = TypeVar("T")
PAUSE_S = 0.02


class Task(Generic[T]):
    """work() in a thread of this process, begun when it is made: its result, or in words what it raised."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self.result: T | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:
            self.error = error

    @property
    def failure(self) -> str:
        """What it raised, in words."""
        return explain(self.error) if self.error is not None else ""


def explain(error: BaseException) -> str:
    """The error that the others come from, in a line."""
    while error.__context__ is not None:  # a library may bury "no space left" under an error of its own
        error = error.__context__
    return f"{type(error).__name__}: {error}"


def on_first(work: Callable[[], T], mesh: Mesh) -> T:
    """What work() gives on rank 0, or raises there, on all ranks, however long it takes. Collective."""
    if mesh.world.size == 1:
        return work()
    task = Task(work) if mesh.world.rank == 0 else None
    outlast(task, mesh)
    result, error = ops.gather_objects((task.result, task.error) if task else (None, None), mesh.world)[0]
    if error is not None:
        raise error
    answer: T = result
    return answer


def outlast(task: Task[T] | None, mesh: Mesh) -> None:
    """Wait until no rank's task runs; a rank without one only waits. Collective."""
    while ops.sum_over(torch.tensor(float(task is not None and task.running), device=mesh.device), mesh.world) > 0:
        time.sleep(PAUSE_S)
