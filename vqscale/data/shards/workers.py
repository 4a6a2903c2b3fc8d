"""Batches made ahead by worker processes of a rank: how they begin and end, and what is said of one that dies.

What a batch is made of is the caller's: a data set that turns a list of numbers into a batch, and the lists.
"""

from __future__ import annotations

import atexit
import math
import signal
from collections.abc import Generator, Iterable
from multiprocessing import RawValue
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vqscale.errors import ExplainedError

T = TypeVar("T")
_ending = RawValue("b", 0)  # this process is at its end: its workers may be terminated


@atexit.register
def _end() -> None:
    _ending.value = 1


def read(
    samples: Dataset[T], numbers: Iterable[list[int]], workers: int, rank: int, key: str
) -> Generator[T, None, None]:
    """samples[list] for each list of numbers, in order, made by `workers` processes ahead; 0 = in this one.

    ExplainedError, which names the option `key`, where a worker dies. Close the generator to end the workers.
    """
    closing = RawValue("b", 0)
    loader: DataLoader[Any] = DataLoader(
        samples,
        batch_sampler=numbers,
        num_workers=workers,
        collate_fn=_same,
        multiprocessing_context="fork" if workers else None,  # they share `closing` with this process
        worker_init_fn=_Quiet(closing) if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # torch draws a seed from it, and otherwise from the generator of the run
    )
    reading = iter(loader)
    try:
        yield from reading
    except (RuntimeError, OSError, EOFError) as error:  # the last two: it died while it handed over a batch
        if not workers or "in DataLoader worker process" in str(error):  # raised by it, not for want of it
            raise
        raise ExplainedError(
            f"rank {rank} lost one of its {workers} reading processes ({error}): most often for want of "
            f"memory or of /dev/shm; lower {key} or the batch, or give the job more"
        ) from error
    finally:
        closing.value = 1
        if workers:
            # torch ends them when the iterator is collected, which a traceback puts off to the end of the process
            reading._shutdown_workers()  # type: ignore[attr-defined]


def room(*shape: int) -> Tensor:
    """Float32 memory for a part of a batch, not filled. In a worker it is shared from the beginning: torch would copy
    the batch into shared memory to hand it over, which for 256 pixels of a side takes a ninth of all its work.
    """
    if get_worker_info() is None:
        return torch.empty(shape)
    storage = torch.UntypedStorage._new_shared(4 * math.prod(shape))  # as torch's own collation does
    return torch.empty(0).set_(storage, 0, shape)  # type: ignore[call-overload]


def _same(batch: Any) -> Any:
    return batch


class _Quiet:
    """A worker lives until its stream closes: signals meant for the run (Slurm sends them to all processes) must not
    end it before.
    """

    def __init__(self, closing: Any) -> None:
        self.closing = closing

    def __call__(self, worker: int) -> None:
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, number: int, frame: Any) -> None:
        if self.closing.value or _ending.value:
            raise SystemExit(0)
