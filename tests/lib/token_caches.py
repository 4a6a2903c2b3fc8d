"""Token caches with known ids for tests: the id tells image, view and position."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vqscale.data.shards.contents import Contents
from vqscale.data.shards.index import Index
from vqscale.data.tokens import format as form
from vqscale.data.tokens import write as writing
from vqscale.data.tokens.format import Card

GRID, VIEWS, STORAGE = (2, 3), ("center", "center mirrored", "left"), 4
LABELS = 5


def index(num_images: int) -> Index:
    """The index of images that do not exist: keys n0, n1, ...; every label below LABELS."""
    keys = [f"n{number}".encode() for number in range(num_images)]
    zeros = np.zeros(num_images, np.int64)
    ends = np.cumsum([len(key) for key in keys])
    labels = (np.arange(num_images) * 3 % LABELS).astype(np.int32)
    key_bytes = np.frombuffer(b"".join(keys), np.uint8)
    sides = np.zeros((num_images, 0), np.int32)
    contents = Contents(zeros, zeros.astype(np.uint32), labels, ends, key_bytes, sides, ())
    return Index([], [], [], np.array([num_images]), contents)


def known_ids(card: Card, number: int) -> np.ndarray:
    """(views, h, w ...) of one image, all different; whatever K is."""
    count = len(card.views) * int(np.prod(card.ids_shape))
    first = card.num_codes - (number + 1) * count
    return np.arange(first, first + count).reshape(len(card.views), *card.ids_shape)


def card(num_images: int, **others) -> Card:
    settings = {"grid": GRID, "num_ids": 1, "views": VIEWS, "storage": STORAGE, "num_codes": 1 << 18} | others
    settings = {"image_size": 8, "short_side": 8, "interpolation": "bicubic", "tokenizer": "abc123"} | settings
    settings = {"source": "images", "command": "python tools/encode.py T OUT"} | settings
    return Card(num_images=num_images, **settings)


def fill(writer: writing.Writer, shard: int, broken=()) -> None:
    """Write a storage shard of known ids."""
    ids, span = writer.empty(), writer.card.span(shard)
    for row, number in enumerate(span):
        if number not in broken:
            ids[row] = known_ids(writer.card, number)
    writer.write(shard, ids, [(number, f"n{number}", "torn") for number in span if number in broken])


def write(folder: Path, num_images: int = 31, broken=(), seal: bool = True, **others) -> Card:
    """A cache of known ids; without the seal its last storage shard is missing."""
    made, _ = writing.begin(folder, card(num_images, **others), index(num_images).samples)
    writer = writing.Writer(folder, made)
    for shard in range(made.num_shards - (not seal)):
        fill(writer, shard, broken)
    if not seal:
        return made
    assert writing.verify(folder, made, writer.entries, range(made.num_shards)) == []
    assert form.sealed(folder) is None
    return writing.seal(folder, made, writer.entries, [])
