"""Panoptic maps as COCO has them, PNG and JSON: what its own evaluator (panopticapi) and every other reads.

A PNG holds the id of each pixel's segment as R + 256 G + 65536 B, 0 for void; the JSON says of which category the
segments are. A map here is as in panoptic.py: classes 1 .. n, the places of categories in their list, and instances.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from vqscale.data.panoptic import id_to_rgb
from vqscale.disk import files, png
from vqscale.metrics.panoptic import merge_stuff, segments


def described(
    classes_HW: NDArray[np.integer], instances_HW: NDArray[np.integer], categories: Sequence[Mapping[str, Any]]
) -> tuple[NDArray[np.int64], list[dict[str, Any]]]:
    """(ids (H, W), segments_info) of a prediction. `categories` have id and isthing, as in COCO's list; class c is the
    one at place c - 1. The segments of one stuff class become one."""
    things = [place for place, category in enumerate(categories, 1) if category["isthing"]]
    found = segments(classes_HW, merge_stuff(classes_HW, instances_HW, things))
    is_segment = found.classes > 0
    ids = np.where(is_segment, np.cumsum(is_segment), 0)[found.of_pixel].reshape(classes_HW.shape)
    pixels = np.bincount(found.of_pixel, minlength=len(found.classes))
    real = np.flatnonzero(is_segment)
    info = [
        {
            "id": number,
            "category_id": categories[found.classes[place] - 1]["id"],
            "iscrowd": 0,
            "area": int(pixels[place]),
            "bbox": _box(ids == number),
        }
        for number, place in enumerate(real, 1)
    ]
    return ids, info


def write_map(
    folder: Path, image_id: int | str, ids_HW: NDArray[np.int64], info: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Write folder/IMAGE_ID.png, whatever an id that is text has in it; the map's entry among the annotations of the
    JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{image_id:012d}.png" if isinstance(image_id, int) else f"{quote(image_id, safe='')}.png"
    files.write(folder / name, png.encoded(id_to_rgb(ids_HW)))
    return {"image_id": image_id, "file_name": name, "segments_info": list(info)}


def write_json(path: Path, annotations: Iterable[Mapping[str, Any]], categories: Sequence[Mapping[str, Any]]) -> None:
    """Write the JSON of a folder of maps. An image is in it once, in the order of ids, whoever wrote it."""
    rows = sorted({str(row["image_id"]): row for row in annotations}.items())
    images = [{"id": row["image_id"], "file_name": row["file_name"]} for _, row in rows]
    files.write_json(path, {"images": images, "annotations": [row for _, row in rows], "categories": list(categories)})


def _box(inside_HW: NDArray[np.bool_]) -> list[int]:
    """x, y, width and height."""
    rows, columns = np.flatnonzero(inside_HW.any(1)), np.flatnonzero(inside_HW.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]
