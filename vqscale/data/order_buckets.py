"""Which sample comes when, where samples have several shapes: a batch is of one bucket, on every rank of a step, and
the state of a stream is still one number.

Every bucket has an endless order of its own (order.Order), from which it gives whole steps of B samples, B being all
that an optimiser step takes, over processes and micro-batches. In epoch e a bucket of n samples has
floor((e + 1) n / B) - floor(e n / B) steps: none of its samples is left out, what an epoch has no whole step for comes
first in the next. The steps of an epoch are permuted. So a batch is a pure function of (seed, epoch, step), on any
number of ranks, workers and micro-batches.

All buckets permute the shards alike, so that they go through the same windows at about the same time.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from vqscale.data.config import MediumConfig
from vqscale.data.order import Ints, Order, permutation
from vqscale.data.shards.index import Index
from vqscale.seed import derive


class BucketOrder:
    """The endless order of training: numbers s B to (s + 1) B - 1 are the samples of step s, all of one bucket."""

    endless = True

    def __init__(self, samples_per_shard: Ints, bucket_N: Ints, count: int, step: int, seed: int, window: int) -> None:
        """`bucket_N` is the bucket of each sample, of `count` buckets; `step` is B, `window` as in Order."""
        shard_N = np.repeat(np.arange(len(samples_per_shard)), samples_per_shard)
        self.members = [np.flatnonzero(bucket_N == bucket) for bucket in range(count)]
        self.orders = [
            Order(np.bincount(shard_N[i], minlength=len(samples_per_shard)), seed, window) for i in self.members
        ]
        self.sizes, self.step, self.seed = np.array([len(i) for i in self.members]), step, seed
        self.windows = 2 * count  # each bucket may be in a window of its own
        self._epochs: OrderedDict[int, tuple[Ints, Ints]] = OrderedDict()

    def __len__(self) -> int:
        """Samples of an epoch."""
        return int(self.sizes.sum())

    def __getitem__(self, number: int) -> tuple[int, int]:
        """(epoch of its bucket, sample number) of the number-th sample since the beginning of training."""
        bucket, position = self._place(number)
        epoch, member = self.orders[bucket][position]
        return epoch, int(self.members[bucket][member])

    def after(self, number: int, further: int) -> int:
        """The sample number that stands in for that of `number`: of the same bucket, so many further on in it."""
        bucket, position = self._place(number)
        return int(self.members[bucket][self.orders[bucket][position + further][1]])

    def __contains__(self, number: int) -> bool:
        """Whether a position holds a sample."""
        return number >= 0

    def shape_of(self, number: int) -> int:
        """The bucket of the samples there."""
        return self._place(number)[0]

    def shards_of(self, number: int, ahead: int = 0) -> list[int]:
        """The shards of the windows that the buckets are in at the step of `number`, or `ahead` windows later."""
        step = number // self.step
        epoch, first = self._epoch_of(step)
        buckets_T, _ = self._steps(epoch)
        turns = self._begun(epoch) + np.bincount(buckets_T[: step - first], minlength=len(self.orders))
        shards = [order.shards_of(int(turn) * self.step, ahead) for order, turn in zip(self.orders, turns, strict=True)]
        return list(dict.fromkeys(shard for some in shards for shard in some))

    def _place(self, number: int) -> tuple[int, int]:
        """(bucket, position in its order) of a number."""
        step, within = divmod(number, self.step)
        epoch, first = self._epoch_of(step)
        buckets_T, turns_T = self._steps(epoch)
        return int(buckets_T[step - first]), int(turns_T[step - first]) * self.step + within

    def _begun(self, epoch: int) -> Ints:
        """Steps that each bucket has had before an epoch."""
        return epoch * self.sizes // self.step

    def _epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, its first step) of a step."""
        epoch = step * self.step // len(self)  # no later one has begun with so few steps
        while self._begun(epoch + 1).sum() <= step:
            epoch += 1
        return epoch, int(self._begun(epoch).sum())

    def _steps(self, epoch: int) -> tuple[Ints, Ints]:
        """(bucket of each step of an epoch, steps that this bucket has had before)."""
        if epoch not in self._epochs:
            begun, ends = self._begun(epoch), self._begun(epoch + 1)
            buckets = np.repeat(np.arange(len(self.sizes)), ends - begun)
            turns = np.concatenate([np.arange(begin, end) for begin, end in zip(begun, ends, strict=True)])
            mixed = permutation(len(buckets), derive("buckets", self.seed, epoch))
            self._epochs[epoch] = buckets[mixed], turns[np.argsort(np.argsort(buckets[mixed], kind="stable"))]
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]


