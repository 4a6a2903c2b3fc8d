"""The images of a data set by number, each with all its views: what an encoder of whole data sets reads.

The order is that of the numbers asked for, and nothing is replaced: an image that cannot be decoded is reported. One
that cannot be read (a disk, a network) is an error, because a cache would keep it out for ever. Nothing communicates.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqscale.data import pixels
from vqscale.data.config import VIEWS, ImagesConfig, Views
from vqscale.data.order import Sequential
from vqscale.data.shards.index import build
from vqscale.data.shards.reader import Reader
from vqscale.data.shards.workers import read, room


@dataclass
class ViewBatch:
    """b images with V views each."""

    images: Tensor  # (b, V, 3, H, W) float32 in [-1, 1]; zero where not valid
    valid: Tensor  # (b,) bool; false for a number -1, and for a broken image
    broken: list[tuple[int, str, str]]  # (number, key, reason)
    enlarged: int = 0  # images whose short side had fewer pixels than the resize asks for
    failure: str = ""  # why an image could not be read; raised by Source.batches

    def pin_memory(self) -> ViewBatch:
        """Called by the DataLoader where there is a GPU."""
        return replace(self, images=self.images.pin_memory())


class Source:
    """All images that a config names, with the views `kind` of VIEWS."""

    def __init__(self, config: ImagesConfig, kind: Views) -> None:
        self.config, self.kind = config, kind
        self.views = VIEWS[kind]
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
        self.config, self.kind, self.index = source.config, source.kind, source.index
        self.reader, self.order = Reader(source.config, source.index), Sequential(source.index.counts)

    def __getitems__(self, numbers: list[int]) -> ViewBatch:
        size, views = self.config.image_size, len(VIEWS[self.kind])
        batch = ViewBatch(room(len(numbers), views, 3, size, size), torch.zeros(len(numbers)).bool(), [])
        if self.reader.fetched and numbers[0] >= 0:
            self.reader.prepare(self.order.shards_of(numbers[0]), self.order.shards_of(numbers[0], ahead=1))
        for row, number in enumerate(numbers):
            if number < 0:
                continue
            try:
                data = self.reader.read(number)
            except ValueError as error:  # the sample has no image
                batch.broken.append((number, self.index.key(number), str(error)))
                continue
            except OSError as error:
                batch.failure = f"{self.reader.describe(number)}: {error}"
                return batch
            try:
                image = pixels.decode(data)
                pictures = pixels.views(image, self.config, self.kind)
            except MemoryError:
                raise
            except Exception as error:  # a decoder may raise anything on damaged data
                batch.broken.append((number, self.index.key(number), f"{type(error).__name__}: {error}"))
                continue
            for view, picture in enumerate(pictures):
                pixels.normalise(picture, batch.images[row, view])
            batch.valid[row] = True
            batch.enlarged += min(image.size) < self.config.short_side
        batch.images[~batch.valid] = 0.0
        return batch
