"""The one writer of a folder (a run, a cache, samples, a study): FOLDER/.writer names it: host, process, since when.

The file is there as long as its holder is, and what a killed one left is no obstacle. On the same machine a process is
looked up, by its number and the time of its start. One of another machine says every BEAT_S that it is alive, and is
gone when nothing was seen of it for STALE_S; so it works on disks of several machines, with or without locks, and no
two clocks are compared.

Not here: work that several may want done and one does (lock.py).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from vqscale.disk import files
from vqscale.disk.lock import hold, named

log = logging.getLogger(__name__)

NAME, NEXT, GUARD = ".writer", ".writer.next", ".lock"
BEAT_S, STALE_S = 10.0, 120.0
_GUARD_S = 10.0  # most seconds that another one may take to look at a folder; one of 0.1.0 held the guard all along
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)

Holder = dict[str, Any]
Found = TypeVar("Found")


@contextmanager
def own(folder: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Be the one writer of a folder, which is made if it is not there, in this block. ValueError that names the holder
    where there is another one; `what` says what it writes, as "the run".

    Whoever loses it in spite of that, as it stood still for longer than STALE_S and one of another machine took over,
    ends at once with status 1, so that two never write.
    """
    folder = Path(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    mine, path, done = _me(), folder / NAME, threading.Event()
    _take(folder, what, mine)
    beating = threading.Thread(target=_beat, args=(path, mine, done), daemon=True)
    beating.start()
    try:
        yield
    finally:
        done.set()
        beating.join()
        if _read(path) == mine:
            path.unlink(missing_ok=True)
        if made and {each.name for each in folder.iterdir()} <= {GUARD}:  # nothing was written
            (folder / GUARD).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()


def _take(folder: Path, what: str, mine: Holder) -> None:
    path, until = folder / NAME, time.monotonic() + _GUARD_S
    while True:
        holder = _read(path)
        if holder is not None and _lives(path, holder):
            raise ValueError(_refusal(path, what, holder))
        with _guarded(folder, what):
            if _put(path, mine) if holder is None else _replace(path, holder, mine):
                return
        if time.monotonic() > until:  # whoever was about to take the place was killed
            path.with_name(NEXT).unlink(missing_ok=True)
        time.sleep(0.02)


@contextmanager
def _guarded(folder: Path, what: str) -> Iterator[None]:
    """One at a time takes the place of one that is gone, where the disk has locks."""
    until = time.monotonic() + _GUARD_S
    while True:
        with hold(folder / GUARD, wait=False) as alone:
            if alone:
                yield
                return
        if time.monotonic() > until:
            raise ValueError(_refusal(folder / NAME, what, _read(folder / NAME)))
        time.sleep(0.02)


def _refusal(path: Path, what: str, holder: Holder | None) -> str:
    return (
        f"another process is writing {what} in {path.parent}: {_named(holder)}, says {path}: wait until it has ended, "
        "or stop it there, or give another folder"
    )


def _named(holder: Holder | None) -> str:
    if not holder:
        return "one without a name"
    return named(holder.get("pid"), holder.get("host"), holder.get("since"))


def _me() -> Holder:
    pid = os.getpid()
    who = {"host": socket.gethostname(), "pid": pid, "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
    return {**who, "start": _start(pid), "where": _where(), "id": uuid.uuid4().hex}


def _where() -> str:
    """Where numbers of processes mean the same: one start of a machine, and of it one container."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _start(pid: int) -> str:
    """When a process began, in the words of its system; "?" where it does not tell, "" for one that is gone."""
    if os.path.exists("/proc/self/stat"):
        try:
            state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if state in "ZX" else rest[18]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except OSError:  # somebody else's
        return "?"
    return "?"


def _lives(path: Path, holder: Holder) -> bool:
    """Whether the holder that a file names is there; for one of another machine it takes up to STALE_S to say no."""
    pid, where = holder.get("pid"), holder.get("where")
    if not isinstance(pid, int) or pid < 1 or not isinstance(where, str):
        return False  # written by nobody here
    if where == _where():
        return _start(pid) == holder.get("start") != ""
    log.warning("%s names %s: looking for a sign of life of it for up to %g s", path, _named(holder), STALE_S)
    before, until = _mark(path), time.monotonic() + STALE_S
    while time.monotonic() < until:
        time.sleep(min(1.0, BEAT_S / 4))
        now = _mark(path)
        if now != before:
            return now is not None  # none: it ended
    return False


def _mark(path: Path) -> tuple[int, int] | None:
    """What changes with every beat; None without a file."""

    def look() -> tuple[int, int]:
        handle = os.open(path, os.O_RDONLY)  # opening asks the server of a network disk for what is true now
        try:
            found = os.fstat(handle)
            return found.st_mtime_ns, found.st_ino
        finally:
            os.close(handle)

    return _as_it_is(look)


def _read(path: Path) -> Holder | None:
    """Who holds it; None for nobody, {} for a file that does not say."""
    if (text := _as_it_is(path.read_bytes)) is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _as_it_is(look: Callable[[], Found]) -> Found | None:
    """What a look into the file finds; None without a file. It looks again where a network disk says, with ESTALE, that
    another machine has replaced or removed the file that was opened."""
    until = time.monotonic() + _GUARD_S
    while True:
        try:
            return look()
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ESTALE or time.monotonic() > until:
                raise


def _put(path: Path, mine: Holder) -> bool:
    """Make the file, whole, unless there is one: of several who try the disk lets one."""
    made = path.with_name(f"{path.name}.{mine['id']}.tmp")
    try:
        made.write_text(json.dumps(mine))
        os.link(made, path)
    except FileExistsError:
        return _read(path) == mine  # a network disk may have made it, and say that it was there
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create(path, mine)
    finally:
        made.unlink(missing_ok=True)
    return True


def _create(path: Path, mine: Holder) -> bool:
    try:
        with path.open("x") as file:
            json.dump(mine, file)
    except FileExistsError:
        return False
    return True


def _replace(path: Path, holder: Holder, mine: Holder) -> bool:
    """Take the place of a holder that is gone, unless another one has, or is about to, which NEXT says."""
    if not _put(path.with_name(NEXT), mine):
        return False
    try:
        if _read(path) != holder:
            return False
        log.info("the last writer in %s, %s, is gone", path.parent, _named(holder))
        files.write_json(path, mine)
        return True
    finally:
        path.with_name(NEXT).unlink(missing_ok=True)


def _beat(path: Path, mine: Holder, done: threading.Event) -> None:
    """Say every BEAT_S that this process is alive."""
    while not done.wait(BEAT_S):
        try:
            found = _read(path)
            if found == mine:
                os.utime(path)
            elif found is None:  # removed by hand
                _put(path, mine)
            else:
                lost = f"{_named(found)} took over {path.parent} while this process stood still, which therefore ends"
                print(f"error: {lost}", file=sys.stderr, flush=True)
                os._exit(1)
        except OSError as error:
            log.warning("%s cannot be kept up (%s)", path, error)
