"""From a folder of photographs to plans of shards: every file is opened once to know what is in it, then squares are
cut (squares.py says where) and written as PNG. All squares of a photograph are on one side of the split.

A file is what its content says, upright by its EXIF orientation. One without a whole picture is left out and named, up
to a bound; copies of a photograph, byte for byte, count once.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath

from PIL import Image
from tqdm import tqdm

from vqscale.data.made.make import Plan, Sample, classes_of, digest_of, labelled
from vqscale.data.made.squares import CropsConfig, box, split
from vqscale.data.order import permutation
from vqscale.data.pixels import FORMATS, decode
from vqscale.disk import png
from vqscale.seed import derive

MOST_BYTES = 2**29  # of squares that are held in memory while they are mixed


@dataclass(frozen=True)
class Photograph:
    name: PurePath
    """below the folder"""
    digest: str
    """of its bytes"""


@dataclass
class Found:
    """What lies in a folder."""

    photographs: list[Photograph] = field(default_factory=list)
    """in the order of their names"""
    left_out: list[str] = field(default_factory=list)
    """`name: reason` of each file without a picture of which squares can be cut"""
    copies: int = 0
    """files with the bytes of another one"""
    others: Counter[str] = field(default_factory=Counter)
    """suffixes of files that are no pictures by their names"""


def find(root: Path, config: CropsConfig) -> Found:
    """Open all pictures below `root`. ValueError if there are none to cut, or more broken ones than max_broken."""
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: --source takes `shapes`, or a folder of pictures")
    found, seen = Found(), set[str]()
    for path in tqdm(_pictures(root, found), desc="opening", unit="file", disable=None):
        name = path.relative_to(root)
        try:
            data = path.read_bytes()
            digest = _digest(data)
            if digest not in seen:
                _check(data, config)
                found.photographs.append(Photograph(name, digest))
            found.copies += digest in seen
            seen.add(digest)
        except MemoryError:
            raise
        except Exception as error:  # a decoder may raise anything on damaged data
            reason = " ".join(str(error).split()) or type(error).__name__
            found.left_out.append(f"{str(name)!r}: {reason[:200]}")
    _judge(found, root, config)
    return found


def plans(root: Path, found: Found, config: CropsConfig) -> tuple[Plan, Plan | None]:
    """(to train on, held out): squares in a mixed order, with the class of their photograph if it is in a folder."""
    classes = classes_of([photograph.name for photograph in found.photographs])
    parts = split([photograph.digest for photograph in found.photographs], config.held_out, config.seed)
    train, held_out = ([found.photographs[place] for place in part] for part in parts)
    return _plan(root, train, classes, config), _plan(root, held_out, classes, config) if held_out else None


class _Squares:
    """number -> sample. Photographs are mixed, then the squares inside groups of them: a group is cut at once, so that
    every photograph is decoded once, and a group is what fits into MOST_BYTES.
    """

    def __init__(
        self, root: Path, photographs: Sequence[Photograph], classes: dict[str, int], config: CropsConfig
    ) -> None:
        self.root, self.classes, self.config = root, classes, config
        order = permutation(len(photographs), derive("make", config.seed))
        self.photographs = [photographs[place] for place in order]
        self.together = max(1, MOST_BYTES // (3 * config.size**2 * config.crops))
        self._group, self._held = -1, list[Sample]()

    def __call__(self, number: int) -> Sample:
        group, place = divmod(number, self.together * self.config.crops)
        if group != self._group:
            self._group, self._held = group, self._mixed(group)
        return self._held[place]

    def _mixed(self, group: int) -> list[Sample]:
        begin = group * self.together
        squares = [square for photo in self.photographs[begin : begin + self.together] for square in self._cut(photo)]
        return [squares[place] for place in permutation(len(squares), derive("make", self.config.seed, group))]

    def _cut(self, photograph: Photograph) -> list[Sample]:
        data = (self.root / photograph.name).read_bytes()
        if _digest(data) != photograph.digest:
            raise ValueError(
                f"{self.root / photograph.name} has other bytes than when the folder was opened: let it rest, and "
                "start again in another --out"
            )
        image = decode(data)
        return [self._square(image, photograph, number) for number in range(self.config.crops)]

    def _square(self, image: Image.Image, photograph: Photograph, number: int) -> Sample:
        size = self.config.size
        place = box(self.config, photograph.digest, number, image.size)
        square = image.resize((size, size), Image.Resampling.BICUBIC, box=place)
        # a key of our own: the names of photographs may be anything
        made = {"__key__": f"{photograph.digest[:16]}-{number:05d}", "png": png.encoded(square)}
        return made | labelled(photograph.name, self.classes, box=place)


def _plan(root: Path, photographs: Sequence[Photograph], classes: dict[str, int], config: CropsConfig) -> Plan:
    listing = digest_of((photograph.name, photograph.digest) for photograph in photographs)
    settings = asdict(config) | {"scales": list(config.sides)}
    del settings["max_broken"]  # what is made does not depend on it
    facts = {"source": "crops", **settings, "photographs": len(photographs), "listing": listing}
    samples = _Squares(root, photographs, classes, config)
    return Plan(len(photographs) * config.crops, {**facts, "classes": list(classes)}, samples)


def _pictures(root: Path, found: Found) -> list[Path]:
    """The files that are pictures by their names, in the order of these; hidden ones are passed over."""
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    paths = []
    for path in sorted(root.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(root).parts) or not path.is_file():
            continue
        if path.suffix.lower() in suffixes:
            paths.append(path)
        else:
            found.others[path.suffix.lower() or "no suffix"] += 1
    return paths


def _check(data: bytes, config: CropsConfig) -> None:
    width, height = decode(data).size
    if min(width, height) < config.sides[0]:
        raise ValueError(f"{width} x {height} pixels are less than the {config.sides[0]} of the smallest square")


def _judge(found: Found, root: Path, config: CropsConfig) -> None:
    told = "".join(f"\n  {line}" for line in found.left_out[:10])
    if len(found.left_out) > config.max_broken:
        raise ValueError(
            f"{len(found.left_out)} files in {root} have no whole picture, or one too small, and at most "
            f"{config.max_broken} may: repair them or take them out, change --scales, or raise --max-broken; the "
            f"first of them:{told}"
        )
    if not found.photographs:
        others = ", ".join(f"{count} of {suffix}" for suffix, count in found.others.most_common(5)) or "none"
        raise ValueError(
            f"no picture in {root} of which squares can be cut; other files: {others}: give a folder with pictures in "
            f"it or in folders below ({', '.join(FORMATS)}){told}"
        )


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
