"""One process at a time: an advisory lock on a file, which the system frees when its holder dies. For processes that
share a disk.
"""

from __future__ import annotations

import fcntl
import logging
import os
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
        yield _take(descriptor, wait, why)
    finally:
        os.close(descriptor)


def _take(descriptor: int, wait: bool, why: str) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            return False
        if why:
            log.info("waiting for another process: %s", why)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        log.warning("no lock on this disk (%s): going on without", error)
    return True
