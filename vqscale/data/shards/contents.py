"""The samples of one shard: its members grouped as the webdataset library groups them, where the members lie that
are asked for (an image, or an image and its depth), its key and its label.

A name splits at the first dot of its last part, consecutive members of one key are one sample, names like `__meta__`
are skipped. A sample that lacks one of them stays in the list, so that it is met, reported and replaced like any other
broken one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from vqscale.data.shards.tar import Damage, Member, members

LABEL_KEYS = ("cls", "class", "txt")
_SKIPPED = re.compile(r"__[^/]*__($|/)")  # webdataset's skip_meta
_NO_MEMBER = (0, 0)
_MOST_JSON = 1 << 20  # bytes in which a label is looked for
_MOST_LINES = 100  # of damage in one shard that are told one by one
_HEAD, _MOST_HEAD = 1 << 16, 1 << 26  # bytes in which the sides of a picture are looked for, at first and at most
Measure = Callable[[bytes], tuple[int, int]]  # (height, width) of a picture by the head of its file


@dataclass(frozen=True)
class Contents:
    """The n whole samples of one shard in file order, m members each, as arrays, and a line for each damage."""

    offsets: NDArray[np.int64]  # (n, m) first byte of each member in the shard
    sizes: NDArray[np.uint32]  # (n, m) bytes of each member; 0 = the sample has none
    labels: NDArray[np.int32]  # (n,) -1 = unknown
    key_ends: NDArray[np.int64]  # (n,) where each key ends in key_bytes
    key_bytes: NDArray[np.uint8]
    sides: NDArray[np.int32]  # (n, 2) height and width of the first member, (0, 0) = unknown; (n, 0) = not measured
    damage: tuple[str, ...]


@dataclass
class _Sample:
    key: str
    doubtful: bool  # beside damage: members may be missing
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


def read_contents(descriptor: int, wanted: Sequence[tuple[str, ...]], measure: Measure | None = None) -> Contents:
    """Walk an open shard for members, each with one of its suffixes, and with `measure` for the sides of the first of
    them. Damage is reported, not raised; OSError if the file cannot be read."""
    samples, damage, suspicion = _group(members(descriptor))
    kept = _whole(samples)
    if suspicion and (not kept or kept[-1] is not samples[-1]):
        damage.append(suspicion)
    places = np.array([[_place(s, suffixes) for suffixes in wanted] for s in kept], dtype=np.int64)
    places = places.reshape(len(kept), len(wanted), 2)
    keys = [sample.key.encode("utf-8", "surrogateescape") for sample in kept]
    return Contents(
        places[:, :, 0],
        places[:, :, 1].astype(np.uint32),
        np.array([_label(descriptor, sample.members) for sample in kept], dtype=np.int32),
        np.cumsum([len(key) for key in keys], dtype=np.int64),
        np.frombuffer(b"".join(keys), dtype=np.uint8),
        _sides(descriptor, places[:, 0].tolist(), measure),
        _first(damage),
    )


def _first(damage: list[str]) -> tuple[str, ...]:
    more = len(damage) - _MOST_LINES
    return tuple(damage) if more <= 0 else (*damage[:_MOST_LINES], f"{more} more places are damaged")


def _sides(descriptor: int, places: Sequence[tuple[int, int]], measure: Measure | None) -> NDArray[np.int32]:
    if measure is None:
        return np.zeros((len(places), 0), np.int32)
    found = [_measured(descriptor, (offset, size), measure) for offset, size in places]
    return np.array(found, dtype=np.int32).reshape(len(places), 2)


def _measured(descriptor: int, place: tuple[int, int], measure: Measure) -> tuple[int, int]:
    """By the head of a file, or by more of it where a profile or a small picture comes first; (0, 0) where no picture
    begins, which is met and reported when it is read."""
    for most in (_HEAD, _MOST_HEAD):
        try:
            return measure(_read(descriptor, (place[0], min(place[1], most))))
        except Exception:  # a decoder may raise anything on damaged data
            if place[1] <= most:
                break
    return 0, 0


def _place(sample: _Sample, suffixes: tuple[str, ...]) -> tuple[int, int]:
    """(offset, size) of the member with the first of these suffixes that is there; one of 4 GiB is none."""
    found = next((sample.members[suffix] for suffix in suffixes if suffix in sample.members), _NO_MEMBER)
    return found if found[1] < 2**32 else _NO_MEMBER


def _group(found: Iterable[Member | Damage]) -> tuple[list[_Sample], list[str], str]:
    """(samples, certain damage, damage that counts only if the last sample is not whole)."""
    samples: list[_Sample] = []
    damage: list[str] = []
    suspicion = ""
    current: _Sample | None = None
    lost = False
    for member in found:
        if isinstance(member, Damage):
            if member.certain:
                damage.append(member.what)
            else:
                suspicion = member.what
            if current is not None:
                current.doubtful = True
            current, lost = None, True
            continue
        key, suffix = base_plus_ext(member.name)
        if key is None or _SKIPPED.match(member.name):
            continue
        if current is None or current.key != key:
            current = _Sample(key, doubtful=lost)
            samples.append(current)
            lost = False
        if suffix.lower() in current.members:
            damage.append(f"{member.name!r} comes twice: the first is used")
        current.members.setdefault(suffix.lower(), (member.offset, member.size))
    return samples, damage, suspicion


def _whole(samples: list[_Sample]) -> list[_Sample]:
    """Without the samples beside damage that lack a member which the first undoubted sample has."""
    expected = next((set(sample.members) for sample in samples if not sample.doubtful), None)
    return [s for s in samples if not s.doubtful or (expected is not None and expected <= set(s.members))]


def _label(descriptor: int, members: dict[str, tuple[int, int]]) -> int:
    """The integer of cls, class or txt, or of `label`, `cls` or `class` in json; -1 where there is none."""
    found: object = None
    for key in LABEL_KEYS:
        if key in members and members[key][1] <= 32:  # longer is a caption
            try:
                found = int(_read(descriptor, members[key]))
                break
            except ValueError:
                continue
    if found is None and members.get("json", (0, _MOST_JSON))[1] < _MOST_JSON:
        try:
            facts = json.loads(_read(descriptor, members["json"]))
        except (ValueError, RecursionError):
            return -1
        named = [facts[key] for key in ("label", "cls", "class") if key in facts] if isinstance(facts, dict) else []
        found = next((value for value in named if isinstance(value, int) and not isinstance(value, bool)), None)
    return found if isinstance(found, int) and 0 <= found < 2**31 else -1


def _read(descriptor: int, member: tuple[int, int]) -> bytes:
    return os.pread(descriptor, member[1], member[0])
