"""What a person sees while a run goes on: a bar on a terminal, plain lines at a bounded rate in a log file.

Every rank keeps the same simple account of images and waiting (it costs two additions a step, so the rates are at hand
everywhere under one name); only rank 0 prints. Nothing is communicated.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TextIO

from tqdm import tqdm


class _Account:
    """Images and seconds of waiting since the last `take`."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now, self._since = now, now()
        self._images, self._waited_s = 0, 0.0

    def add(self, images: int, waited_s: float) -> None:
        self._images += images
        self._waited_s += waited_s

    def take(self) -> dict[str, float]:
        now = self._now()
        passed = max(now - self._since, 1e-9)
        rates = {"images_per_s": self._images / passed, "data_wait": min(self._waited_s / passed, 1.0)}
        self._since, self._images, self._waited_s = now, 0, 0.0
        return rates


class Progress:
    """Progress of a run of num_steps steps that begins after step `start`.

    On a terminal a bar is redrawn; in a file a line is written at the first step, then at most one every `every_s`
    seconds, and one at the end. `now` is a clock in seconds, to be replaced in tests.
    """

    def __init__(
        self,
        num_steps: int,
        start: int = 0,
        rank: int = 0,
        stream: TextIO | None = None,
        every_s: float = 10.0,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.num_steps, self.step = num_steps, start
        self._start, self._every_s, self._now = start, every_s, now
        self._stream = (stream or sys.stdout) if rank == 0 else None
        self._values: dict[str, float] = {}
        self._printed, self._taken = (
            _Account(now),
            _Account(now),
        )  # what is printed and what `rates` gives keep own time
        self._began = now()
        self._spoke: float | None = None
        self._shown = start - 1
        self._bar: tqdm | None = None
        if self._stream is not None and self._stream.isatty():
            self._bar = tqdm(total=num_steps, initial=start, file=self._stream, dynamic_ncols=True, unit="step")

    def advance(self, images: int, waited_s: float) -> None:
        """A step is done: `images` of all ranks were in it, and this rank waited `waited_s` seconds for its batch."""
        self.step += 1
        self._printed.add(images, waited_s)
        self._taken.add(images, waited_s)
        if self._stream is None:
            return
        if self._bar is not None:
            self._bar.update()
        elif self._spoke is None or self._now() - self._spoke >= self._every_s:
            self._write()

    def rates(self) -> dict[str, float]:
        """Since the last call: images per second, and the share of the time in which this rank waited for data."""
        return self._taken.take()

    def show(self, values: Mapping[str, float]) -> None:
        """Set the named numbers (losses, usage) that stand beside the rates from now on."""
        self._values = dict(values)
        if self._bar is not None:
            self._bar.set_postfix_str(self._numbers())

    def say(self, text: str) -> None:
        """Print a line of its own without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._stream is not None:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Print the last line, or leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
        elif self._stream is not None and self._shown != self.step:
            self._write()
        self._stream = self._bar = None

    def _write(self) -> None:
        assert self._stream is not None
        self._spoke, self._shown = self._now(), self.step
        done = f"step {self.step}/{self.num_steps} ({self.step / max(self.num_steps, 1):.1%})"
        print(f"{done} | {self._numbers()} | {self._left()}", file=self._stream, flush=True)

    def _numbers(self) -> str:
        rates = self._printed.take()
        parts = [f"{rates['images_per_s']:.1f} images/s", f"data wait {rates['data_wait']:.0%}"]
        return ", ".join(parts + [f"{name} {value:.4g}" for name, value in self._values.items()])

    def _left(self) -> str:
        steps = self.step - self._start
        seconds = (self._now() - self._began) / steps * (self.num_steps - self.step) if steps else 0
        return f"{tqdm.format_interval(seconds)} left"
