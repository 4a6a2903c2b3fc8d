"""The list of all samples of a data set, in arrays: where each image lies, its key and its label. Made once by a walk over the headers
(data/tar.py), kept in a folder, and made again for shards whose size or time changed.

It does not know the order of training, and reads no image.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vqscale.data.config import ImagesConfig
from vqscale.data.shards import expand
from vqscale.data.tar import Contents, read_contents


@dataclass(frozen=True)
class Index:
    """S shards, N samples; sample numbers run through the shards one after the other."""

    shards: list[str]
    counts: NDArray[np.int64]  # (S,) samples of each shard
    offsets: NDArray[np.int64]  # (N,) where the image begins in its shard
    sizes: NDArray[np.int64]  # (N,) bytes of the image; 0 = the sample has none
    labels: NDArray[np.int64]  # (N,) -1 = unknown
    key_ends: NDArray[np.int64]  # (N,) where each key ends in key_bytes
    key_bytes: NDArray[np.uint8]
    damage: list[str]  # what is wrong with shards, a line each

    def __len__(self) -> int:
        return len(self.offsets)

    def key(self, sample: int) -> str:
        begin = int(self.key_ends[sample - 1]) if sample else 0
        return self.key_bytes[begin : int(self.key_ends[sample])].tobytes().decode("utf-8", "surrogateescape")

    def fingerprint(self) -> str:
        """Names the samples and their places in the shards, not the paths of the shards: data that is moved keeps it."""
        digest = hashlib.blake2b(digest_size=16)
        for array in (self.counts, self.offsets, self.sizes, self.labels, self.key_ends, self.key_bytes):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def assemble(shards: list[str], contents: list[Contents]) -> Index:
    samples = [sample for content in contents for sample in content.samples]
    keys = [sample.key.encode("utf-8", "surrogateescape") for sample in samples]
    return Index(
        shards,
        np.array([len(content.samples) for content in contents], dtype=np.int64),
        np.array([sample.offset for sample in samples], dtype=np.int64),
        np.array([sample.size for sample in samples], dtype=np.int64),
        np.array([sample.label for sample in samples], dtype=np.int64),
        np.cumsum([len(key) for key in keys], dtype=np.int64),
        np.frombuffer(b"".join(keys), dtype=np.uint8),
        [f"{shard}: {line}" for shard, content in zip(shards, contents, strict=True) for line in content.damage],
    )


def build(config: ImagesConfig) -> Index:
    """The index of the shards of a config. ValueError if there are no shards or no samples."""
    shards = expand(config.patterns)
    index = assemble(shards, [read_contents(shard) for shard in shards])
    if len(index) == 0:
        raise ValueError(
            f"no samples in {len(shards)} shards from {shards[0]} on: {'; '.join(index.damage)}: change `shards`"
        )
    return index
