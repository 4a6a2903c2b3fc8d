"""Where the time of a step goes: seconds by name, summed over spans.

On a CPU a span is two readings of a clock. On a GPU it is two events on the current stream, read only in `take`, so
that measuring a span does not wait for the device. Off by default: a span then costs a few comparisons. While a trace
is taken (run/profile.py) spans are marked in it, too. Names in use: codes, data, forward, backward, step and
communication.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from typing import TypeVar

import torch
from torch.profiler import record_function

T = TypeVar("T")


class Clock:
    def __init__(self) -> None:
        self.on = False
        self.marking = False  # spans are named in a trace of torch.profiler
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._depth: dict[str, int] = defaultdict(int)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`; not twice in a span of the same name, nor in a compiled graph."""
        if torch.compiler.is_compiling():  # before any switch is read: a graph would be compiled for each of its states
            yield
            return
        with record_function(name) if self.marking else nullcontext(), self._timed(name):
            yield

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        if not self.on or self._depth[name]:
            yield
            return
        self._depth[name] += 1
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        if cuda:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
        start = time.perf_counter()
        try:
            yield
        finally:
            self._depth[name] -= 1
            if cuda:
                last.record()
                self._events.append((name, first, last))
            else:
                self._seconds[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds by name since the last `take`. Waits for the device if there is one."""
        if self._events:
            torch.cuda.synchronize()
            for name, first, last in self._events:
                self._seconds[name] += first.elapsed_time(last) / 1000.0
            self._events.clear()
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds


clock = Clock()


def timed(batches: Iterator[T]) -> Generator[tuple[T, float], None, None]:
    """Each item with the seconds that one waited for it."""
    while True:
        start = time.perf_counter()
        try:
            with clock.span("data"):
                item = next(batches)
        except StopIteration:
            return
        yield item, time.perf_counter() - start