class BucketsInTurn:
    """The order of evaluation: every sample once, bucket after bucket, each filled up to whole batches with positions
    that hold none."""

    endless = False
    windows = 2

    def __init__(self, samples_per_shard: Ints, bucket_N: Ints, count: int, batch: int) -> None:
        self.members = [np.flatnonzero(bucket_N == bucket) for bucket in range(count)]
        self.ends = np.cumsum([-(-len(members) // batch) * batch for members in self.members])
        self.shard_ends = np.cumsum(samples_per_shard)

    def __len__(self) -> int:
        """Positions, with those that hold no sample."""
        return int(self.ends[-1])

    def __contains__(self, number: int) -> bool:
        """Whether a position holds a sample."""
        if not 0 <= number < len(self):
            return False
        bucket, position = self._place(number)
        return position < len(self.members[bucket])

    def __getitem__(self, number: int) -> tuple[int, int]:
        """(0, sample number): there is one epoch."""
        if number not in self:
            raise IndexError(number)
        bucket, position = self._place(number)
        return 0, int(self.members[bucket][position])

    def shape_of(self, number: int) -> int:
        """The bucket of the samples there."""
        return self._place(number)[0]

    def shards_of(self, number: int, ahead: int = 0) -> list[int]:
        """The shard that `number` is in; none ahead: the next sample may lie far behind it."""
        if ahead or number not in self:
            return []
        return [int(np.searchsorted(self.shard_ends, self[number][1], side="right"))]

    def _place(self, number: int) -> tuple[int, int]:
        """(bucket, position in it)."""
        bucket = int(np.searchsorted(self.ends, number, side="right"))
        return bucket, number - (int(self.ends[bucket - 1]) if bucket else 0)


def buckets_of(config: MediumConfig, index: Index) -> Ints:
    """The bucket of each sample: that whose aspect is nearest to its own on a scale of ratios, of two as near the
    narrower. An image whose sides are not known is in the first, where it is met and reported."""
    sides_N2 = index.samples.sides
    bucket_N = np.zeros(len(sides_N2), np.int64)
    known = sides_N2.min(axis=1) > 0
    aspect_b = np.array([width / height for _, height, width in config.shapes])
    by_aspect = np.argsort(aspect_b)
    between = np.sqrt(aspect_b[by_aspect][1:] * aspect_b[by_aspect][:-1])
    bucket_N[known] = by_aspect[np.searchsorted(between, sides_N2[known, 1] / sides_N2[known, 0])]
    return bucket_N


def check(config: MediumConfig, index: Index, bucket_N: Ints, step: int) -> None:
    """ValueError where a bucket has fewer images than a step takes, for a step would see some of them twice."""
    counts = np.bincount(bucket_N, minlength=len(config.shapes)).tolist()
    if min(counts) < step:
        found = ", ".join(
            f"{height} x {width}: {n}" for (_, height, width), n in zip(config.shapes, counts, strict=True)
        )
        raise ValueError(
            f"a batch takes {step} {config.kind} of one bucket, and the shards from {index.shards[0]} on have so "
            f"many in each (height x width) {found}: leave out the buckets with fewer (their images go to the next "
            "nearest), lower the batch, or add shards"
        )
