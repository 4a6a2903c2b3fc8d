"""Images with labels of their pixels, as the files in a shard, for the tests of dense prediction."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from shard_files import write_tar

CATEGORIES = (
    {"id": 7, "name": "grass", "isthing": 0},
    {"id": 3, "name": "dog", "isthing": 1},
    {"id": 90, "name": "sky", "isthing": 0},
    {"id": 40, "name": "cup", "isthing": 1},
)
CLASSES = {3: 1, 40: 2, 7: 3, 90: 4}  # things, then stuff, both as listed


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def image(height: int = 8, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def painted(ids: np.ndarray) -> np.ndarray:
    """Ids of segments as COCO writes them."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)


def depth_sample(key: str, pixels: np.ndarray, steps: np.ndarray) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png(pixels)), (f"{key}.depth.png", png(steps))]


def panoptic_sample(
    key: str, pixels: np.ndarray, ids: np.ndarray, segments: Sequence[Mapping[str, Any]], image_id: str = ""
) -> list[tuple[str, bytes]]:
    """`segments` of id, category_id and iscrowd."""
    facts = {
        "image_id": image_id or key,
        "height": ids.shape[0],
        "width": ids.shape[1],
        "segments_info": list(segments),
    }
    members = [(f"{key}.png", png(pixels)), (f"{key}.panoptic.png", png(painted(ids)))]
    return [*members, (f"{key}.panoptic.json", json.dumps(facts).encode())]


def segment(id: int, category_id: int, iscrowd: int = 0) -> dict[str, int]:
    return {"id": id, "category_id": category_id, "iscrowd": iscrowd}


def depth_shard(path: Any, count: int, side: int = 8) -> str:
    """So many samples whose depth is 1 m + 1 cm for each pixel, and missing at the first."""
    steps = np.arange(1000, 1000 + 10 * side**2, 10, dtype=np.uint16).reshape(side, side)
    steps[0, 0] = 0
    members = [m for n in range(count) for m in depth_sample(f"{n:03d}", image(side, side, n), steps)]
    return str(write_tar(path, members))


def panoptic_shard(path: Any, count: int, side: int = 8) -> str:
    """So many samples with a dog in the middle of grass, sky above, and void in a corner."""
    ids = np.full((side, side), 70_000)
    ids[: side // 2], ids[side // 4 : side // 2, 2:-2], ids[-1, 0] = 300, 5, 0
    segments = [segment(300, 90), segment(5, 3), segment(70_000, 7)]
    members = [m for n in range(count) for m in panoptic_sample(f"{n:03d}", image(side, side, n), ids, segments)]
    return str(write_tar(path, members))
