"""One process at a time does what several want done (an index, shards), and the others wait: an advisory lock on a
file, which names its holder, and which the system frees when that dies.

Not here: the one writer of a folder (owner.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def hold(path: str | os.PathLike[str], wait: bool = True, why: str = "") -> Iterator[bool]:
    """Hold the lock in this block; waits for it, or with wait=False gives False where somebody else has it.

    Where the disk has no locks the block runs without: what is done under it ends in a rename, so two may do the work
    twice, but not wrong.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        mine = _take(descriptor, wait, why)
        if mine and why:
            _sign(descriptor)
        yield mine
    finally:
        os.close(descriptor)


def _take(descriptor: int, wait: bool, why: str) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            return False
        if why:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            log.info("waiting for %s: %s", holder, why)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        log.warning("no lock on this disk (%s): going on without", error)
    return True


def _sign(descriptor: int) -> None:
    """Write down who holds a lock, for those who wait."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, named(os.getpid(), socket.gethostname(), since).encode(), 0)


def named(pid: object, host: object, since: object) -> str:
    """A holder, as all messages name it."""
    return f"process {pid} of {host} since {since}"
