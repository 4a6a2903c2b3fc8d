"""What is in one tar shard, by its headers alone: keys, offsets, sizes and labels of the samples, and what is damaged.

Grouping follows the webdataset library: a name splits at the first dot of its last part, consecutive equal keys are one sample, `__meta__`
names are skipped. The headers are walked by hand because tarfile takes four times as long for the same answer, and stops at the first
damage; here the walk goes on at the next intact header. File contents have no checksum in a tar: flipped bytes show when they are decoded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from webdataset.tariterators import base_plus_ext

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
LABEL_KEYS = ("cls", "class", "txt")
BLOCK = 512
_SKIPPED = re.compile(r"__[^/]*__($|/)")  # webdataset's skip_meta
_REGULAR = (b"0", b"\0", b"7")
_NO_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders, pipes: their size says nothing


@dataclass
class Sample:
    """One key of a shard: where its image lies (size 0: it has none), its label (-1: unknown) and the names of its members."""

    key: str
    offset: int = 0
    size: int = 0
    label: int = -1
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass
class Contents:
    """The whole samples of a shard in their order, and a line for each damage."""

    samples: list[Sample]
    damage: list[str]


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class _Damage:
    """A place where the walk lost track; `what` is for people."""

    what: str


def read_contents(path: str) -> Contents:
    """Walk the shard at `path`. Raises OSError only if the file cannot be read at all."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _group(descriptor, _walk(descriptor, os.fstat(descriptor).st_size))
    finally:
        os.close(descriptor)


def _walk(descriptor: int, size: int) -> Iterator[_Member | _Damage]:
    """Regular members in file order, with a _Damage wherever something is lost between two of them or at the end."""
    at, name, long_size = 0, None, None
    if size == 0:
        yield _Damage("the file is empty")
        return
    while at < size:
        header = os.pread(descriptor, BLOCK, at)
        if len(header) < BLOCK:
            yield _Damage(f"truncated: the file ends at byte {size}, inside a header")
            return
        if header == bytes(BLOCK):
            return
        if not _checksum_is_right(header):
            found = _next_header(descriptor, at + BLOCK, size)
            gap = f"{found - at} bytes skipped" if found is not None else "no intact header after it"
            yield _Damage(f"damaged header at byte {at}, {gap}")
            if found is None:
                return
            at, name, long_size = found, None, None
            continue
        kind = header[156:157]
        length = 0 if kind in _NO_DATA else _number(header[124:136])
        if long_size is not None and kind in _REGULAR:
            length = long_size
        if length < 0 or at + BLOCK + length > size:
            yield _Damage(f"truncated: the file has {size} bytes, but {_name(header)!r} needs {at + BLOCK + length}")
            return
        if kind == b"L":
            name = os.pread(descriptor, length, at + BLOCK).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif kind == b"x":
            name, long_size = _extended(os.pread(descriptor, length, at + BLOCK), name)
        elif kind in _REGULAR:
            yield _Member(name or _name(header), at + BLOCK, length)
        elif kind == b"S":
            yield _Damage(f"sparse member {_name(header)!r} at byte {at} is not supported")
            return
        if kind not in (b"L", b"x", b"K", b"g"):
            name, long_size = None, None
        at += BLOCK + (length + BLOCK - 1) // BLOCK * BLOCK


def _checksum_is_right(header: bytes) -> bool:
    """The sum of the bytes with the checksum field as blanks, unsigned as POSIX has it or signed as old programs wrote it."""
    try:
        stated = _number(header[148:156])
    except ValueError:
        return False
    if sum(header) - sum(header[148:156]) + 256 == stated:
        return True
    signed = sum(byte - 256 if byte > 127 else byte for byte in header[:148] + header[156:])
    return signed + 256 == stated


def _number(field_: bytes) -> int:
    """An octal number, or GNU's base 256 when the first bit is set. ValueError if it is neither."""
    if field_[0] in (0o200, 0o377):
        return int.from_bytes(field_[1:], "big") - (256 ** (len(field_) - 1) if field_[0] == 0o377 else 0)
    return int(field_.split(b"\0", 1)[0].strip() or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0]
    if prefix and header[257:263] == b"ustar\0":  # GNU's own format keeps other things there
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _extended(records: bytes, name: str | None) -> tuple[str | None, int | None]:
    """(path, size) of a PAX header, which is lines of `length key=value`."""
    size = None
    while records:
        length = int(records.split(b" ", 1)[0])
        key, _, value = records[:length].split(b" ", 1)[1].rstrip(b"\n").partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            size = int(value)
        records = records[length:]
    return name, size


def _next_header(descriptor: int, at: int, size: int) -> int | None:
    """The offset of the next block from `at` on that is an intact header, if there is one."""
    chunk = 2048 * BLOCK
    for begin in range(at, size - BLOCK + 1, chunk):
        blocks = os.pread(descriptor, chunk, begin)
        for inner in range(0, len(blocks) - BLOCK + 1, BLOCK):
            header = blocks[inner : inner + BLOCK]
            if header[257:262] == b"ustar" and _checksum_is_right(header):
                return begin + inner
    return None


def _group(descriptor: int, members: Iterator[_Member | _Damage]) -> Contents:
    """Consecutive members of one key to samples. Beside damage a sample is kept only if it has all that the first whole one has."""
    samples: list[Sample] = []
    doubtful: list[Sample] = []
    damage: list[str] = []
    current: Sample | None = None
    after_damage = False
    for member in members:
        if isinstance(member, _Damage):
            damage.append(member.what)
            if current is not None:
                doubtful.append(current)
            current, after_damage = None, True
            continue
        key, suffix = base_plus_ext(member.name)
        if key is None or _SKIPPED.match(member.name):
            continue
        if current is None or current.key != key:
            current = Sample(key)
            samples.append(current)
            if after_damage:
                doubtful.append(current)
            after_damage = False
        if suffix.lower() in current.members:
            damage.append(f"two members {member.name!r}: the first is used")
        current.members.setdefault(suffix.lower(), (member.offset, member.size))
    return _finish(descriptor, samples, doubtful, damage)


def _finish(descriptor: int, samples: list[Sample], doubtful: list[Sample], damage: list[str]) -> Contents:
    unsure = {id(sample) for sample in doubtful}
    expected = next((set(sample.members) for sample in samples if id(sample) not in unsure), None)
    kept = [sample for sample in samples if id(sample) not in unsure or set(sample.members) == expected]
    for sample in kept:
        image = next((sample.members[key] for key in IMAGE_KEYS if key in sample.members), (0, 0))
        sample.offset, sample.size = image
        sample.label = _label(descriptor, sample.members)
    return Contents(kept, damage)


def _label(descriptor: int, members: dict[str, tuple[int, int]]) -> int:
    """The integer of cls, class or txt, or `label` (or `cls`, `class`) of json; -1 where there is none."""
    for key in LABEL_KEYS:
        if key in members and members[key][1] <= 64:
            text = os.pread(descriptor, members[key][1], members[key][0])
            try:
                return int(text)
            except ValueError:
                continue
    if "json" in members:
        try:
            facts = json.loads(os.pread(descriptor, members["json"][1], members["json"][0]))
        except ValueError:
            return -1
        found = (facts.get(key) for key in ("label", "cls", "class")) if isinstance(facts, dict) else iter(())
        return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), -1)
    return -1
