"""The samples of a data set by number, each with all its views: what an encoder of whole data sets reads.

The order is that of the numbers asked for, and nothing is replaced: an image that cannot be decoded is reported. One
that cannot be read (a disk, a network) is an error, because a cache would keep it out for ever. Nothing communicates.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqscale.data.config import MediumConfig
from vqscale.data.order import Sequential
from vqscale.data.samples import medium
from vqscale.data.shards.index import build
from vqscale.data.shards.reader import Reader
from vqscale.data.shards.workers import read, room


@dataclass
class ViewBatch:
    """b samples with V views each."""

    samples: Tensor  # (b, V, C, *sides) float32; zero where not valid
    valid: Tensor  # (b,) bool; false for a number -1, and for a broken sample
    broken: list[tuple[int, str, str]]  # (number, key, reason)
    enlarged: int = 0  # samples that were smaller than the config asks for
    failure: str = ""  # why a sample could not be read; raised by Source.batches

    def pin_memory(self) -> ViewBatch:
        """Called by the DataLoader where there is a GPU."""
        return replace(self, samples=self.samples.pin_memory())


class Source:
    """All samples that a config names, with the views that config.views has under `kind`."""

    def __init__(self, config: MediumConfig, kind: str) -> None:
        self.config, self.kind = config, kind
        self.views = config.views[kind]
        self.index = build(config)
        self._samples = _Views(self)

    def batches(self, numbers: Iterable[list[int]], rank: int = 0) -> Generator[ViewBatch, None, None]:
        """A batch for each list of numbers; -1 is an image that is not there. OSError if one cannot be read."""
        reading = read(self._samples, numbers, self.config.num_workers, rank, "--workers")
        try:
            for batch in reading:
                if batch.failure:
                    raise OSError(f"{batch.failure}: when it can be read again, the same command goes on")
                yield batch
        finally:
            reading.close()


def lists(spans: Iterable[range | None], storage: int, size: int) -> Iterator[list[int]]:
    """The numbers of each span in lists of `size`, as many for each as `storage` images need; -1 fills up, and None is
    a span without images. So all processes take equal steps, and a list does not depend on how many they are.
    """
    for span in spans:
        numbers = list(span or ())
        for begin in range(0, storage, size):
            part = numbers[begin : begin + size]
            yield part + [-1] * (size - len(part))


class _Views(Dataset[ViewBatch]):
    """Numbers to a batch; runs in the workers."""

    def __init__(self, source: Source) -> None:
        self.source, self.index, self.medium = source, source.index, medium(source.config)
        self.reader, self.order = Reader(source.config, source.index), Sequential(source.index.counts)

    def __getitems__(self, numbers: list[int]) -> ViewBatch:
        shape = (len(self.source.views), *self.source.config.shape)
        batch = ViewBatch(room(len(numbers), *shape), torch.zeros(len(numbers)).bool(), [])
        if self.reader.fetched and numbers[0] >= 0:
            self.reader.prepare(self.order.shards_of(numbers[0]), self.order.shards_of(numbers[0], ahead=1))
        for row, number in enumerate(numbers):
            if number < 0:
                continue
            try:
                members = self.reader.read(number)
            except ValueError as error:  # the sample lacks a member
                batch.broken.append((number, self.index.key(number), str(error)))
                continue
            except OSError as error:
                batch.failure = f"{self.reader.describe(number)}: {error}"
                return batch
            try:
                batch.enlarged += self.medium.views(members, self.source.kind, batch.samples[row])
            except MemoryError:
                raise
            except Exception as error:  # a decoder may raise anything on damaged data
                batch.broken.append((number, self.index.key(number), f"{type(error).__name__}: {error}"))
                continue
            batch.valid[row] = True
        batch.samples[~batch.valid] = 0.0
        return batch
