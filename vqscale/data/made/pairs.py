"""Images with labels of their pixels that lie beside them, to a plan of shards: NAME.jpg, NAME.depth.png,
NAME.panoptic.png with NAME.panoptic.json, NAME.seg.png, in one folder or in folders below. Files go into the shards as
they are, once they are known to be what the media read (data/depth.py, data/panoptic.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqscale.data.config import ImagesConfig
from vqscale.data.depth import steps
from vqscale.data.made.make import Plan, Sample, listing
from vqscale.data.order import permutation
from vqscale.data.panoptic import by_category, category_numbers, looked_up, segment_ids
from vqscale.data.pixels import opened
from vqscale.seed import derive

TOGETHER = (("depth.png",), ("panoptic.png", "panoptic.json"), ("seg.png",))
LABELS = tuple(suffix for group in TOGETHER for suffix in group)
_SEGMENTS = {"panoptic.png", "seg.png"}  # of which a sample has one


@dataclass
class Coverage:
    """How much of the labels that were written is there."""

    pixels: int = 0
    missing: int = 0

    def add(self, values: NDArray[Any]) -> None:
        """Count the pixels of a map; 0 is missing."""
        self.pixels += values.size
        self.missing += int((values == 0).sum())

    def told(self) -> str:
        return f"{self.missing / max(self.pixels, 1):.1%} of the pixels have no label" if self.pixels else ""


def folder(
    root: Path,
    unit_m: float | None = None,
    categories: Sequence[Mapping[str, Any]] | None = None,
    seed: int = 0,
    coverage: Coverage | None = None,
) -> Plan:
    """Every image below `root` that has the labels which the first has, mixed by the seed. `unit_m` is what a step of
    depth is in metres; `categories` are of the segments. ValueError where labels, unit or categories are missing.
    """
    images = sorted(path for path in root.rglob("*") if _is_image(path))
    there = {suffix for image in images for suffix in LABELS if _beside(image, suffix).is_file()}
    wanted = sorted({suffix for group in TOGETHER if there & set(group) for suffix in group})
    _check(root, images, wanted, unit_m, categories)
    order = permutation(len(images), derive("make", seed))
    classes = {int(category["id"]): number for number, category in enumerate(categories or (), 1)}

    def sample(number: int) -> Sample:
        chosen = int(order[number])
        image = images[chosen]
        made = _checked(image, {suffix: _beside(image, suffix).read_bytes() for suffix in wanted}, classes, coverage)
        return {"__key__": f"{chosen:08d}", **made, "json": _about(image, root)}

    stated = ({"depth": {"unit_m": unit_m}} if "depth.png" in wanted else {}) | (
        {"categories": [dict(category) for category in categories or ()]} if _SEGMENTS.intersection(wanted) else {}
    )
    every = [path for image in images for path in (image, *(_beside(image, suffix) for suffix in wanted))]
    facts = {"source": "pairs", "listing": listing(root, every), "labels": wanted, "seed": seed, **stated}
    return Plan(len(images), {**facts, "classes": []}, sample, stated)


def depth_pair(image: Path, depth: Path, root: Path, coverage: Coverage | None = None) -> Sample:
    """The members of an image and its depth, two files."""
    return {**_checked(image, {"depth.png": depth.read_bytes()}, {}, coverage), "json": _about(image, root)}


def _checked(
    image: Path, labels: Mapping[str, bytes], classes: dict[int, int], coverage: Coverage | None
) -> dict[str, bytes]:
    """An image and its labels as members, after a look at all. ValueError that names the file."""
    data = image.read_bytes()
    try:
        return {image.suffix.lower().lstrip("."): data, **checked(data, labels, classes, coverage)}
    except Exception as error:  # Pillow raises many kinds on bytes that are no image
        raise ValueError(f"{image} and its labels: {error}; repair them or take them out") from error


def checked(
    image: bytes, labels: Mapping[str, bytes], classes: dict[int, int], coverage: Coverage | None = None
) -> Mapping[str, bytes]:
    """These labels, when they are what the media read and as large as the image; ValueError otherwise."""
    picture = opened(image)
    picture.verify()
    maps = []
    if "depth.png" in labels:
        maps.append(steps(labels["depth.png"]))
    if "panoptic.png" in labels:
        ids = segment_ids(labels["panoptic.png"])
        maps.append(looked_up(ids, json.loads(labels["panoptic.json"])["segments_info"], classes)[0])
    if "seg.png" in labels:
        maps.append(by_category(*category_numbers(labels["seg.png"]), classes)[0])
    for found in maps:
        if found.shape != (picture.height, picture.width):
            raise ValueError(
                f"the image is {picture.width} x {picture.height} and its label {found.shape[1]} x {found.shape[0]}"
            )
        if coverage:
            coverage.add(np.asarray(found))
    return labels


def _check(
    root: Path,
    images: Sequence[Path],
    wanted: Sequence[str],
    unit_m: float | None,
    categories: Sequence[Mapping[str, Any]] | None,
) -> None:
    if not images or not wanted:
        raise ValueError(
            f"{root} has {len(images)} images ({', '.join(ImagesConfig.suffixes)}) and beside them none of NAME.depth"
            ".png, NAME.panoptic.png with NAME.panoptic.json, NAME.seg.png: give a folder with both"
        )
    if _SEGMENTS.issubset(wanted):
        raise ValueError(
            f"{root} has panoptic.png and seg.png, two labels of the same pixels: take those of one kind out"
        )
    lacking = [_beside(image, suffix) for image in images for suffix in wanted if not _beside(image, suffix).is_file()]
    if lacking:
        raise ValueError(
            f"{root}: {len(lacking)} labels of {len(images)} images are missing, the first {lacking[0]}: every image "
            "of a set has the same labels; bring them, or take its image out"
        )
    if "depth.png" in wanted and unit_m is None:
        raise ValueError(
            f"{root} has depth.png, and nothing says what a step is in metres: give --unit-m, 0.001 for millimetres"
        )
    if (segments := _SEGMENTS.intersection(wanted)) and not categories:
        raise ValueError(
            f"{root} has {', '.join(segments)}, and nothing says the categories: give --categories FILE.json"
        )


def _is_image(path: Path) -> bool:
    is_label = any(path.name.endswith(f".{suffix}") for suffix in LABELS)
    return path.suffix.lower().lstrip(".") in ImagesConfig.suffixes and not is_label and path.is_file()


def _beside(image: Path, suffix: str) -> Path:
    return image.with_name(f"{image.stem}.{suffix}")


def _about(image: Path, root: Path) -> bytes:
    return json.dumps({"file": str(image.relative_to(root))}).encode()
