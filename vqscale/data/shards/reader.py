"""The bytes of a sample by its number: shards kept open, read at an offset. One per process; no answer depends on an
earlier one.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence

import numpy as np

from vqscale.data.config import MediumConfig
from vqscale.data.shards.cache import ShardCache
from vqscale.data.shards.index import Index, cache_folder

log = logging.getLogger(__name__)

_MOST_OPEN = 256
_REST_S = 60.0  # before a shard that could not be had is tried again


class Reader:
    """Reads the samples of an index; shards that must be fetched are fetched a window ahead."""

    def __init__(self, config: MediumConfig, index: Index) -> None:
        self.kind, self.members, self.index = config.kind, config.members, index
        self.cache = ShardCache(cache_folder(config), int(config.cache_gb * 1e9))
        self.ends = np.cumsum(index.counts)
        self.fetched = {shard for shard, direct in enumerate(index.direct) if not direct}
        self._in_use: set[str] = set()
        self._open: OrderedDict[int, int] = OrderedDict()
        self._failed: dict[int, tuple[float, str]] = {}
        self._ahead: threading.Thread | None = None

    def read(self, sample: int) -> list[bytes]:
        """The files of a sample, one for each of config.members; of images the image alone. ValueError if one is not
        there, OSError if one cannot be had.
        """
        sizes, offsets = self.index.samples.sizes[sample].tolist(), self.index.samples.offsets[sample].tolist()
        if lacking := ["/".join(names) for names, size in zip(self.members, sizes, strict=True) if size == 0]:
            raise ValueError(f"no {' and no '.join(lacking)} among its members, which {self.kind} need")
        descriptor = self._descriptor(self.shard(sample))
        found = [os.pread(descriptor, size, offset) for size, offset in zip(sizes, offsets, strict=True)]
        for data, size, offset in zip(found, sizes, offsets, strict=True):
            if len(data) < size:
                raise OSError(f"the shard ends before byte {offset + size}")
        return found

    def shard(self, sample: int) -> int:
        return int(np.searchsorted(self.ends, sample, side="right"))

    def describe(self, sample: int) -> str:
        """Shard and key, for messages."""
        return f"{self.index.shards[self.shard(sample)]} {self.index.key(sample)}"

    def prepare(self, now: Collection[int], later: Sequence[int]) -> None:
        """The shards needed now are kept in the cache; those needed later are fetched in the background, if no other
        process does it.
        """
        if not self.fetched:
            return
        self._in_use = {self.index.shards[shard] for shard in (*now, *later) if shard in self.fetched}
        todo = [self.index.shards[shard] for shard in later if shard in self.fetched]
        if todo and (self._ahead is None or not self._ahead.is_alive()):
            self._ahead = threading.Thread(target=self._fetch_ahead, args=(todo, frozenset(self._in_use)), daemon=True)
            self._ahead.start()

    def _fetch_ahead(self, shards: Sequence[str], keep: Collection[str]) -> None:
        for shard in shards:
            try:
                self.cache.fetch(shard, keep, wait=False)
            except OSError as error:
                log.warning("fetching ahead: %s", error)  # whoever needs it tries again, and reports it

    def _descriptor(self, shard: int) -> int:
        when, why = self._failed.get(shard, (0.0, ""))
        if why and time.monotonic() - when < _REST_S:
            raise OSError(why)
        if shard not in self._open:
            try:
                descriptor = self.cache.open(self.index.shards[shard], self._in_use)
            except OSError as error:
                self._failed[shard] = (time.monotonic(), str(error))
                raise
            size = os.fstat(descriptor).st_size
            if self.index.direct[shard] and size != self.index.bytes[shard]:
                os.close(descriptor)
                raise OSError(f"the shard has {size} bytes, but had {self.index.bytes[shard]} when its index was made")
            self._open[shard] = descriptor
            while len(self._open) > _MOST_OPEN:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(shard)
        return self._open[shard]
