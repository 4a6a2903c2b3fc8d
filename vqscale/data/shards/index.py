"""The list of all samples of a data set: where the members of each lie, its key and its label. Made once from the
headers of the shards, kept in a folder, and made again for the shards whose size or time changed.

It reads no image, and does not know the order of training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vqscale.config import load_class
from vqscale.data.config import ImagesConfig, MediumConfig
from vqscale.data.shards.cache import ShardCache, is_direct
from vqscale.data.shards.contents import Contents, Measure, read_contents
from vqscale.data.shards.patterns import expand, is_local
from vqscale.disk import files
from vqscale.disk.lock import hold

log = logging.getLogger(__name__)

_VERSION = 4  # of the file; another one is made again
_SAVE_EVERY_S = 60.0
_THREADS = 8  # reading headers waits for the disk more than it computes
_ROWS = ("offsets", "sizes", "labels", "sides")  # one for each sample
_ARRAYS = ("offsets", "sizes", "labels", "key_ends", "key_bytes", "sides")


@dataclass(frozen=True)
class Index:
    """S shards, N samples; sample numbers run through the shards one after the other."""

    shards: list[str]
    bytes: list[int]  # (S,) size of each shard
    direct: list[bool]  # (S,) whether it is read where it lies; the others are fetched into the cache first
    counts: NDArray[np.int64]  # (S,) samples of each shard
    samples: Contents  # all N samples; damage has a line for each fault, beginning with its shard

    def __len__(self) -> int:
        return len(self.samples.offsets)

    def key(self, sample: int) -> str:
        begin = int(self.samples.key_ends[sample - 1]) if sample else 0
        text = self.samples.key_bytes[begin : int(self.samples.key_ends[sample])].tobytes()
        return text.decode("utf-8", "backslashreplace")

    def fingerprint(self) -> str:
        """Names the samples and their places in the shards, not where the shards lie: a data set that is moved keeps
        it.
        """
        digest = hashlib.blake2b(self.counts.tobytes(), digest_size=16)
        for name in _ARRAYS:
            digest.update(np.ascontiguousarray(getattr(self.samples, name)).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class _Part:
    """One shard: its contents, and the size and time it had when they were read."""

    size: int
    times: tuple[int, int]  # of its content and of its entry, in ns; 0 where it has none (a URL, a command)
    direct: bool
    contents: Contents


def cache_folder(config: MediumConfig) -> Path:
    """Where streamed shards are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(config.cache_dir or Path(home) / "vqscale").expanduser()


def build(config: MediumConfig) -> Index:
    """The index of a config's shards: from its file where that is up to date, else by reading headers; one process of
    all works, the others wait for it. ValueError if there are no shards or no images; OSError if a shard cannot be
    fetched.
    """
    shards = expand(config.patterns)
    # what an index of images was called before there were others
    more = [] if config.members == (ImagesConfig.suffixes,) else [",".join(names) for names in config.members]
    more += ["sides"] if config.measure else []
    name = hashlib.blake2b("\n".join([*map(_address, shards), *more]).encode(), digest_size=12).hexdigest()
    file = Path(config.index_dir or cache_folder(config)).expanduser() / f"index-{name}.npz"
    columns = 2 if config.measure else 0
    parts = _load(file, shards, columns)
    if len(parts) < len(shards):
        if _can_write(file.parent):
            with hold(f"{file}.lock", why="it is reading the headers of the shards"):
                parts = _load(file, shards, columns)
                _read_missing(config, shards, parts, file)
        else:
            log.warning("the index cannot be kept in %s: set index_dir to a folder that can be written", file.parent)
            _read_missing(config, shards, parts, None)
    index = _assemble(shards, parts)
    damage = (*index.samples.damage, *_shortfalls(index))
    index = replace(index, samples=replace(index.samples, damage=damage))
    if not np.any(np.all(index.samples.sizes, axis=1)):
        wanted = " and a member ".join(map(", ".join, config.members))
        raise ValueError(
            f"no {config.kind} in {len(shards)} shards from {shards[0]} on ({len(index)} samples, of which none has a "
            f"member {wanted}{'; ' + '; '.join(damage[:3]) if damage else ''}): "
            "change `shards`, or make the shards again"
        )
    return index


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _address(shard: str) -> str:
    return os.path.abspath(shard) if is_local(shard) else shard


def _stamp(shard: str) -> tuple[int, tuple[int, int]] | None:
    """(size, times) by which a change shows; None for what is not local. Whoever copies a file over another may keep
    the time of its content (cp -p, rsync -t), and not that of its entry.
    """
    if not is_local(shard):
        return None
    facts = os.stat(shard)
    return facts.st_size, (facts.st_mtime_ns, facts.st_ctime_ns)


def _read_missing(config: MediumConfig, shards: list[str], parts: dict[str, _Part], file: Path | None) -> None:
    """Complete `parts`, and save it now and then and at the end."""
    missing = [shard for shard in shards if shard not in parts]
    if not missing:
        return
    cache = ShardCache(cache_folder(config), int(config.cache_gb * 1e9))
    log.info("reading the headers of %d shards", len(missing))
    measure = load_class(config.measure) if config.measure else None
    saved = time.monotonic()
    with (
        ThreadPoolExecutor(_THREADS) as pool,
        tqdm(total=len(missing), desc="index", unit="shard", disable=None, leave=False) as bar,
    ):
        jobs = {pool.submit(_read_part, cache, shard, config.members, measure): shard for shard in missing}
        try:
            for job in as_completed(jobs):
                parts[jobs[job]] = job.result()
                bar.update()
                if file and time.monotonic() - saved > _SAVE_EVERY_S:
                    _save(file, shards, parts)
                    saved = time.monotonic()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if file:
        _save(file, shards, parts)


