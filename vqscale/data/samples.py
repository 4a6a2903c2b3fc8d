"""Batches of samples from WebDataset shards, with one number as the state: the samples consumed.

Training step s takes positions [s * B, (s + 1) * B) of the order (data/order.py), rank r its r-th part, so the global
batch is the same on any number of ranks and workers, and a run resumes at the exact next sample. A broken sample is
replaced by the next good one of the order, so no rank ever sees another number of samples than its peers. Nothing here
communicates; the training loop sums what is broken over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqscale.config import load_class
from vqscale.data import order_buckets
from vqscale.data.config import MediumConfig
from vqscale.data.made.make import make_missing
from vqscale.data.order import Order, Sequential
from vqscale.data.order_buckets import BucketOrder, BucketsInTurn
from vqscale.data.shards.chosen import chosen
from vqscale.data.shards.index import Index, build
from vqscale.data.shards.reader import Reader
from vqscale.data.shards.workers import read, room
from vqscale.errors import ExplainedError
from vqscale.seed import derive


def medium(config: MediumConfig) -> Reads:
    """What reads the samples of a config."""
    reads: Reads = load_class(config.module)(config)
    return reads


def prepare(config: MediumConfig, batch: int = 0) -> None:
    """Before any process group exists: make drawn shards that are missing (config.make), and the index where it is not
    kept yet. ValueError where samples come in buckets, of which one has too few for a step of training of `batch`.

    Called by every process; one works and the others wait, however long it takes. Done again it does nothing.
    """
    make_missing(config)
    index = build(config)
    if config.measure and batch:
        order_buckets.check(config, index, order_buckets.buckets_of(config, index), batch)


Endless = Order | BucketOrder
AnyOrder = Endless | Sequential | BucketsInTurn


def ordered(config: MediumConfig, index: Index, batch: int, seed: int, train: bool, accumulation: int = 1) -> AnyOrder:
    """The order of the samples of an index for global batches of so many, of which a step takes `accumulation`."""
    if not config.measure:
        return Order(index.counts, seed, config.window_shards) if train else Sequential(index.counts)
    bucket_N, count, step = order_buckets.buckets_of(config, index), len(config.shapes), batch * accumulation
    if not train:
        return BucketsInTurn(index.counts, bucket_N, count, batch)
    order_buckets.check(config, index, bucket_N, step)
    return BucketOrder(index.counts, bucket_N, count, step, seed, config.window_shards)


class Reads(Protocol):
    """What a medium's `module` names, made of its settings: bytes to samples, as pure functions of bytes, settings and
    seed. They raise whatever they like on damaged data, before `out` is what it should be.
    """

    def __init__(self, config: Any) -> None: ...

    def sample(self, members: Sequence[bytes], seed: int | None, out: Tensor) -> bool:
        """Put a sample into out (C, *sides), augmented by the seed, or not (None); whether it had to be enlarged.
        `members` are those of config.members, in their order."""

    def views(self, members: Sequence[bytes], kind: Any, out: Tensor) -> bool:
        """Put the views that config.views has under `kind` into out (V, C, *sides); whether it had to be enlarged."""


class BrokenData(ExplainedError):
    """More samples in a row are broken than `max_broken` allows."""


@dataclass
class SampleBatch:
    """The b = global batch / world samples of one rank."""

    samples: Tensor  # (b, C, *sides) float32, images (b, 3, H, W) in [-1, 1]; zero where not valid
    labels: Tensor  # (b,) int64; -1 = unknown
    keys: list[str]
    valid: Tensor  # (b,) bool; false only in evaluation: past the last sample, or broken
    numbers: Tensor  # (b,) int64: sample numbers in the data set; -1 past the last
    broken: list[str]  # `shard key: reason` for each sample that was replaced (training) or left out (evaluation)
    enlarged: int = 0  # samples that were smaller than the config asks for: short sides of images

    def pin_memory(self) -> SampleBatch:
        """Called by the DataLoader where there is a GPU, so that copies to it can be asynchronous."""
        tensors = {name: getattr(self, name).pin_memory() for name in ("samples", "labels", "valid")}
        return replace(self, **tensors)


class _Samples(Dataset[SampleBatch]):
    """Numbers of the order to a batch; runs in the workers, and keeps nothing that a batch depends on."""

    def __init__(self, config: MediumConfig, index: Index, order: AnyOrder, seed: int) -> None:
        self.config, self.index, self.order, self.seed = config, index, order, seed
        self.reader, self.medium = Reader(config, index), medium(config)

    def __getitems__(self, numbers: list[int]) -> SampleBatch:
        count = len(numbers)
        samples = room(count, *self.config.shapes[self.order.shape_of(numbers[0])])
        labels, chosen = torch.full((count,), -1), torch.full((count,), -1)
        valid, keys, broken, enlarged = torch.zeros(count, dtype=torch.bool), [""] * count, list[str](), 0
        if self.reader.fetched and numbers[0] in self.order:
            self.reader.prepare(self.order.shards_of(numbers[0]), self.order.shards_of(numbers[0], ahead=1))
        for row, number in enumerate(numbers):
            if number in self.order:
                sample, valid[row], small = self._take(number, broken, samples[row])
                chosen[row], keys[row] = sample, self.index.key(sample)
                labels[row] = int(self.index.samples.labels[sample])
                enlarged += small
        samples[~valid] = 0.0
        return SampleBatch(samples, labels, keys, valid, chosen, broken, enlarged)

    def _take(self, number: int, broken: list[str], out: Tensor) -> tuple[int, bool, bool]:
        """(sample number, is it in `out`, was it too small) of a position of the order, or of the next good one; in
        evaluation a broken one is not replaced.
        """
        order = self.order
        epoch, wanted = order[number]
        seed = derive("augment", self.seed, epoch, wanted) if order.endless else None
        reason = ""
        for further in range(self.config.max_broken + 1):
            sample = order.after(number, further) if further and isinstance(order, Endless) else wanted
            try:
                return sample, True, self.medium.sample(self.reader.read(sample), seed, out)
            except Exception as error:  # a decoder may raise anything on damaged data
                reason = f"{self.reader.describe(sample)}: {type(error).__name__}: {error}"
            if further == 0:
                broken.append(reason)
            if not order.endless:
                return wanted, False, False
        raise BrokenData(
            f"{self.config.max_broken + 1} samples in a row are broken, the last is {reason}; "
            f"max_broken = {self.config.max_broken} allows no more: repair or leave out the shard, or raise max_broken"
        )


class SampleStream:
    """A rank's part of the batches of a data set. `rank` and `world` count all processes of the run; every rank has
    the same config and seed.
    """

    def __init__(
        self,
        config: MediumConfig,
        batch: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        train: bool = True,
        keys: Sequence[str] | None = None,
        accumulation: int = 1,
    ) -> None:
        """`batch` is global: a rank takes batch / world, a step `accumulation` of them. Reads the index, makes it where
        there is none; no communication. With `keys` the data set is the samples that have them (shards/chosen.py).
        """
        if batch < 1 or batch % world:
            near = f"{batch // world * world or world} or {(batch // world + 1) * world}"
            raise ValueError(
                f"a global batch of {batch} samples does not divide by {world} processes: "
                f"change the batch, for example to {near}, or the number of processes"
            )
        self.config, self.batch, self.rank, self.world = config, batch, rank, world
        self.index = build(config) if keys is None else chosen(build(config), keys)
        self.num_samples = len(self.index)
        self.fingerprint = self.index.fingerprint()
        self.damage = list(self.index.samples.damage)
        self.order = ordered(config, self.index, batch, seed, train, accumulation)
        self._samples = _Samples(config, self.index, self.order, seed)
        self._check_cache()

    def _check_cache(self) -> None:
        """The shards of the windows at hand, those in use and the next, must fit into the cache together."""
        fetched = [self.index.bytes[shard] for shard in self._samples.reader.fetched]
        window = (self.config.window_shards or len(fetched)) if self.order.endless else 1
        need = sum(sorted(fetched)[-self.order.windows * window :])
        if need > self.config.cache_gb * 1e9:
            raise ValueError(
                f"{self.order.windows} windows of {window} streamed shards are up to {need / 1e9:.3g} GB, but "
                f"cache_gb = {self.config.cache_gb:g}: lower window_shards, or raise cache_gb"
            )

    def batches(self, consumed: int = 0) -> Iterator[SampleBatch]:
        """Training: endless, from sample number `consumed` of the run. Evaluation: from `consumed` to the last sample,
        each once, with as many batches on every rank; what lies past the last sample has valid = False.
        """
        reading = read(self._samples, _Numbers(self, consumed), self.config.num_workers, self.rank, "data.num_workers")
        news = self.damage if consumed == 0 and self.rank == 0 else []  # once, so that a sum over ranks counts it once
        try:
            for batch in reading:
                batch.broken[:0], news = news, []
                yield batch
        finally:
            reading.close()


class _Numbers:
    """The positions of this rank, a list for each step; those past the end of an evaluation too."""

    def __init__(self, stream: SampleStream, consumed: int) -> None:
        self.stream, self.consumed = stream, consumed

    def __iter__(self) -> Iterator[list[int]]:
        stream, start = self.stream, self.consumed
        end = None if stream.order.endless else len(stream.order)
        part = stream.batch // stream.world
        while end is None or start < end:
            first = start + stream.rank * part
            yield list(range(first, first + part))
            start += stream.batch
