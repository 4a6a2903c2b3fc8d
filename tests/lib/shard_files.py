"""Tar shards with known contents for the tests of data, and an independent slow reading of them by tarfile."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 8


def colour(number: int) -> tuple[int, int, int]:
    """A colour of its own for each number below 2000."""
    return number % 200 + 20, number // 200 * 20 + 20, 255 - number % 200


def png(number: int, size: int = SIZE) -> bytes:
    """A picture of one colour, by which it is known again."""
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour(number)).save(file, "PNG")
    return file.getvalue()


def sample(number: int, suffix: str = "png") -> list[tuple[str, bytes]]:
    """The members of a good sample."""
    return [(f"{number:05d}.cls", str(number % 7).encode()), (f"{number:05d}.{suffix}", png(number))]


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, counts: list[int]) -> list[str]:
    """Shards s-0.tar, s-1.tar, ... with that many samples, numbered through."""
    begin, paths = 0, []
    for shard, count in enumerate(counts):
        members = [member for number in range(begin, begin + count) for member in sample(number)]
        paths.append(str(write_tar(folder / f"s-{shard}.tar", members)))
        begin += count
    return paths


def read_slowly(paths: list[str]) -> list[tuple[str, int, tuple[int, ...]]]:
    """(key, label, colour) of every sample, by tarfile and a dictionary."""
    samples: dict[tuple[str, str], dict[str, bytes]] = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for info in tar:
                key, suffix = info.name.split(".", 1)
                samples.setdefault((path, key), {})[suffix] = tar.extractfile(info).read()
    found = []
    for (_, key), members in samples.items():
        pixels = np.asarray(Image.open(io.BytesIO(members["png"])).convert("RGB"))
        found.append((key, int(members["cls"]), tuple(pixels[0, 0].tolist())))
    return found


def member_offset(path: Path, name: str) -> tuple[int, int]:
    """(offset of the header, offset of the data) of a member."""
    with tarfile.open(path) as tar:
        info = tar.getmember(name)
        return info.offset, info.offset_data


def patch(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)
