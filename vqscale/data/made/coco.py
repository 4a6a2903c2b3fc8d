"""COCO's panoptic segmentation to a plan of shards: a folder of images, PNGs of segments in a folder or in the zip that
is passed on, and the JSON that says what they are. Images and PNGs go into the shards as they are.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vqscale.data.config_dense import as_stated, categories_of
from vqscale.data.made import packed
from vqscale.data.made.make import Plan, Sample
from vqscale.data.made.pairs import Coverage, checked
from vqscale.data.order import permutation
from vqscale.seed import derive

MOST_BYTES = 64 * 2**20  # of one PNG, whatever the zip says
GIVE = "give panoptic_train2017.json, the images of train2017, and panoptic_train2017.zip or its folder"


def panoptic(
    images: Path,
    maps: Path,
    listed: Path,
    categories: Sequence[Mapping[str, Any]] | None = None,
    seed: int = 0,
    coverage: Coverage | None = None,
) -> Plan:
    """Every annotation of the JSON `listed`, mixed by the seed: the image of its image_id, and its PNG out of `maps`.
    The categories are those of the JSON where none are given. ValueError for files that are none of this.
    """
    told = _told(listed)
    names = {image["id"]: _plain(image["file_name"], listed) for image in told["images"]}
    rows = sorted(told["annotations"], key=lambda row: _plain(row["file_name"], listed))
    known = [dict(category) for category in categories or told.get("categories") or ()]
    _check(rows, names, known, images, listed)
    read, order = _reader(maps), permutation(len(rows), derive("make", seed))
    classes = {int(category["id"]): number for number, category in enumerate(known, 1)}

    def sample(number: int) -> Sample:
        row = rows[int(order[number])]
        image = images / names[row["image_id"]]
        try:
            data, painted = image.read_bytes(), read(row["file_name"])
            labels = {"panoptic.png": painted, "panoptic.json": _facts(row)}
            members = checked(data, labels, classes, coverage)
        except Exception as error:  # Pillow raises many kinds on bytes that are no image
            raise ValueError(f"{image} and {row['file_name']}: {error}; repair them or take them out") from error
        key = f"{row['image_id']:012d}" if isinstance(row["image_id"], int) else image.stem.replace(".", "_")
        return {"__key__": key, image.suffix.lower().lstrip("."): data, **members}

    facts = {"source": "coco_panoptic", "json": listed.name, "bytes": listed.stat().st_size, "seed": seed}
    stated = {"categories": [{key: x[key] for key in ("id", "name", "isthing")} for x in known]}
    return Plan(len(rows), {**facts, "classes": []}, sample, stated)


def read_categories(path: Path) -> list[dict[str, Any]]:
    """The categories of a JSON file: a list of id, name and isthing, or an object that has it under `categories`."""
    try:
        return as_stated(categories_of(json.loads(path.read_text())))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} has no categories ({type(error).__name__}: {error}): give a JSON file with a list of id, name and "
            "isthing, such as panoptic_coco_categories.json"
        ) from error


def _told(listed: Path) -> dict[str, Any]:
    try:
        told = json.loads(listed.read_text())
        if not isinstance(told, dict) or not {"images", "annotations"} <= told.keys():
            raise ValueError("it has no images and annotations")
    except (OSError, ValueError) as error:
        raise ValueError(f"{listed} is no JSON of panoptic annotations ({error}): {GIVE}") from error
    return told


def _check(
    rows: Sequence[Mapping[str, Any]],
    names: Mapping[Any, str],
    categories: Sequence[Mapping[str, Any]],
    images: Path,
    listed: Path,
) -> None:
    if not rows or not categories:
        raise ValueError(f"{listed} has {len(rows)} annotations and {len(categories)} categories: {GIVE}")
    if unnamed := [row["image_id"] for row in rows if row["image_id"] not in names]:
        raise ValueError(f"{listed} has {len(unnamed)} annotations of images that it lacks, as {unnamed[0]}: {GIVE}")
    if lacking := [name for row in rows if not (images / (name := names[row["image_id"]])).is_file()]:
        raise ValueError(f"{len(lacking)} of {len(rows)} images are not in {images}, as {lacking[0]}: {GIVE}")


def _reader(maps: Path) -> Callable[[str], bytes]:
    """name of a PNG -> its bytes, out of a folder or a zip."""
    if maps.is_dir():
        return lambda name: (maps / name).read_bytes()
    try:
        opened = zipfile.ZipFile(maps)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{maps} is neither a folder nor a zip of PNGs ({error}): {GIVE}") from error
    entries = {PurePosixPath(entry.filename).name: entry for entry in opened.infolist() if not entry.is_dir()}

    def read(name: str) -> bytes:
        if name not in entries:
            raise ValueError(f"{maps} has no such file")
        return packed.of_zip(opened, entries[name], MOST_BYTES)

    return read


def _plain(name: str, listed: Path) -> str:
    """A file's name, which may lead nowhere else."""
    if not isinstance(name, str) or Path(name).name != name:
        raise ValueError(f"{listed} names the file {name!r}: names of files are without a folder; {GIVE}")
    return name


def _facts(row: Mapping[str, Any]) -> bytes:
    return json.dumps({"image_id": row["image_id"], "segments_info": row["segments_info"]}).encode()
