"""Drawn scenes of which everything is known: an image, the depth of every pixel, and its segment. A labelled source for
dense prediction that needs no download.

Each scene is a pure function of (index, size, seed, far). A pinhole camera of focal length FOCAL, in picture sides,
looks over a floor from a height that nobody tells; the horizon lies at a random row. A floor point at height c below
the camera and row y below the horizon h is FOCAL c / (y - h) metres away, so a thing's row, its size, the texture of
the floor and the fog all say the same depth. Things stand on the floor; of each pixel the nearest surface is seen, also
where a ball bulges past a flat thing before its middle. Some labels are not whole, as in data that was measured: depth
is missing in the sky and beside jumps, a blob that nobody labelled stands in half of the scenes, a crowd in a tenth.

The two hues of a class of things have the same luminance, so that gray tells a class and not the hue.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqscale.data.config_dense import ScenesConfig, as_stated
from vqscale.data.made.make import Plan, Sample
from vqscale.data.made.things import FOCAL, Field, Object, View, objects, segment_id
from vqscale.data.panoptic import id_to_rgb
from vqscale.disk import png
from vqscale.seed import derive

UNIT_M = 0.001  # of the depth that is written
JUMP_M = 0.5  # beside a larger one depth is missing
LEAST_PIXELS = 9  # of a thing that is labelled
STUFF_COLOURS = {
    "tiles": (0.62, 0.56, 0.50),
    "grass": (0.36, 0.55, 0.26),
    "wall": (0.80, 0.76, 0.66),
    "bricks": (0.62, 0.36, 0.28),
    "sky": (0.55, 0.72, 0.92),
}


@dataclass(frozen=True)
class Scene:
    """A scene, and the truth of its pixels."""

    picture: NDArray[np.uint8]  # (size, size, 3)
    metres: Field  # 0 = missing
    ids: NDArray[np.int64]  # of segments; 0 = void
    segments: list[dict[str, int]]  # id, category_id, iscrowd, area, of each that is seen


@dataclass
class _Painting:
    """What is painted so far, from far to near."""

    x: Field
    y: Field
    colour: Field
    metres: Field
    ids: NDArray[np.int64]
    fog: float  # metres in which a colour fades to a third
    crowds: set[int] = field(default_factory=set)

    def fogged(self, colour: Field, metres: Field | float) -> Field:
        clear = np.exp(-np.asarray(metres) / self.fog)[..., None]
        return colour * clear + 0.75 * (1 - clear)


def draw(index: int, size: int, seed: int = 0, far: float = 3.8) -> Scene:
    """The scene of this number; its things stand between 1.5 and `far` metres away."""
    rng = np.random.default_rng(derive("scenes", seed, index))
    x, y = _centres(size)
    view = View(rng.uniform(0.3, 0.5), rng.uniform(1.1, 1.6), far)
    painting = _ground(rng, x, y, view)
    for one in sorted(objects(rng, view), key=lambda one: -one.metres):
        _paint(painting, one)
    light = rng.uniform(0.85, 1.05)
    picture = (painting.colour * light).clip(0, 1) * 255
    return Scene(np.rint(picture).astype(np.uint8), _measured(painting.metres), painting.ids, _segments(painting))


@lru_cache(maxsize=8)
def _centres(size: int) -> tuple[Field, Field]:
    line = (np.arange(size) + 0.5) / size
    y, x = np.meshgrid(line, line, indexing="ij")
    return x, y


def _ground(rng: np.random.Generator, x: Field, y: Field, view: View) -> _Painting:
    """The floor, and what is behind it."""
    behind, fog = rng.uniform(6, 9.5), rng.uniform(7, 12)
    floor, back = str(rng.choice(["tiles", "grass"])), str(rng.choice(["wall", "bricks", "sky"]))
    on_floor = y > view.row(behind)
    metres = np.where(
        on_floor, FOCAL * view.height / np.maximum(y - view.horizon, 1e-3), np.inf if back == "sky" else behind
    )
    ids = np.where(on_floor, segment_id(floor), segment_id(back))
    painting = _Painting(x, y, np.empty((*x.shape, 3)), metres, ids, fog)
    depth = np.where(on_floor, metres, behind)
    across, along = (x - 0.5) * depth / FOCAL, np.where(on_floor, depth, (y - view.horizon) * depth / FOCAL)
    noise = rng.random(x.shape)
    floor_colour, back_colour = (
        np.array(STUFF_COLOURS[kind]) * _texture(kind, across, along, depth, noise)[..., None] for kind in (floor, back)
    )
    shown = back_colour if back == "sky" else painting.fogged(back_colour, depth)
    painting.colour[:] = np.where(on_floor[..., None], painting.fogged(floor_colour, depth), shown)
    return painting


def _texture(kind: str, across: Field, along: Field, depth: Field, noise: Field) -> Field:
    """Brightness of stuff at places in metres; what is finer than a pixel fades with the distance."""
    if kind == "grass":
        return 0.75 + 0.5 * noise / (1 + depth / 4)
    if kind == "tiles":
        even = (np.floor(across / 0.5) + np.floor(along / 0.5)) % 2
        return 1 + 0.45 * (even - 0.5) / (1 + (depth / 5) ** 2)
    if kind == "bricks":
        row = np.floor(along / 0.5)
        joint = ((along / 0.5) % 1 < 0.18) | (((across + 0.5 * (row % 2)) / 1.0) % 1 < 0.09)
        return np.where(joint, 1.35, 0.9 + 0.2 * noise)
    if kind == "sky":
        return 1 + 0.03 * along
    return 0.95 + 0.06 * np.sin(across * 3)


def _paint(painting: _Painting, one: Object) -> None:
    size = len(painting.x)
    rows, columns = (
        slice(max(0, int((at - one.radius) * size) - 1), max(0, int((at + one.radius) * size) + 2))
        for at in (one.centre[1], one.centre[0])
    )
    part = rows, columns
    u, v = (painting.x[part] - one.centre[0]) / one.radius, (painting.y[part] - one.centre[1]) / one.radius
    bulge = np.sqrt((1 - u * u - v * v).clip(0)) if one.kind == "ball" else np.zeros_like(u)
    metres = one.metres - one.radius_m * bulge
    distance, nearer = one.distance(u, v), metres < painting.metres[part]
    inside = (distance < 0) & nearer
    shade = 0.7 + 0.3 * bulge if one.kind == "ball" else 0.95 - 0.15 * v
    covered = ((0.5 - distance * one.radius * size).clip(0, 1) * nearer)[..., None]
    colour = painting.fogged(one.colour * shade[..., None], metres)
    painting.colour[part] += covered * (colour - painting.colour[part])
    painting.metres[part] = np.where(inside, metres, painting.metres[part])
    painting.ids[part] = np.where(inside, one.id, painting.ids[part])
    if one.crowd:
        painting.crowds.add(one.id)


def _measured(metres: Field) -> Field:
    """Depth with 0 where it is missing: without end, and the farther pixel of two neighbours with a jump."""
    missing = np.isinf(metres)
    near = np.where(missing, 1e9, metres)
    for axis in (0, 1):
        jump = np.diff(near, axis=axis)
        after, before = (jump > JUMP_M), (jump < -JUMP_M)
        tail, head = [slice(None)] * 2, [slice(None)] * 2
        tail[axis], head[axis] = slice(1, None), slice(None, -1)
        missing[tuple(tail)] |= after
        missing[tuple(head)] |= before
    return np.where(missing, 0, metres)


def _segments(painting: _Painting) -> list[dict[str, int]]:
    """The segments that are seen. Things of too few pixels become void."""
    found = []
    for number, area in zip(*(part.tolist() for part in np.unique(painting.ids, return_counts=True)), strict=True):
        if number and area < LEAST_PIXELS:
            painting.ids[painting.ids == number] = 0
        elif number:
            crowd = int(number in painting.crowds)
            found.append({"id": number, "category_id": number // 1000, "iscrowd": crowd, "area": area})
    return found


def scenes(config: ScenesConfig) -> Plan:
    """Drawn scenes as PNG, with their depth in millimetres and their segments as COCO has them."""

    def sample(number: int) -> Sample:
        index = config.first_index + number
        scene = draw(index, config.size, config.seed, config.far)
        key = f"{index:08d}"
        about = {"image_id": key, "height": config.size, "width": config.size, "segments_info": scene.segments}
        made = {
            "png": png.encoded(scene.picture),
            "depth.png": png.encoded(np.rint(scene.metres / UNIT_M).astype(np.uint16)),
            "panoptic.png": png.encoded(id_to_rgb(scene.ids)),
            "panoptic.json": json.dumps(about).encode(),
        }
        return {"__key__": key, **made}

    stated: dict[str, Any] = {"depth": {"unit_m": UNIT_M}, "categories": as_stated(config.categories)}
    return Plan(config.num_images, {**asdict(config), "classes": []}, sample, stated)