def _read_part(cache: ShardCache, shard: str, wanted: Sequence[tuple[str, ...]], measure: Measure | None) -> _Part:
    stamp = _stamp(shard)
    descriptor = cache.open(shard)
    try:
        size, times = stamp or (os.fstat(descriptor).st_size, (0, 0))
        return _Part(size, times, is_direct(shard), read_contents(descriptor, wanted, measure))
    finally:
        os.close(descriptor)


def _assemble(shards: Iterable[str], parts: Mapping[str, _Part]) -> Index:
    """One index of the shards that have a part."""
    names = [shard for shard in shards if shard in parts]
    every = [parts[name].contents for name in names]
    begins = np.cumsum([0, *(len(contents.key_bytes) for contents in every)])
    joined = {
        key: np.concatenate([getattr(contents, key) for contents in every]) for key in _ARRAYS if key != "key_ends"
    }
    ends = np.concatenate([contents.key_ends + begin for contents, begin in zip(every, begins, strict=False)])
    damage = tuple(f"{name}: {line}" for name, contents in zip(names, every, strict=True) for line in contents.damage)
    counts = np.array([len(contents.offsets) for contents in every], dtype=np.int64)
    sizes, direct = [parts[name].size for name in names], [parts[name].direct for name in names]
    return Index(names, sizes, direct, counts, Contents(key_ends=ends, damage=damage, **joined))


def _shortfalls(index: Index) -> list[str]:
    """A line for each shard whose count is not the one in `_info.json` or `info.json` (timm's layout) beside it."""
    stated: dict[str, int] = {}
    for folder in {os.path.dirname(shard) for shard in index.shards if is_local(shard)}:
        for file in (Path(folder, "_info.json"), Path(folder, "info.json")):
            try:
                for split in json.loads(file.read_text())["splits"].values():
                    names = [os.path.join(folder, os.path.basename(name)) for name in split["filenames"]]
                    stated.update(zip(names, split["shard_lengths"], strict=False))
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
    counted = zip(index.shards, index.counts.tolist(), strict=True)
    return [
        f"{shard}: {count} whole samples, but _info.json states {stated[shard]}"
        for shard, count in counted
        if stated.get(shard, count) != count
    ]


def _save(file: Path, shards: Iterable[str], parts: Mapping[str, _Part]) -> None:
    index = _assemble(shards, parts)
    facts = {
        "version": _VERSION,
        "shards": [_address(shard) for shard in index.shards],
        "stamps": [(parts[shard].size, parts[shard].times, parts[shard].direct) for shard in index.shards],
        "damage": [parts[shard].contents.damage for shard in index.shards],
    }
    arrays = {name: getattr(index.samples, name) for name in _ARRAYS}
    said = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
    with files.writing(file, f"{file}.{os.getpid()}.tmp") as out:  # where a disk has no locks, several may write it
        np.savez(out, counts=index.counts, facts=said, **arrays)


def _load(file: Path, shards: Iterable[str], columns: int) -> dict[str, _Part]:
    """The parts of the file that still hold; none where the file is missing, damaged or of another version, or has
    another number of columns of sides."""
    try:
        with np.load(file) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            if facts["version"] != _VERSION:
                return {}
            counts, data = arrays["counts"], {name: arrays[name] for name in _ARRAYS if name in arrays}
            data.setdefault("sides", np.zeros((len(data["labels"]), 0), np.int32))  # files from before there were sides
            if data["sides"].shape[1] != columns:
                return {}
        parts = _cut(facts, counts, data)
        found = {shard: parts[_address(shard)] for shard in shards if _address(shard) in parts}
        return {shard: part for shard, part in found.items() if _stamp(shard) in (None, (part.size, part.times))}
    except (OSError, ValueError, TypeError, LookupError, EOFError, zipfile.BadZipFile, RecursionError):
        return {}


def _cut(facts: Mapping[str, Any], counts: NDArray[np.int64], data: Mapping[str, NDArray[Any]]) -> dict[str, _Part]:
    """The parts of a file, by address. ValueError or so where it does not fit together: it may be a stranger's."""
    ends = np.cumsum(counts)
    if counts.min(initial=0) < 0 or any(len(data[name]) != counts.sum() for name in _ARRAYS if name != "key_bytes"):
        raise ValueError("counts that are not those of the samples")
    found = {}
    for shard, (size, times, direct), damage, begin, end in zip(
        facts["shards"], facts["stamps"], facts["damage"], ends - counts, ends, strict=True
    ):
        first = int(data["key_ends"][begin - 1]) if begin else 0
        last = int(data["key_ends"][end - 1]) if end else 0
        rows = {name: data[name][begin:end] for name in _ROWS}
        keys = data["key_ends"][begin:end] - first
        contents = Contents(key_ends=keys, key_bytes=data["key_bytes"][first:last], damage=tuple(damage), **rows)
        found[shard] = _Part(size, (times[0], times[1]), direct, contents)
    return found
