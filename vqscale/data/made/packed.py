"""What is read of archives that strangers have packed, a zip or a tar: never more than a stated bound, whatever they
say of themselves.

A tar is unpacked to a file of no name, and its headers are read as those of shards are (shards/tar.py).
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vqscale.data.shards.tar import Damage, members

MOST_UNPACKED = 2**30  # of a tar; CIFAR-10 has 186 MB
OPENED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # of the others a few bytes may unpack to any number at once
CHUNK = 1 << 20


class DamagedError(Exception):
    """Why an archive cannot be read."""


def of_zip(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, most: int) -> bytes:
    """A member, of at most so many bytes; ValueError for a larger one, and what zipfile raises for a damaged one."""
    if entry.file_size > most:
        raise ValueError(f"{entry.file_size} bytes, of which at most {most} are read")
    if entry.compress_type not in METHODS:
        raise ValueError(f"packed by method {entry.compress_type}, and read are 0, stored, and 8, deflated: pack it so")
    with archive.open(entry) as file:
        return file.read(entry.file_size)  # without a number all that is packed is unpacked


def of_tar(path: Path, wanted: re.Pattern[str], most: int) -> Iterator[tuple[re.Match[str], bytes]]:
    """The regular members whose whole names are as wanted, each of at most so many bytes, once all of the tar is
    unpacked and its check sum, if it has one, is right. ValueError for larger ones; DamagedError."""
    with tempfile.TemporaryFile() as whole:
        try:
            _unpack(path, whole)
        except (zlib.error, lzma.LZMAError, EOFError, OSError) as error:
            raise DamagedError(str(error)) from error
        for member in members(whole.fileno()):
            if isinstance(member, Damage):
                if member.certain:
                    raise DamagedError(member.what)
                continue
            if (named := wanted.fullmatch(member.name)) is None:
                continue
            if member.size > most:
                raise ValueError(f"{member.name} in {path} has {member.size} bytes, and at most {most} are read")
            yield named, os.pread(whole.fileno(), member.size, member.offset)


def _unpack(path: Path, whole: IO[bytes]) -> None:
    with path.open("rb") as file:
        begin = file.read(8)
    opened: Any = next((how for magic, how in OPENED.items() if begin.startswith(magic)), open)
    with opened(path, "rb") as file:
        while chunk := file.read(CHUNK):
            whole.write(chunk)
            if whole.tell() > MOST_UNPACKED:
                raise DamagedError(f"it unpacks to more than {MOST_UNPACKED} bytes")
    whole.flush()
