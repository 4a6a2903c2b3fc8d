"""Local files for shards that have no random access: what comes from a command or a URL is streamed whole into a
folder of bounded size, which the processes of a machine share; a compressed shard is unpacked there. Local
uncompressed shards are read where they lie.

A shard in the folder is taken for what its URL gives now: if the content behind a URL changes, delete the folder.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import logging
import lzma
import os
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from webdataset.gopen import gopen

from vqscale.data.shards.patterns import is_local
from vqscale.disk import files
from vqscale.disk.lock import hold

log = logging.getLogger(__name__)

ATTEMPTS = 3
_PAUSE_S = 1.0
_STALE_S = 3600.0
_CHUNK = 1 << 20
_SILENCE_S = 30.0  # after which it is told that nothing comes
_UNPACKERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


class TooLarge(OSError):
    """A shard, as it comes or unpacked, is larger than all that may be kept."""


class ShardCache:
    """At most `limit` bytes of shards in `folder`, the least recently used deleted first; files that are open stay
    readable.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def open(self, shard: str, keep: Collection[str] = ()) -> int:
        """A descriptor of the shard as a plain tar, fetched if it must be. The shards in `keep` are not deleted for
        it. OSError if it cannot be had.
        """
        while True:
            path = self.fetch(shard, keep)
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if path == shard:
                    raise
                # another process deleted it in between to stay below the limit

    def fetch(self, shard: str, keep: Collection[str] = (), wait: bool = True) -> str:
        """The path of the shard as a plain tar; "" where wait is False and another process is fetching it."""
        if is_direct(shard):
            return shard
        path = self.path(shard)
        if not _touch(path):
            with hold(f"{path}.lock", wait, f"it is fetching {shard}") as mine:
                if not mine:
                    return ""
                if not _touch(path):
                    _download(shard, path, self.limit)
                    self._make_room({path, *(self.path(other) for other in keep if not is_direct(other))})
        return path

    def path(self, shard: str) -> str:
        """Where the shard lies once it is fetched. A compressed local file that changes has another place."""
        name = shard
        if is_local(shard):
            facts = os.stat(shard)
            name = f"{os.path.abspath(shard)} {facts.st_size} {facts.st_mtime_ns}"
        return str(self.folder / f"{hashlib.blake2b(name.encode(), digest_size=12).hexdigest()}.tar")

    def _make_room(self, keep: Collection[str]) -> None:
        """Delete what was not used for the longest time until the folder is within its limit."""
        with hold(self.folder / "room.lock"):
            found = [(facts.st_mtime_ns, facts.st_size, path) for path, facts in _facts(self.folder.glob("*.tar"))]
            total = sum(size for _, size, _ in found)
            for _, size, path in sorted(found):
                if total <= self.limit:
                    break
                if str(path) not in keep:
                    path.unlink(missing_ok=True)
                    total -= size
            for path, facts in _facts(self.folder.glob("*.tmp")):  # left by processes that were killed
                if time.time() - facts.st_mtime > _STALE_S:
                    path.unlink(missing_ok=True)


def _facts(paths: Iterable[Path]) -> Iterator[tuple[Path, os.stat_result]]:
    """Each path with what the disk says of it; without those that another process renamed or deleted meanwhile."""
    for path in paths:
        try:
            yield path, path.stat()
        except FileNotFoundError:
            continue


def is_direct(shard: str) -> bool:
    """Whether the shard can be read where it is: a local file that is not compressed."""
    return is_local(shard) and _unpacker(shard) is None


def _unpacker(path: str) -> Callable[..., Any] | None:
    with open(path, "rb") as file:
        begin = file.read(6)
    return next((opener for magic, opener in _UNPACKERS.items() if begin.startswith(magic)), None)


def _touch(path: str) -> bool:
    """Note that the shard is in use; False if it is not there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _download(shard: str, path: str, limit: int) -> None:
    """Stream `shard` whole, unpack it if it is compressed; it appears at `path` when all is on disk. OSError after
    ATTEMPTS failures, and at once for more than `limit` bytes.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _unpack(shard, path, limit) if is_local(shard) else _stream(shard, path, limit)
            return
        except TooLarge as error:
            raise TooLarge(f"{shard} {error}") from None
        except OSError as error:
            if attempt == ATTEMPTS or is_local(shard):
                raise OSError(f"cannot fetch {shard} (attempt {attempt} of {ATTEMPTS}): {error}") from error
            log.warning("attempt %d of %d to fetch %s failed: %s", attempt, ATTEMPTS, shard, error)
            time.sleep(_PAUSE_S * attempt)


def _stream(shard: str, path: str, limit: int) -> None:
    """All that the command or the URL gives. OSError if it says that it failed, even after giving something."""
    given = f"{_working(path)}.given.tmp"
    try:
        source: Any = gopen(shard)
        try:
            with open(given, "wb") as file:
                _copy(lambda: _read_patiently(source, shard), file, limit)
        finally:
            source.close()
        if _unpacker(given):
            _unpack(given, path, limit)
        else:
            files.place(given, path)
    finally:
        Path(given).unlink(missing_ok=True)


def _copy(read: Callable[[], bytes], file: IO[bytes], limit: int) -> None:
    """What `read` gives, until it gives nothing. TooLarge before more than `limit` bytes are on the disk."""
    room = limit
    while chunk := read():
        room -= len(chunk)
        if room < 0:
            raise TooLarge(f"has more than the {limit / 1e9:.3g} GB that cache_gb allows for all: raise cache_gb")
        file.write(chunk)


def _read_patiently(source: IO[bytes], shard: str) -> bytes:
    """The next of what a command or a URL gives, however long it takes; after a while it is told what is waited for."""
    told = threading.Timer(_SILENCE_S, log.warning, ("nothing comes from %s: waiting since %g s", shard, _SILENCE_S))
    told.daemon = True
    told.start()
    try:
        return source.read(_CHUNK)
    finally:
        told.cancel()


def _unpack(source: str, path: str, limit: int) -> None:
    """Decompress as far as it goes: what is missing from a cut or damaged archive is then reported like that of any
    other shard.
    """
    opener = _unpacker(source)
    assert opener is not None
    with files.writing(path, f"{_working(path)}.tmp") as file, opener(source) as packed:
        _copy(lambda: _read_packed(packed, source), file, limit)


def _working(path: str) -> str:
    """Of this thread alone: where a disk has no locks, several may fetch one shard."""
    return f"{path}.{os.getpid()}.{threading.get_ident()}"


def _read_packed(packed: IO[bytes], source: str) -> bytes:
    try:
        return packed.read(_CHUNK)
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        log.warning("%s cannot be unpacked to its end: %s", source, error)
        return b""
