"""The medium panoptic: an image, and the segments of its pixels as COCO's panoptic files have them. A sample is
(6, H, W): the image in [-1, 1], the class of each pixel (0 = void), its instance (0 = void), and 1 where its segment is
a crowd; whole numbers, as floats.

Classes are the things, then the stuff, as they are listed, so those of COCO's file are place + 1. Instances are
numbered anew in each sample, by what is left of them in it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vqscale.data.config_dense import PanopticConfig
from vqscale.data.dense import Dense, Map


class Segments(Dense):
    """Images with their segments. ValueError where nothing says the categories."""

    config: PanopticConfig

    def __init__(self, config: PanopticConfig) -> None:
        super().__init__(config)
        self.classes = {category.id: number for number, category in enumerate(config.classes(), 1)}

    def labels(self, members: Sequence[bytes]) -> Map:
        """(3, H, W): class, place in segments_info + 1, crowd."""
        painted, listed = members
        return looked_up(segment_ids(painted), json.loads(listed)["segments_info"], self.classes)

    def settled(self, labels: Map) -> Map:
        return np.stack([labels[0], canonical(labels[1]), labels[2]]).astype(np.float32)


def segment_ids(data: bytes) -> Map:
    """(H, W): R + 256 G + 65536 B of a PNG, 0 = void."""
    image = Image.open(io.BytesIO(data), formats=["PNG"])
    image.load()
    if image.mode != "RGB":
        raise ValueError(
            f"its panoptic.png has the mode {image.mode}, but ids of segments are in RGB, R + 256 G + 65536 B: write "
            "it as COCO's panoptic files are"
        )
    red, green, blue = np.asarray(image).astype(np.int64).transpose(2, 0, 1)
    return red + 256 * green + 65536 * blue


def looked_up(ids: Map, segments: Sequence[dict[str, int]], classes: dict[int, int]) -> Map:
    """(H, W) ids of segments -> (3, H, W): class, place in `segments` + 1, crowd; all 0 where the id is 0. ValueError
    where ids and segments differ, an id comes twice, or a category has no class.
    """
    listed = [int(segment["id"]) for segment in segments]
    painted, places = np.unique(ids, return_inverse=True)
    _check_ids(set(painted.tolist()) - {0}, listed)
    if unknown := sorted({int(segment["category_id"]) for segment in segments} - classes.keys()):
        raise ValueError(
            f"its panoptic.json names the categories {unknown[:5]}, which are none of the {len(classes)} of "
            "data.train.categories (val.): give the list that the labels were made with"
        )
    facts = {
        number: (classes[int(segment["category_id"])], place, int(segment.get("iscrowd", 0)))
        for place, (number, segment) in enumerate(zip(listed, segments, strict=True), 1)
    }
    table = np.array([facts.get(number, (0, 0, 0)) for number in painted.tolist()])
    return table.T[:, places.reshape(ids.shape)]


def _check_ids(painted: set[int], listed: Sequence[int]) -> None:
    differing = {
        "its panoptic.png has segments that its panoptic.json lacks": painted - set(listed),
        "its panoptic.json has segments that its panoptic.png lacks": set(listed) - painted,
        "its panoptic.json lists segments twice": {number for number in listed if listed.count(number) > 1},
    }
    for what, numbers in differing.items():
        if numbers:
            raise ValueError(f"{what}: {sorted(numbers)[:5]} of {len(listed)} listed; make the two from one labelling")


def canonical(instances: Map) -> Map:
    """Instance numbers (H, W) to 1..n of those that are there, in the order of column + H row of their mean pixel: top
    to bottom, and left to right where rows differ by less than columns / H. 0 stays 0.
    """
    found, places, counts = np.unique(instances, return_inverse=True, return_counts=True)
    places = places.reshape(instances.shape)
    height, width = instances.shape
    rows = np.bincount(places.ravel(), np.repeat(np.arange(height), width)) / counts
    columns = np.bincount(places.ravel(), np.tile(np.arange(width), height)) / counts
    order = np.argsort(np.where(found == 0, -1.0, columns + height * rows), kind="stable")
    numbers = np.empty(len(found), dtype=np.int64)
    numbers[order] = np.arange(len(found)) + (0 if (found == 0).any() else 1)
    return numbers[places]
