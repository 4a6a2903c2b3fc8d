"""Writing a token cache: begin or continue it, write whole storage shards, check everything, seal.

Order matters: a storage shard is durable before its line in the ledger is, and every line before the seal; so whatever
is killed leaves a cache in which the ledger tells the truth. Nothing here communicates: `begin` and `seal` are for one
process, while `Writer` and `verify` are for all, each with storage shards of its own (two writers of one storage shard
lose rows without an error).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vqscale.data.tokens import format as form
from vqscale.data.tokens.format import Card, Entries
from vqscale.disk import files, manifest
from vqscale.errors import ExplainedError

Broken = tuple[int, str, str]  # number, key, reason
_ARRAYS = ("zarr.json", "ids", "labels", "key_bytes", "key_ends", "ledger", "manifest.json")


class Named(Protocol):
    """Labels and keys of images: the contents of an index, say."""

    @property
    def labels(self) -> NDArray[Any]: ...  # (n,) -1 = unknown
    @property
    def key_ends(self) -> NDArray[np.int64]: ...  # (n,) where each key ends in key_bytes
    @property
    def key_bytes(self) -> NDArray[np.uint8]: ...


class CacheError(ExplainedError):
    """A cache could not be finished, for a reason that its message explains; what the ledger lists stands."""


def check(folder: Path, wanted: Card) -> Card | None:
    """The card of the finished cache in the folder, None if it is yet to be made, finished or repaired. Writes nothing.

    ValueError where the folder holds something else, or ids of other images or of another tokenizer.
    """
    card = form.read_card(folder)
    if card is None:
        _check_empty(folder)
        return None
    different = card.differences(wanted)
    if different:
        raise ValueError(
            f"the cache in {folder} is another one:\n  " + "\n  ".join(different) + "\ngive a new folder, or the "
            "tokenizer, the images and the options that this cache was begun with"
        )
    seal = form.sealed(folder)
    return card if seal is not None and not form.damage(folder, seal) else None


def _check_empty(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, but a cache is a folder: give another one")
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in found if name != "card.json.tmp" and not name.startswith(".")]  # the card comes first
    if others:
        raise ValueError(
            f"{folder} holds {', '.join(others[:3])}{' ...' if len(others) > 3 else ''} and no card.json, so it is no "
            "token cache: give a folder that is new or empty"
        )


def begin(folder: Path, wanted: Card, images: Named) -> tuple[Card, Entries]:
    """Make the cache, or go on with the one that is there: (its card, the storage shards that are finished).

    For one process, after `check`; another one that writes the same cache must be kept away by the caller.
    """
    card = form.read_card(folder)
    if card is None:
        _check_empty(folder)
        folder.mkdir(parents=True, exist_ok=True)
        card = wanted
        form.write_card(folder, card)
    entries = form.finished(folder, card)
    if not entries:  # nothing to lose; and a first start may have been killed before all was there
        for name in _ARRAYS:
            _remove(folder / name)
        form.create(folder, card)
    form.write_flat(folder, "labels", images.labels.astype(np.int64))
    form.write_flat(folder, "key_bytes", images.key_bytes)
    form.write_flat(folder, "key_ends", images.key_ends.astype(np.int64))
    (folder / "ledger").mkdir(exist_ok=True)
    files.sync(folder)
    for left in (folder / "ids").glob("*.partial"):  # by writers that were killed
        left.unlink()
    return card, entries


def remove(folder: Path) -> None:
    """Remove the cache in a folder, if there is one, and nothing that somebody laid beside it."""
    if form.read_card(folder) is None:
        return
    for name in _ARRAYS:
        _remove(folder / name)
    _remove(folder / "card.json")  # last: it says whose the others are
    with contextlib.suppress(OSError):  # something else lies in it
        folder.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Writer:
    """Writes storage shards of one cache, and a ledger of its own; `entries` are the lines it has written."""

    def __init__(self, folder: Path, card: Card, rank: int = 0) -> None:
        self.folder, self.card = folder, card
        self.entries: Entries = {}
        self._ids = form.open_ids(folder, card, write=True)
        self._ledger = folder / "ledger" / f"{time.time_ns():020d}-{rank:05d}-{uuid.uuid4().hex[:8]}.jsonl"

    def empty(self) -> NDArray[np.int64]:
        """Ids (storage, views, h, w ...) for `write`, all -1."""
        return np.full((self.card.storage, len(self.card.views), *self.card.ids_shape), -1, dtype=np.int64)

    def write(self, shard: int, ids: NDArray[np.int64], broken: Sequence[Broken] = ()) -> None:
        """Write a storage shard from the first rows of `ids`; when it returns, array and ledger are durable.

        CacheError for ids that the tokenizer does not have, and for missing ones of images that are not in `broken`.
        """
        span = self.card.span(shard)
        ids = ids[: len(span)]
        wrong = bad_rows(ids, self.card, [number - span.start for number, _, _ in broken])
        if wrong:
            raise CacheError(
                f"images {span.start} to {span.stop - 1} have {wrong}: the tokenizer gives ids that it does not have, "
                "or none; nothing of these images was written"
            )
        path = form.shard_file(self.folder, self.card, shard)
        path.unlink(missing_ok=True)  # damaged; where the array ends inside of it zarr would read it first
        self._ids[span.start : span.stop] = ids.astype(self.card.dtype)
        sealed = manifest.seal(path)
        files.sync(path.parent)
        entry = {"shard": shard, "images": [span.start, span.stop], **sealed, "broken": [list(line) for line in broken]}
        files.append(self._ledger, json.dumps(entry))
        self.entries[shard] = entry


def bad_rows(ids: NDArray[Any], card: Card, broken: Sequence[int] = ()) -> str:
    """What is wrong with ids (images, views, ...), "" for nothing: the images `broken` must be -1, all others in
    [0, K).
    """
    good = np.ones(len(ids), dtype=bool)
    good[list(broken)] = False
    there = ids[good]
    if there.size and (there.min() < 0 or there.max() >= card.num_codes):
        return f"ids from {there.min()} to {there.max()}, where 0 to {card.num_codes - 1} are codes"
    if np.any(ids[~good] != -1):
        return "ids of an image that could not be read"
    return ""


def verify(folder: Path, card: Card, entries: Entries, shards: Iterable[int]) -> list[str]:
    """Read these storage shards again: what is wrong with each that is not what the ledger says was written.

    The files of those are removed, so that the next start writes them anew.
    """
    ids, found = form.open_ids(folder, card), []
    for shard in shards:
        path, span, entry = form.shard_file(folder, card, shard), card.span(shard), entries[shard]
        if not path.exists():
            found.append(f"{path.name} is not there")
            continue
        if hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            wrong = "other bytes than were written"
        else:
            rows = ids[span.start : span.stop]
            wrong = bad_rows(rows, card, [number - span.start for number, _, _ in entry["broken"]])
        if wrong:
            found.append(f"{path.name} has {wrong}")
            path.unlink()
    return found


def seal(folder: Path, card: Card, entries: Entries, faults: Sequence[str]) -> Card:
    """The last step, for one process, after all storage shards were verified; `faults` are what was found. Returns the
    card with the broken images. CacheError where there are faults.
    """
    if faults:
        raise CacheError(
            f"{len(faults)} of the {card.num_shards} storage shards in {folder} are not what was written: "
            f"{'; '.join(faults[:3])}. The disk or the memory of a machine may be faulty. They were removed; the same "
            "command encodes them again and finishes the cache"
        )
    assert sorted(entries) == list(range(card.num_shards)), "storage shards are not finished"
    broken = sorted(tuple(line) for entry in entries.values() for line in entry["broken"])
    card = replace(card, broken=tuple(broken))
    form.write_card(folder, card)
    listed = {
        form.shard_file(folder, card, shard).relative_to(folder).as_posix(): {
            name: entry[name] for name in ("bytes", "sha256")
        }
        for shard, entry in sorted(entries.items())
    }
    small = [folder / "card.json", folder / "zarr.json", folder / "ids" / "zarr.json"]
    for name in ("labels", "key_bytes", "key_ends"):
        small += sorted(path for path in (folder / name).iterdir() if path.is_file())
    listed |= {path.relative_to(folder).as_posix(): manifest.seal(path) for path in small}
    manifest.write(folder, {"files": listed})
    return card
