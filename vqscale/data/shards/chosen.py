"""Some of the samples of an index, by their keys: a published protocol measures a list of images and no others."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vqscale.data.shards.index import Index


def read_keys(path: str | Path) -> tuple[str, ...]:
    """The keys in a file, one a line. Of a line that names a file (a/ILSVRC2012_val_00000001.JPEG) the key is what
    stands before the first dot of its last part, folders left out, as protocols list file names. ValueError where the
    file cannot be read, lists nothing, or lists a key twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"the keys in {path} cannot be read ({error}): give a text file with a key a line") from None
    keys = [os.path.basename(line.strip()).split(".")[0] for line in lines if line.strip()]
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice or not keys:
        raise ValueError(
            f"{path} lists {len(keys)} keys, {len(twice)} of them more than once ({', '.join(twice[:3])}): list each "
            "image that is measured once, and at least one"
        )
    return tuple(keys)


def chosen(index: Index, keys: Sequence[str]) -> Index:
    """The index of the samples with these keys, in its own order; their numbers are new. Folders before a key do not
    count. ValueError where a key is of no sample, or of several.
    """
    places: dict[str, list[int]] = {key: [] for key in keys}
    for number in range(len(index)):
        found = places.get(os.path.basename(index.key(number)))
        if found is not None:
            found.append(number)
    unknown = [key for key, numbers in places.items() if not numbers]
    several = [key for key, numbers in places.items() if len(numbers) > 1]
    if unknown or several:
        raise ValueError(
            f"of {len(places)} keys that are to be measured {len(unknown)} are of no sample ({', '.join(unknown[:3])}) "
            f"and {len(several)} of several ({', '.join(several[:3])}) among {len(index)} samples from "
            f"{index.shards[0]} on: give the shards that the list was made for, or the list of these shards"
        )
    return _taken(index, sorted(number for (number,) in places.values()))


def _taken(index: Index, numbers: list[int]) -> Index:
    shards = np.searchsorted(np.cumsum(index.counts), numbers, side="right")
    ends = index.samples.key_ends
    begins = np.append(0, ends)[numbers]
    keys = [index.samples.key_bytes[begin:end] for begin, end in zip(begins, ends[numbers], strict=True)]
    samples = replace(
        index.samples,
        offsets=index.samples.offsets[numbers],
        sizes=index.samples.sizes[numbers],
        labels=index.samples.labels[numbers],
        sides=index.samples.sides[numbers],
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        key_bytes=np.concatenate(keys),
        damage=(),
    )
    return replace(index, counts=np.bincount(shards, minlength=len(index.counts)), samples=samples)
