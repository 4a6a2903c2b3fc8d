"""An accelerator of DeepSpeed with streams, on paper: all is done at once, by the CPU, and written down is what would
have to wait for what on a GPU. Two things of which neither waits for the other may run at one time.

What it stands for: work of one stream is done in the order in which it was given; wait_stream, events and a
synchronized host order what is given later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator


@dataclass(frozen=True, eq=False)
class Work:
    """`before`: all that is over when it begins."""

    name: str
    number: int
    before: frozenset[Work] = field(repr=False)

    def beside(self, other: Work) -> bool:
        return self not in other.before and other not in self.before


class Stream:
    def __init__(self, device: Device) -> None:
        self._device, self.given = device, frozenset[Work]()

    def wait_stream(self, other: Stream) -> None:
        self.given |= other.given

    def wait_event(self, event: Event) -> None:
        self.given |= event.given

    def synchronize(self) -> None:
        self._device.host |= self.given


class Event:
    def __init__(self, device: Device) -> None:
        self._device, self.given = device, frozenset[Work]()

    def record(self, stream: Stream | None = None) -> None:
        self.given = (stream or self._device.current_stream()).given

    def query(self) -> bool:
        return self.given <= self._device.host

    def synchronize(self) -> None:
        self._device.host |= self.given


class Device(CPU_Accelerator):
    def __init__(self) -> None:
        super().__init__()
        self.host, self.done = frozenset[Work](), list[Work]()
        self._streams = [Stream(self)]
        self._current = self._streams[:]

    def do(self, name: str) -> None:
        """Give work to the stream that is current."""
        stream = self._current[-1]
        self.done.append(Work(name, len(self.done), stream.given | self.host))
        stream.given = self.done[-1].before | {self.done[-1]}

    def is_synchronized_device(self) -> bool:
        return False

    def Stream(self, *args: object, **given: object) -> Stream:
        self._streams.append(Stream(self))
        return self._streams[-1]

    def Event(self, *args: object, **given: object) -> Event:
        return Event(self)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def current_stream(self, device_index: int | None = None) -> Stream:
        return self._current[-1]

    def default_stream(self, device_index: int | None = None) -> Stream:
        return self._streams[0]

    def synchronize(self, device_index: int | None = None) -> None:
        for stream in self._streams:
            stream.synchronize()
