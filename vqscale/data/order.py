"""Which sample comes when: a pure function of (seed, epoch, position), so that the state of a stream is one number.

An epoch permutes the shards, cuts them into windows of `window_shards`, and permutes the samples inside each window:
reads stay close together, and every sample comes exactly once an epoch. Nothing here knows of ranks, workers or files.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from vqscale.seed import derive

Ints = NDArray[np.int64]


def permutation(count: int, seed: int) -> Ints:
    """A permutation of range(count), the same with every version of numpy: raw PCG64 output is frozen, Generator
    methods are not.
    """
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable").astype(np.int64)


class Order:
    """The endless order of training: number n is position n % len of epoch n // len, and holds one sample number."""

    endless = True
    windows = 2  # of shards, that a reader has at hand: the one in use and the next
    KEPT_WINDOWS = 4  # a batch may straddle two windows, and substitutes may look into the next

    def __init__(self, samples_per_shard: Ints, seed: int, window_shards: int) -> None:
        """`samples_per_shard`: (S,) counts; sample numbers run through the shards one after the other. window_shards 0
        = all.
        """
        self.counts = np.asarray(samples_per_shard, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.seed = seed
        self.window = window_shards or max(1, len(self.counts))
        self._epochs: OrderedDict[int, tuple[Ints, Ints]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], Ints] = OrderedDict()

    def __len__(self) -> int:
        """Samples of an epoch."""
        return int(self.starts[-1])

    def __getitem__(self, number: int) -> tuple[int, int]:
        """(epoch, sample number) of the number-th sample since the beginning of training."""
        epoch, position = divmod(number, len(self))
        window, start = self._locate(epoch, position)
        return epoch, int(self._window(epoch, window)[position - start])

    def after(self, number: int, further: int) -> int:
        """The sample number that stands in for that of `number`, so many further on, where those before are broken."""
        return self[number + further][1]

    def __contains__(self, number: int) -> bool:
        """Whether a position holds a sample."""
        return number >= 0

    def shape_of(self, number: int) -> int:
        """Which of the shapes of a source the sample there has."""
        return 0

    def shards_of(self, number: int, ahead: int = 0) -> list[int]:
        """The shards of the window that `number` is in, or of the one `ahead` windows later, in the order of the
        epoch.
        """
        epoch, position = divmod(number, len(self))
        window, _ = self._locate(epoch, position)
        for _ in range(ahead):
            last = (window + 1) * self.window >= len(self.counts)
            epoch, window = (epoch + 1, 0) if last else (epoch, window + 1)
        shards, _ = self._epoch(epoch)
        return [int(shard) for shard in shards[window * self.window : (window + 1) * self.window]]

    def stretch(self, number: int) -> tuple[int, int, Ints]:
        """The window that `number` is in: (epoch, the number of its first sample, all its sample numbers in order)."""
        epoch, position = divmod(number, len(self))
        window, start = self._locate(epoch, position)
        return epoch, epoch * len(self) + start, self._window(epoch, window)

    def _epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """(permuted shards, position at which each window begins)."""
        if epoch not in self._epochs:
            shards = permutation(len(self.counts), derive("shards", self.seed, epoch))
            ends = np.cumsum(self.counts[shards])
            begins = np.concatenate([[0], ends])[:-1][:: self.window]
            self._epochs[epoch] = (shards, begins)
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _locate(self, epoch: int, position: int) -> tuple[int, int]:
        """(window, position at which it begins) of a position of an epoch; windows without samples hold no position."""
        _, begins = self._epoch(epoch)
        window = int(np.searchsorted(begins, position, side="right")) - 1
        return window, int(begins[window])

    def _window(self, epoch: int, window: int) -> Ints:
        """The sample numbers of a window in their order."""
        at = (epoch, window)
        if at not in self._windows:
            shards = self._epoch(epoch)[0][window * self.window : (window + 1) * self.window]
            numbers = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in shards])
            self._windows[at] = numbers[permutation(len(numbers), derive("window", self.seed, epoch, window))]
            while len(self._windows) > self.KEPT_WINDOWS:
                self._windows.popitem(last=False)
        self._windows.move_to_end(at)
        return self._windows[at]


class Sequential:
    """The order of evaluation: every sample once, by number."""

    endless = False
    windows = 2

    def __init__(self, samples_per_shard: Ints) -> None:
        self.ends = np.cumsum(samples_per_shard)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, number: int) -> tuple[int, int]:
        """(0, number): there is one epoch."""
        if number not in self:
            raise IndexError(number)
        return 0, number

    def __contains__(self, number: int) -> bool:
        """Whether a position holds a sample."""
        return 0 <= number < len(self)

    def shape_of(self, number: int) -> int:
        """Which of the shapes of a source the sample there has."""
        return 0

    def stretch(self, number: int) -> tuple[int, int, Ints]:
        """The shard that `number` is in, as in Order: (0, the number of its first sample, its sample numbers)."""
        shard = int(np.searchsorted(self.ends, number, side="right"))
        begin = int(self.ends[shard - 1]) if shard else 0
        return 0, begin, np.arange(begin, int(self.ends[shard]), dtype=np.int64)

    def shards_of(self, number: int, ahead: int = 0) -> list[int]:
        """The shard that `number` is in, or the one `ahead` shards later; none past the end."""
        shard = int(np.searchsorted(self.ends, number, side="right")) + ahead
        return [shard] if shard < len(self.ends) else []
