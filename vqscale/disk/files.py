"""The one way to write what must last: beside, fsync, rename, fsync of the folder.

A reader sees the old file or the new one and never half of one; whatever ends the writing in between (a kill, a full
disk, an error) leaves the old one. What a process that was killed leaves beside is called NAME.tmp, and is written over
by the next one that writes NAME. Files that grow by lines are not renamed: a reader skips a last line that is half.

Not here: who may write (lock.py), and what the files of a folder were when it was sealed (manifest.py). No torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

Name = str | os.PathLike[str]

_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)  # some network disks know no fsync of a folder


def write(path: Name, content: str | bytes) -> None:
    """Write a file whole; text is UTF-8."""
    with writing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Name, value: Any) -> None:
    write(path, json.dumps(value, indent=1) + "\n")


@contextlib.contextmanager
def writing(path: Name, made: Name | None = None) -> Iterator[IO[bytes]]:
    """A file to write in this block, for whatever wants a stream (torch.save, numpy, Pillow, a tar); it takes its place
    at the end of the block. An error in the block leaves what was there, and nothing beside it.

    `made` is its name until then, in the same folder: for folders whose files are picked by name, or written by several
    processes at once.
    """
    made = Path(made) if made is not None else beside(path)
    made.unlink(missing_ok=True)  # of a killed process; whatever it is, nothing is written through a link
    try:
        with made.open("xb") as file:
            _keep_mode(file, path)
            yield file
            file.flush()
            os.fsync(file.fileno())
        _rename(made, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the disk may be gone: what is wrong is said by the error that came first
            made.unlink(missing_ok=True)
        raise


def beside(path: Name) -> Path:
    """Where `path` is written before it takes its place."""
    return Path(f"{os.fspath(path)}.tmp")


def place(made: Name, path: Name) -> None:
    """Put a file or folder that was made elsewhere on this disk in its place.

    A file is made durable first; what is in a folder must be durable already (manifest.write sees to it), and where it
    goes there may be no other.
    """
    if not os.path.isdir(made):
        sync(made)
    _rename(made, path)


def set_aside(folder: Name) -> Path:
    """Rename a folder that is to be removed, in one step: a kill in the middle of the removal leaves no half of it."""
    away = Path(f"{os.fspath(folder)}.old.tmp")
    os.rename(folder, away)
    return away


def remove(path: Name) -> None:
    """Remove a file, a link (not what it leads to) or a folder with all that is in it."""
    if os.path.islink(path) or not os.path.isdir(path):
        os.unlink(path)
    else:
        shutil.rmtree(path)


def append(path: Name, line: str) -> None:
    """Add a line to a file that grows, durably."""
    new = not os.path.exists(path)
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync(Path(path).parent)


def sync(path: Name) -> None:
    """Make durable what a file holds, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC or not os.path.isdir(path):
            raise
    finally:
        os.close(handle)


def _rename(made: Name, path: Name) -> None:
    os.replace(made, path)
    sync(Path(path).parent)


def _keep_mode(file: IO[bytes], path: Name) -> None:
    """The permissions of the file that is replaced; a new one has those of the process."""
    with contextlib.suppress(OSError):  # there is none, or the disk has no permissions
        os.fchmod(file.fileno(), stat.S_IMODE(os.stat(path).st_mode))
