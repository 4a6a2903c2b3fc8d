"""What a token cache is on the disk: the ids of a data set's images under one tokenizer, as plain zarr v3.

    FOLDER/
      card.json       whose ids these are (tokenizer, K, views, grid, images); written before the first id
      ids/            int32 (images, views, *grid), or (images, views, *grid, ids of a position); -1 = not there
      labels/         int64 (images,); -1 = unknown
      key_bytes/ key_ends/    the keys of the images, one after the other, and where each ends
      ledger/         a file for each writer, with a line for each storage shard that it has finished
      manifest.json   size and sha256 of all these, written last: the seal, without which nobody reads the cache

A storage shard is one file of ids/: all views of `storage` images one after the other. It is the unit of writing, of
the ledger and of shuffling. Inside it chunks of one view are compressed (blosc-zstd after bitshuffle, which makes
int32 as small as packed bits) and have a checksum each, so that damage is an error and never a wrong id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from vqscale.disk import files, manifest
from vqscale.disk.arrays import open_array

FORMAT, VERSION = "vqscale token cache", 1
Entries = dict[int, dict[str, Any]]  # lines of the ledger by storage shard
_CHUNK = 256  # images


@dataclass(frozen=True)
class Card:
    """Whose ids a cache holds. The fields up to `reading`, without storage, are its identity: a writer that continues
    it must agree in all of them.
    """

    tokenizer: str  # fingerprint
    num_codes: int
    num_ids: int  # of one position
    grid: tuple[int, ...]  # positions along each side: rows and columns of an image
    views: tuple[str, ...]
    num_images: int
    source: str  # fingerprint of the images
    storage: int  # images of a storage shard
    image_size: int = 0  # how images were read; the others say it in `reading`
    short_side: int = 0
    interpolation: str = ""
    reading: tuple[tuple[str, Any], ...] = ()  # settings of another medium that ids depend on
    digits: tuple[int, ...] = ()  # values of each digit of an id, the most significant first; () where it has none
    prior: str = ""  # fingerprint of the prior that has drawn the ids; "" where they are of images
    shards: tuple[str, ...] = ()
    tokenizer_path: str = ""
    command: str = ""  # what continues an unfinished cache
    commit: str = ""
    damage: tuple[str, ...] = ()  # what the index of the images has to say of their shards
    broken: tuple[tuple[int, str, str], ...] = ()  # (number, key, reason) of images without ids; known when sealed

    @property
    def num_shards(self) -> int:
        """Storage shards in all."""
        return -(-self.num_images // self.storage)

    @property
    def ids_shape(self) -> tuple[int, ...]:
        """The shape of the ids of one view of one image: grid, or (*grid, num_ids) where a position has several."""
        return self.grid if self.num_ids == 1 else (*self.grid, self.num_ids)

    @property
    def dtype(self) -> str:
        return "int32" if self.num_codes <= 2**31 else "int64"

    def span(self, shard: int) -> range:
        """The images of a storage shard."""
        return range(shard * self.storage, min((shard + 1) * self.storage, self.num_images))

    def differences(self, other: Card) -> list[str]:
        """A line for each part of the identity in which `other` is not this one."""
        names = [field.name for field in fields(Card)]
        return [
            f"{name}: {getattr(self, name)} there, {getattr(other, name)} now"
            for name in names[: names.index("reading") + 1]
            if name != "storage" and getattr(self, name) != getattr(other, name)
        ]


def storage_for(num_images: int) -> int:
    """Images of a storage shard, a power of two from 64 to 1024 that gives a small data set about 64 of them. It does
    not depend on the number of processes, nor does therefore anything in the files.
    """
    return min(1024, max(64, 1 << max(0, -(-num_images // 64) - 1).bit_length()))


def write_card(folder: Path, card: Card) -> None:
    known = {name: value for name, value in asdict(card).items() if name not in ("reading", "digits", "prior") or value}
    files.write_json(folder / "card.json", {"format": FORMAT, "version": VERSION, **known})


def read_card(folder: Path) -> Card | None:
    """None where there is no card; ValueError where it is not one that can be read here."""
    path = folder / "card.json"
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text())
        kind = (data.pop("format"), data.pop("version"))
        if kind != (FORMAT, VERSION):
            raise ValueError(f"it is a {kind[0]!r} of version {kind[1]}, this code reads {FORMAT!r} of {VERSION}")
        tuples = {name: _tuples(value) if isinstance(value, list) else value for name, value in data.items()}
        return Card(**tuples)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} does not describe a token cache ({type(error).__name__}: {error}): give another folder, or remove "
            "this one and encode again"
        ) from None


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


def create(folder: Path, card: Card) -> None:
    """Make the group and the empty array of ids."""
    attributes = {"format": FORMAT, "num_codes": card.num_codes, "tokenizer": card.tokenizer}
    zarr.create_group(store=str(folder), attributes=attributes, zarr_format=3).create_array(
        "ids",
        shape=(card.num_images, len(card.views), *card.ids_shape),
        dtype=card.dtype,
        shards=(card.storage, len(card.views), *card.ids_shape),
        chunks=(min(_CHUNK, card.storage), 1, *card.ids_shape),
        fill_value=-1,
        compressors=_compressors(np.dtype(card.dtype).itemsize),
        chunk_key_encoding={"name": "default", "separator": "."},  # all files in one folder
        dimension_names=["image", "view", *_sides(len(card.grid)), "id"][: 2 + len(card.ids_shape)],
    )


def _sides(count: int) -> list[str]:
    return ["row", "column"] if count == 2 else [f"side {number}" for number in range(count)]


def write_flat(folder: Path, name: str, data: NDArray[Any]) -> None:
    """Write an array of one dimension, over one that is there."""
    array = zarr.open_group(str(folder), mode="r+", zarr_format=3).create_array(
        name,
        shape=data.shape,
        dtype=data.dtype,
        chunks=(min(max(1, len(data)), 1 << 20),),
        fill_value=0,
        compressors=_compressors(data.dtype.itemsize),
        chunk_key_encoding={"name": "default", "separator": "."},
        overwrite=True,
    )
    array[...] = data


def _compressors(itemsize: int) -> list[Any]:
    from zarr.codecs import BloscCodec, Crc32cCodec

    return [BloscCodec(typesize=itemsize, cname="zstd", clevel=3, shuffle="bitshuffle"), Crc32cCodec()]


def open_ids(folder: Path, card: Card | None = None, write: bool = False) -> Any:
    """The zarr array of ids, of the shape that the card says. For writing, also a storage shard without one id becomes
    a file.
    """
    shape = None if card is None else (card.num_images, len(card.views), *card.ids_shape)
    with zarr.config.set({"array.write_empty_chunks": True}):
        return open_array(folder / "ids", shape, write)


def shard_file(folder: Path, card: Card, shard: int) -> Path:
    return folder / "ids" / ".".join(["c", str(shard), "0", *("0" for _ in card.ids_shape)])


def finished(folder: Path, card: Card) -> Entries:
    """The ledger: the entry {shard, images: [start, stop], bytes, sha256, broken} of every storage shard that is
    finished, and whose file still has its size.

    A line that a killed or full writer left half is no line; of two for one shard the one that fits the file counts.
    """
    entries: Entries = {}
    for file in sorted((folder / "ledger").glob("*.jsonl")):
        for line in file.read_text().splitlines():
            try:
                entry = json.loads(line)
                path = shard_file(folder, card, entry["shard"])
                if path.stat().st_size == entry["bytes"]:
                    entries[entry["shard"]] = entry
            except (ValueError, KeyError, TypeError, OSError):
                continue
    return entries


def sealed(folder: Path) -> Mapping[str, Any] | None:
    """The manifest of a finished cache, or None."""
    try:
        return manifest.read(folder)
    except ValueError:
        return None


def damage(folder: Path, seal: Mapping[str, Any]) -> str:
    """The first file that is not what was sealed, "" for none: sizes of all, the checksum of the card. The arrays have
    checksums of their own, which are looked at where they are read.
    """
    for name, entry in seal["files"].items():
        path = folder / name
        if not path.exists():
            return f"{name} is not there"
        if not manifest.is_file(path):
            return f"{name} is no file"
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size} bytes and not {entry['bytes']}"
        if name == "card.json" and hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            return f"{name} was changed"
    return ""
