"""The medium panoptic: an image, and the segments of its pixels as COCO's panoptic files have them. A sample is
(6, H, W): the image in [-1, 1], the class of each pixel (0 = void), its instance (0 = void), and 1 where its segment is
a crowd; whole numbers, as floats.

Classes are the things, then the stuff, as they are listed, so those of COCO's file are place + 1. Instances are
numbered anew in each sample, by what is left of them in it.

A sample may have the category of each pixel alone, seg.png. Nothing tells objects apart there, so the pixels of a class
are one segment, as those of stuff are, numbered with the others; a category of things has no more than one.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vqscale.data.config_dense import PanopticConfig
from vqscale.data.dense import Dense, Map

_PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins


class Segments(Dense):
    """Images with their segments. ValueError where nothing says the categories."""

    config: PanopticConfig

    def __init__(self, config: PanopticConfig) -> None:
        super().__init__(config)
        self.classes = {category.id: number for number, category in enumerate(config.classes(), 1)}

    def labels(self, members: Sequence[bytes]) -> Map:
        """(3, H, W): class, place in segments_info + 1, crowd; of a seg.png class, class, 0."""
        facts = told(members)
        if facts is None:
            return by_category(*category_numbers(members[0]), self.classes)
        return looked_up(segment_ids(members[0]), facts["segments_info"], self.classes)

    def settled(self, labels: Map) -> Map:
        return np.stack([labels[0], canonical(labels[1]), labels[2]]).astype(np.float32)


def told(members: Sequence[bytes]) -> dict[str, Any] | None:
    """What the panoptic.json among the labels of a sample says; None where they are seg.png, which then stands for both
    members. ValueError where they are both forms.
    """
    painted, listed = members
    if not listed.startswith(_PNG):
        return dict(json.loads(listed))
    if painted != listed:
        raise ValueError(
            "it has seg.png and panoptic.png, two labels of the same pixels: leave seg.png out where objects are told "
            "apart, and otherwise panoptic.png"
        )
    return None


def segment_ids(data: bytes) -> Map:
    """(H, W): R + 256 G + 65536 B of a PNG, 0 = void."""
    image = Image.open(io.BytesIO(data), formats=["PNG"])
    image.load()
    if image.mode != "RGB":
        raise ValueError(
            f"its panoptic.png has the mode {image.mode}, but ids of segments are in RGB, R + 256 G + 65536 B: write "
            "it as COCO's panoptic files are"
        )
    return rgb_to_id(np.asarray(image))


def id_to_rgb(ids_HW: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Ids of 0 .. 2^24 - 1 as the three bytes of a pixel: (H, W) -> (H, W, 3)."""
    return np.stack([ids_HW >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)


def rgb_to_id(pixels_HWC: NDArray[np.uint8]) -> NDArray[np.int32]:
    """The inverse: (H, W, 3) -> (H, W)."""
    return pixels_HWC[..., 0] + (pixels_HWC[..., 1].astype(np.int32) << 8) + (pixels_HWC[..., 2].astype(np.int32) << 16)


def category_numbers(data: bytes) -> tuple[Map, int]:
    """(H, W): the numbers of a PNG, gray of 8 or 16 bits or by a palette; and the largest that it can hold."""
    image = Image.open(io.BytesIO(data), formats=["PNG"])
    image.load()
    bits = data[24]  # of its header; Pillow stretches fewer bits of gray to 8
    if not (image.mode == "P" or image.mode.startswith("I") or (image.mode == "L" and bits == 8)):
        raise ValueError(
            f"its seg.png has the mode {image.mode}, of {bits} bits and {len(image.getbands())} channels, but numbers "
            "of categories are gray of 8 or 16 bits, or places of a palette: write the number of each pixel, not its "
            "colour"
        )
    return np.asarray(image).astype(np.int32), 65535 if image.mode.startswith("I") else 255


def by_category(numbers: Map, largest: int, classes: dict[int, int]) -> Map:
    """(H, W) ids of categories -> (3, H, W): class, class, 0; all 0 where the id is the largest, or is 0 and no
    category's. ValueError where a number is none of this.
    """
    table = np.full(largest + 1, -1, dtype=np.int32)
    table[0] = 0
    for number, found in classes.items():
        if 0 <= number < largest:
            table[number] = found
    table[largest] = 0
    classes_HW = table[numbers]
    if (unknown := np.unique(numbers[classes_HW < 0])).size:
        raise ValueError(
            f"its seg.png has the numbers {unknown[:5].tolist()}, which are none of the {len(classes)} of "
            f"data.train.categories (val.), nor {largest}, which is void: give the list that the labels were made with"
        )
    return np.stack([classes_HW, classes_HW, np.zeros_like(classes_HW)])


def looked_up(ids: Map, segments: Sequence[dict[str, int]], classes: dict[int, int]) -> Map:
    """(H, W) ids of segments -> (3, H, W): class, place in `segments` + 1, crowd; all 0 where the id is 0. ValueError
    where ids and segments differ, an id comes twice, or a category has no class.
    """
    if unknown := sorted({int(segment["category_id"]) for segment in segments} - classes.keys()):
        raise ValueError(
            f"its panoptic.json names the categories {unknown[:5]}, which are none of the {len(classes)} of "
            "data.train.categories (val.): give the list that the labels were made with"
        )
    listed = [(0, 0, 0, 0)] + [
        (int(segment["id"]), classes[int(segment["category_id"])], place, int(segment.get("iscrowd", 0)))
        for place, segment in enumerate(segments, 1)
    ]
    table = np.array(sorted(listed), dtype=np.int32)
    rows = np.searchsorted(table[:, 0], ids)
    _check_ids(ids, table[:, 0], rows.clip(max=len(table) - 1))
    return table.T[1:].take(rows, axis=1)


def _check_ids(painted: Map, listed: Map, rows: Map) -> None:
    """`rows` are the places of the painted ids among the listed, which are in order, and have the 0 of void."""
    lacking = painted[listed[rows] != painted]
    differing = {
        "its panoptic.json lists segments twice": listed[1:][listed[1:] == listed[:-1]],
        "its panoptic.png has segments that its panoptic.json lacks": np.unique(lacking),
        "its panoptic.json has segments that its panoptic.png lacks": _unseen(listed, rows),
    }
    for what, numbers in differing.items():
        if len(numbers):
            few = sorted({int(number) for number in numbers})[:5]
            raise ValueError(f"{what}: {few} of {len(listed) - 1} listed; make the two from one labelling")


def _unseen(listed: Map, rows: Map) -> Map:
    """The ids, but void, that no pixel has."""
    return listed[(np.bincount(rows.ravel(), minlength=len(listed)) == 0) & (listed != 0)]


def canonical(instances: Map) -> Map:
    """Instance numbers (H, W) to 1..n of those that are there, in the order of column + H row of their mean pixel: top
    to bottom, and left to right where rows differ by less than columns / H. 0 stays 0.
    """
    height, width = instances.shape
    counts = np.bincount(instances.ravel())
    of_pixel = np.add.outer(height * np.arange(height), np.arange(width))
    places = np.bincount(instances.ravel(), of_pixel.ravel()) / counts.clip(min=1)
    seen = np.flatnonzero(counts[1:]) + 1
    numbers = np.zeros(len(counts), dtype=np.int32)
    numbers[seen[np.argsort(places[seen], kind="stable")]] = np.arange(1, len(seen) + 1)
    return numbers[instances]
