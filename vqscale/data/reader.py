"""The bytes of a sample by its number: open shards, read at an offset. One per process; nothing depends on what was read before."""

from __future__ import annotations

import os
from collections import OrderedDict

import numpy as np

from vqscale.data.config import ImagesConfig
from vqscale.data.index import Index


class Reader:
    """Reads images of an index; keeps the shards used last open."""

    MOST_OPEN = 64

    def __init__(self, config: ImagesConfig, index: Index) -> None:
        self.index = index
        self.ends = np.cumsum(index.counts)
        self._open: OrderedDict[int, int] = OrderedDict()
        self._process = os.getpid()

    def read(self, sample: int) -> bytes:
        """The image file of a sample. Raises OSError or ValueError if it cannot be had."""
        size, offset = int(self.index.sizes[sample]), int(self.index.offsets[sample])
        if size == 0:
            raise ValueError("no image among its members")
        data = os.pread(self._descriptor(self._shard(sample)), size, offset)
        if len(data) < size:
            raise OSError(f"the shard ends before byte {offset + size}")
        return data

    def describe(self, sample: int) -> str:
        """Shard and key, for messages."""
        return f"{self.index.shards[self._shard(sample)]} {self.index.key(sample)}"

    def _shard(self, sample: int) -> int:
        return int(np.searchsorted(self.ends, sample, side="right"))

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            self._open[shard] = os.open(self.index.shards[shard], os.O_RDONLY)
            while len(self._open) > self.MOST_OPEN:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(shard)
        return self._open[shard]
