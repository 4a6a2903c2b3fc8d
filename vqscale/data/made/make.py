"""Making WebDataset shards: from drawn shapes, from a folder of images or recordings, or from whatever else gives a
Plan (photographs.py, sounds.py). Shards appear by a rename when they are whole, so an interrupted making goes on where
it stopped; `_info.json` (timm's layout) is written last and says what the shards were made of.

It makes shards for this package or any other that reads WebDataset; nothing here reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any

from tqdm import tqdm
from webdataset import TarWriter

from vqscale.config import load_class
from vqscale.data.config import ImagesConfig, MediumConfig, ShapesConfig
from vqscale.data.config_sounds import SoundsConfig
from vqscale.data.made.shapes import CLASS_NAMES, draw
from vqscale.data.order import permutation
from vqscale.data.pixels import opened as image_of
from vqscale.data.shards.patterns import expand, is_local
from vqscale.data.sounds import opened
from vqscale.disk import files, png
from vqscale.disk.lock import hold
from vqscale.errors import ExplainedError
from vqscale.seed import derive

Sample = dict[str, Any]  # what TarWriter takes


@dataclass(frozen=True)
class Plan:
    """What shards are made of: number -> sample for num_samples of them, and `facts` that name all they depend on."""

    num_samples: int
    facts: Mapping[str, Any]
    sample: Callable[[int], Sample]
    stated: Mapping[str, Any] = field(default_factory=dict)
    """what `_info.json` says of the set for whoever reads it, such as the unit of depth"""


def shapes(config: ShapesConfig) -> Plan:
    """Drawn pictures as PNG, with their class."""

    def sample(number: int) -> Sample:
        index = config.first_index + number
        picture, label = draw(index, config.size, config.seed)
        facts = json.dumps({"label": label, "class": CLASS_NAMES[label]})
        made = {"png": png.encoded(picture), "cls": str(label).encode(), "json": facts.encode()}
        return {"__key__": f"{index:08d}", **made}

    return Plan(config.num_images, {**asdict(config), "classes": list(CLASS_NAMES)}, sample)


def folder(root: Path, seed: int = 0, medium: str | None = None) -> Plan:
    """The files of a medium under `root`, unchanged: `images` or `sounds`, or images and where there are none sounds;
    the folders directly below it are the classes, in the order of their names. The order of the files is mixed by
    `seed`, so that a shard holds many classes. ValueError if there is none.
    """
    found, check = _files(root, medium)
    paths = [path.relative_to(root) for path in found]
    classes = classes_of(paths)
    order = permutation(len(found), derive("make", seed))

    def sample(number: int) -> Sample:
        chosen = int(order[number])
        name, data = paths[chosen], found[chosen].read_bytes()
        try:
            check(data)
        except ExplainedError:  # not about this file
            raise
        except Exception as error:  # decoders raise many kinds on bytes that are not theirs
            raise ValueError(f"{found[chosen]} is not whole ({error}): repair it or take it out") from error
        return {"__key__": f"{chosen:08d}", name.suffix.lower().lstrip("."): data, **labelled(name, classes)}

    facts = {"source": "folder", "listing": listing(root, found), "seed": seed, "classes": list(classes)}
    return Plan(len(found), facts, sample)


def _files(root: Path, medium: str | None) -> tuple[list[Path], Callable[[bytes], None]]:
    """(files of the medium, or of the first that has some below root, what raises on bytes that are none of its)."""
    if not root.is_dir():
        raise ValueError(
            f"{root} is not a folder: --source takes `shapes`, or a folder of images or recordings, one folder for "
            "each class"
        )
    there = [(path, path.suffix.lower().lstrip(".")) for path in sorted(root.rglob("*"))]
    media = {"images": (ImagesConfig.suffixes, _image), "sounds": (SoundsConfig.suffixes, _recording)}
    asked = [medium] if medium else [*media]
    for suffixes, check in (media[name] for name in asked):
        found = [path for path, suffix in there if suffix in suffixes and path.is_file()]
        if found:
            return found, check
    raise ValueError(
        f"no {' and no '.join(asked)} in {root}: files that end in "
        f"{' or '.join(', '.join(media[name][0]) for name in asked)} are looked for, in all folders below; give the "
        "folder that holds the class folders"
    )


def _image(data: bytes) -> None:
    image_of(data).verify()


def _recording(data: bytes) -> None:
    with opened(data):
        pass


def listing(root: Path, paths: Sequence[Path]) -> str:
    """A digest of the names below `root` and the sizes of files, which says whether they are still the same."""
    return digest_of((path.relative_to(root), path.stat().st_size) for path in paths)


def digest_of(facts: Iterable[tuple[object, object]]) -> str:
    """A digest of names, and of a fact about each."""
    digest = hashlib.blake2b(digest_size=16)
    for name, fact in facts:
        digest.update(f"{name}\0{fact}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def classes_of(paths: Sequence[PurePath]) -> dict[str, int]:
    """The folders directly below the root, which are the classes, in the order of their names, and their labels."""
    return {name: label for label, name in enumerate(sorted({path.parts[0] for path in paths if len(path.parts) > 1}))}


def labelled(name: PurePath, classes: Mapping[str, int], **more: Any) -> Sample:
    """The members of a sample that say which file it is of, and of which class if that is in a folder."""
    label = classes[name.parts[0]] if len(name.parts) > 1 else -1
    facts = {"label": label, "class": name.parts[0] if label >= 0 else None, "file": str(name), **more}
    return {"json": json.dumps(facts).encode()} | ({"cls": str(label).encode()} if label >= 0 else {})


def write_all(plans: Sequence[tuple[str, Plan]], place: Path, shard_size: int) -> list[str]:
    """`write` of several sets into one folder, each under its name; the pattern of the shards of each."""
    shards = {name: names(place.expanduser(), name, plan.num_samples, shard_size) for name, plan in plans}
    for name, plan in plans:
        is_made(plan, shards[name], name)  # what is in the way of any is said before the first is written
    for name, plan in plans:
        write(plan, shards[name], name)
    ends = [(name, *(path.stem.rsplit("-", 1)[1] for path in (made[0], made[-1]))) for name, made in shards.items()]
    return [f"{place}/{name}-{{{first}..{last}}}.tar" for name, first, last in ends]


def write(plan: Plan, shards: Sequence[Path], split: str) -> None:
    """Make the shards of one folder, the samples spread evenly over them in their order; those that are finished are
    kept. Safe when several processes do it at once. ValueError if there are shards made of something else.
    """
    if is_made(plan, shards, split):  # before the lock: the folder may be one that cannot be written
        return
    place, wanted = shards[0].parent, _wanted(plan, shards)
    place.mkdir(parents=True, exist_ok=True)
    with hold(place / ".making.lock", why=f"it is making {split} shards in {place}"):
        if is_made(plan, shards, split):
            return
        note = place / f".{split}.making.json"
        _clear(note, split, wanted)
        _write(note, json.dumps(wanted))
        ends = [plan.num_samples * (number + 1) // len(shards) for number in range(len(shards))]
        with tqdm(total=plan.num_samples, desc=f"making {split}", unit="sample", disable=None) as bar:
            for shard, begin, end in zip(shards, [0, *ends], ends, strict=False):
                if not shard.exists():
                    _write_shard(plan, shard, range(begin, end), bar)
                bar.update(end - bar.n)
        lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        _record(place, split, wanted, lengths, plan.stated)
        note.unlink()


def names(place: Path, name: str, num_samples: int, shard_size: int) -> list[Path]:
    """As many names as it takes: place/name-0000.tar and so on, all of the same length."""
    count = -(-num_samples // shard_size)
    digits = max(4, len(str(count - 1)))
    return [place / f"{name}-{number:0{digits}d}.tar" for number in range(count)]


def make_missing(config: MediumConfig) -> None:
    """Make the shards that `config.drawn` describes where they are not there; nothing without it."""
    if config.drawn is None:
        return
    shards = expand(config.patterns, must_exist=False)
    places = {os.path.dirname(shard) for shard in shards}
    if len(places) > 1 or not all(is_local(shard) for shard in shards):
        raise ValueError(
            f"`make` writes to one folder, but `shards` = {config.shards!r} names {len(shards)} shards in "
            f"{len(places)}: name local files of one folder, or take `make` out of the config"
        )
    write(load_class(config.drawn.plan)(config.drawn), [Path(shard) for shard in shards], split_name(shards[0]))


def split_name(shard: str) -> str:
    """`train` for a/train-0007.tar: what stands before the last number."""
    return re.sub(r"[-_.]?\d+$", "", Path(shard).name.removesuffix(".tar")) or "data"


def is_made(plan: Plan, shards: Sequence[Path], split: str) -> bool:
    """Whether all is there: made by this plan, or brought by somebody (of which nothing is asked). ValueError as of
    `write`, and nothing is written.
    """
    place, wanted = shards[0].parent, _wanted(plan, shards)
    info = _read(place / "_info.json")
    made = info.get("splits", {}).get(split, {}).get("made")
    if made is not None and made != wanted:
        differing = [key for key in {**made, **wanted} if made.get(key) != wanted.get(key)]
        raise ValueError(
            f"the {split} shards in {place} were made with {_show(made, differing)}, but now asked for is "
            f"{_show(wanted, differing)}: take another folder, or delete the old shards and _info.json"
        )
    if differing := [key for key in plan.stated if info.get(key, plan.stated[key]) != plan.stated[key]]:
        raise ValueError(
            f"_info.json in {place} says {_show(info, differing)}, but of the {split} shards it is "
            f"{_show(plan.stated, differing)}: take another folder for what differs"
        )
    there = [shard for shard in shards if shard.exists()]
    started = (place / f".{split}.making.json").exists()
    if made is None and not started and 0 < len(there) < len(shards):
        raise ValueError(
            f"{len(there)} of the {len(shards)} {split} shards to be made are in {place} already, and nothing says "
            "what they were made of: take another folder, or delete them"
        )
    return len(there) == len(shards) and not started


def _wanted(plan: Plan, shards: Sequence[Path]) -> dict[str, Any]:
    return {**plan.facts, "num_samples": plan.num_samples, "shards": [shard.name for shard in shards]}


def _show(facts: Mapping[str, Any], keys: Sequence[str]) -> str:
    text = ", ".join(f"{key} = {facts.get(key)}" for key in keys)
    return text if len(text) <= 200 else text[:200] + " ..."


def _clear(note: Path, split: str, wanted: Mapping[str, Any]) -> None:
    """Delete what an interrupted making of something else left."""
    old = _read(note)
    if old and old != wanted:
        for name in old.get("shards", []):
            if _is_shard(name, split):
                (note.parent / name).unlink(missing_ok=True)
    for working in note.parent.glob(".*.tar.tmp"):
        working.unlink(missing_ok=True)


def _is_shard(name: object, split: str) -> bool:
    """Whether a name in a note is one that a making of this split gives: the note may be a stranger's."""
    return isinstance(name, str) and Path(name).name == name and name.endswith(".tar") and split_name(name) == split


def _write_shard(plan: Plan, shard: Path, numbers: range, bar: tqdm[Any]) -> None:
    # with the time of writing in it every making would be another file
    with files.writing(shard, _hidden(shard)) as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for number in numbers:
            tar.write(plan.sample(number))
            bar.update()


def _record(
    place: Path, split: str, made: Mapping[str, Any], lengths: Sequence[int], stated: Mapping[str, Any]
) -> None:
    """Add the split to _info.json, and write the names of the classes."""
    info = {**_read(place / "_info.json"), **stated}
    entry = {"name": split, "num_samples": sum(lengths), "filenames": made["shards"], "shard_lengths": lengths}
    info["name"] = info.get("name", place.name)
    info["splits"] = {**info.get("splits", {}), split: {**entry, "made": made}}
    if made["classes"]:
        _write(place / "classes.txt", "\n".join(made["classes"]) + "\n")
    _write(place / "_info.json", json.dumps(info, indent=1))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, text: str) -> None:
    with files.writing(path, _hidden(path)) as file:
        file.write(text.encode())


def _hidden(path: Path) -> Path:
    """Where a file is written: no pattern of shards finds it there."""
    return path.with_name(f".{path.name}.tmp")
