"""Pictures made by arithmetic: a labelled image source that needs no download, for tests and first runs.

Every picture is a pure function of (index, seed) rendered at a size: a background, perhaps some clutter, one main motif
that gives the label, and light. There is enough texture, gradient and edge in it for many codes to pay.
It is not a benchmark, and it reads and writes no file.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vqscale.seed import derive

CLASS_NAMES = ("stripes", "checker", "clouds", "dots", "ball", "box", "triangle", "star", "ring", "letter")
NUM_CLASSES = len(CLASS_NAMES)

Field = NDArray[np.float32]  # (size, size), or (size, size, 3) for colours in [0, 1]

# Strokes on a grid of 4 x 6 cells, (x0, y0, x1, y1), y downwards.
_LETTERS: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "A": ((0, 6, 2, 0), (2, 0, 4, 6), (1, 4, 3, 4)),
    "E": ((0, 0, 0, 6), (0, 0, 4, 0), (0, 3, 3, 3), (0, 6, 4, 6)),
    "F": ((0, 0, 0, 6), (0, 0, 4, 0), (0, 3, 3, 3)),
    "H": ((0, 0, 0, 6), (4, 0, 4, 6), (0, 3, 4, 3)),
    "K": ((0, 0, 0, 6), (4, 0, 0, 3), (1, 2, 4, 6)),
    "M": ((0, 6, 0, 0), (0, 0, 2, 3), (2, 3, 4, 0), (4, 0, 4, 6)),
    "N": ((0, 6, 0, 0), (0, 0, 4, 6), (4, 6, 4, 0)),
    "R": ((0, 6, 0, 0), (0, 0, 4, 1), (4, 1, 0, 3), (1, 3, 4, 6)),
    "S": ((4, 0, 0, 1), (0, 1, 4, 4), (4, 4, 0, 6)),
    "T": ((0, 0, 4, 0), (2, 0, 2, 6)),
    "X": ((0, 0, 4, 6), (4, 0, 0, 6)),
    "Z": ((0, 0, 4, 0), (4, 0, 0, 6), (0, 6, 4, 6)),
}


@dataclass(frozen=True)
class _Canvas:
    """The pixel centres of a square picture in the unit square, and the random numbers of this picture."""

    size: int
    x: Field
    y: Field
    rng: np.random.Generator

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.rng.random())

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def turned(self, angle: float, centre: tuple[float, float] = (0.5, 0.5)) -> tuple[Field, Field]:
        """Coordinates relative to `centre`, rotated by `angle`."""
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        x, y = self.x - np.float32(centre[0]), self.y - np.float32(centre[1])
        return x * cos + y * sin, y * cos - x * sin

    def coverage(self, distance: Field, softness: float = 0.0) -> Field:
        """Signed distance (negative inside) to coverage in [0, 1]; the edge is one pixel or `softness` wide."""
        width = np.float32(max(1.0 / self.size, softness))
        return np.clip(np.float32(0.5) - distance / width, 0, 1)


@lru_cache(maxsize=8)
def _centres(size: int) -> tuple[Field, Field]:
    line = ((np.arange(size) + 0.5) / size).astype(np.float32)
    y, x = np.meshgrid(line, line, indexing="ij")
    return np.ascontiguousarray(x), np.ascontiguousarray(y)


def _noise(c: _Canvas, cells: int) -> Field:
    """Smooth noise in about [-1, 1]: a random grid of cells x cells, interpolated bicubically."""
    grid = (c.rng.random((cells + 2, cells + 2), dtype=np.float32) * 2 - 1).astype(np.float32)
    box = (0.5, 0.5, cells + 1.5, cells + 1.5)
    return np.asarray(
        Image.fromarray(grid).resize((c.size, c.size), Image.Resampling.BICUBIC, box=box), dtype=np.float32
    )


def _fractal(c: _Canvas, cells: int, roughness: float) -> Field:
    """Noise summed over four octaves, scaled to [0, 1]."""
    total = _noise(c, cells)
    for octave in range(1, 4):
        total = total + np.float32(roughness**octave) * _noise(c, min(cells * 2**octave, 32))
    low, high = float(total.min()), float(total.max())
    return (total - np.float32(low)) / np.float32(max(high - low, 1e-6))


def _blend(a: Field, b: Field, weight: Field) -> Field:
    return a + (b - a) * weight[..., None]


def _colour(c: _Canvas) -> Field:
    return np.array(
        colorsys.hsv_to_rgb(c.between(0, 1), c.between(0, 1) ** 0.7, 0.15 + 0.85 * c.between(0, 1)), dtype=np.float32
    )


def _contrast(c: _Canvas, against: Field) -> Field:
    """The colour among four random ones that is farthest from the mean of `against`, so that the motif can be seen."""
    mean = against.reshape(-1, 3).mean(axis=0)
    return max((_colour(c) for _ in range(4)), key=lambda colour: float(np.abs(colour - mean).sum()))


def _gradient(c: _Canvas) -> Field:
    """A ramp in [0, 1]: straight at a random angle, or round."""
    if c.chance(0.6):
        u, _ = c.turned(c.between(0, 2 * np.pi))
        return np.clip(u / np.float32(1.2) + np.float32(0.5), 0, 1)
    u, v = c.turned(0.0, (c.between(0.2, 0.8), c.between(0.2, 0.8)))
    return np.clip(np.hypot(u, v) / np.float32(c.between(0.6, 1.0)), 0, 1)


def _bands(c: _Canvas, frequency: float, warp: float = 0.0) -> Field:
    """Straight or wavy bands, antialiased, 0 and 1."""
    u, _ = c.turned(c.between(0, np.pi))
    if warp > 0:
        u = u + np.float32(warp) * _noise(c, 3)
    wave = np.abs((u * np.float32(frequency)) % 1 - np.float32(0.5)) - np.float32(c.between(0.18, 0.32))
    return c.coverage(wave / np.float32(frequency))


def _squares(c: _Canvas, frequency: float) -> Field:
    """A checkerboard at a random angle, antialiased."""
    u, v = c.turned(c.between(-0.6, 0.6) if c.chance(0.7) else 0.0)
    along, across = (
        np.clip((np.abs((w * np.float32(frequency)) % 2 - 1) - 0.5) * np.float32(c.size / frequency), -0.5, 0.5)
        for w in (u, v)
    )
    return (np.float32(0.5) + 2 * along * across).astype(np.float32)


def _grid_of_dots(c: _Canvas, frequency: float) -> Field:
    """Round spots on a turned grid, each row shifted by half a cell or not."""
    u, v = (w * np.float32(frequency) for w in c.turned(c.between(0, np.pi / 2)))
    if c.chance(0.5):
        u = u + np.float32(0.5) * (np.floor(v) % 2)
    distance = np.hypot(u % 1 - np.float32(0.5), v % 1 - np.float32(0.5)) - np.float32(c.between(0.22, 0.38))
    return c.coverage(distance / np.float32(frequency))


def _background(c: _Canvas) -> Field:
    """Something quiet to put a motif on: a gradient, a horizon, clouds or a faint texture."""
    first, second = _colour(c), _colour(c)
    kind = int(c.rng.integers(5))
    ground = _blend(first, second, _gradient(c))
    if kind == 1:
        sky = c.coverage(c.y - np.float32(c.between(0.45, 0.75)) + np.float32(0.05) * _noise(c, 3))
        return _blend(_blend(second, _colour(c), c.y), ground, sky)
    if kind == 2:
        return _blend(first, second, _fractal(c, int(c.rng.integers(2, 6)), c.between(0.3, 0.7)))
    if kind == 3:
        texture = _bands(c, c.between(4, 12)) if c.chance(0.5) else _squares(c, c.between(4, 10))
        return _blend(ground, _colour(c), texture * np.float32(c.between(0.1, 0.3)))
    return ground


def _clutter(c: _Canvas, picture: Field) -> Field:
    """Up to three small, half transparent discs and bars behind the motif."""
    for _ in range(int(c.rng.integers(4))):
        u, v = c.turned(c.between(0, np.pi), (c.between(0, 1), c.between(0, 1)))
        if c.chance(0.5):
            distance = np.hypot(u, v) - np.float32(c.between(0.03, 0.1))
        else:
            distance = np.maximum(
                np.abs(u) - np.float32(c.between(0.1, 0.6)), np.abs(v) - np.float32(c.between(0.01, 0.03))
            )
        picture = _blend(picture, _colour(c), c.coverage(distance) * np.float32(c.between(0.3, 0.7)))
    return picture


def _box(c: _Canvas, u: Field, v: Field, r: float) -> Field:
    corner = np.float32(c.between(0, 0.08))
    a = np.abs(u) - np.float32(r * c.between(0.75, 1.0)) + corner
    b = np.abs(v) - np.float32(r * c.between(0.55, 1.0)) + corner
    return np.hypot(np.maximum(a, 0), np.maximum(b, 0)) + np.minimum(np.maximum(a, b), 0) - corner


def _points(u: Field, v: Field, r: float, points: int, sharpness: float) -> Field:
    """Signed distance to a star with tips at radius r; sharpness from 2 (regular polygon) to `points` (needles)."""
    half, edge = np.pi / points, np.pi / sharpness
    across, down = np.float32(np.cos(edge)), np.float32(np.sin(edge))
    angle = np.arctan2(u, v) % np.float32(2 * half) - np.float32(half)
    length = np.hypot(u, v)
    p = length * np.cos(angle) - np.float32(r * np.cos(half))
    q = length * np.abs(np.sin(angle)) - np.float32(r * np.sin(half))
    along = np.clip(-(p * across + q * down), 0, np.float32(r * np.sin(half) / np.sin(edge)))
    p, q = p + across * along, q + down * along
    return np.hypot(p, q) * np.sign(p)


def _ring(c: _Canvas, u: Field, v: Field, r: float) -> Field:
    thickness = c.between(0.12, 0.25) * r
    return np.abs(np.hypot(u, v * np.float32(c.between(1.0, 1.4))) - np.float32(r)) - np.float32(thickness)


def _letter(c: _Canvas, u: Field, v: Field, r: float) -> Field:
    strokes = _LETTERS[sorted(_LETTERS)[int(c.rng.integers(len(_LETTERS)))]]
    scale = r / 2.7
    best = np.full_like(u, np.float32(9))
    for x0, y0, x1, y1 in strokes:
        ax, ay, bx, by = (scale * k for k in (x0 - 2, y0 - 3, x1 - x0, y1 - y0))
        along = np.clip(((u - ax) * bx + (v - ay) * by) / (bx * bx + by * by), 0, 1)
        best = np.minimum(best, np.hypot(u - ax - along * bx, v - ay - along * by))
    return (best - r * c.between(0.09, 0.18)).astype(np.float32)


_SHAPES: dict[str, Callable[[_Canvas, Field, Field, float], Field]] = {
    "ball": lambda c, u, v, r: np.hypot(u, v) - np.float32(r),
    "box": _box,
    "triangle": lambda c, u, v, r: _points(u * np.float32(c.between(0.85, 1.15)), v, r * 1.25, 3, 2.0),
    "star": lambda c, u, v, r: _points(u, v, r * 1.2, int(c.rng.integers(5, 8)), c.between(2.6, 3.6)),
    "ring": _ring,
    "letter": _letter,
}


def _paint(c: _Canvas, picture: Field, name: str) -> Field:
    """One shape on the picture: shadow, then a fill (flat, ramp, bands, noise) or an outline; the ball is shaded."""
    centre, r = (c.between(0.38, 0.62), c.between(0.38, 0.62)), c.between(0.22, 0.34)
    upright = name == "letter"
    u, v = c.turned(c.between(-0.35, 0.35) if upright else c.between(0, 2 * np.pi), centre)
    distance = _SHAPES[name](c, u, v, r).astype(np.float32, copy=False)
    if c.chance(0.5):
        shift = max(1, c.size // 24)
        shadow = np.roll(c.coverage(distance, 0.08), (shift, shift), axis=(0, 1))
        picture = picture * (1 - np.float32(0.5) * shadow[..., None])
    first = _contrast(c, picture)
    paint = np.broadcast_to(first, picture.shape)
    kind = int(c.rng.integers(4))
    if kind == 1:
        paint = _blend(first, _contrast(c, picture), _gradient(c))
    elif kind == 2:
        paint = _blend(first, _contrast(c, picture), _bands(c, c.between(8, 16)))
    elif kind == 3:
        paint = _blend(first, first * np.float32(0.5), _fractal(c, 6, 0.6))
    if name == "ball":
        paint = _sphere(c, u / np.float32(r), v / np.float32(r), paint)
    elif name not in ("ring", "letter") and c.chance(0.25):
        distance = np.abs(distance) - np.float32(c.between(0.02, 0.045))
    elif c.chance(0.3):
        rim = c.coverage(np.abs(distance) - np.float32(0.012))
        paint = _blend(paint, _contrast(c, paint), rim)
    return _blend(picture, paint, c.coverage(distance))


def _sphere(c: _Canvas, u: Field, v: Field, paint: Field) -> Field:
    """Diffuse light and a highlight on the unit sphere."""
    height = np.sqrt(np.clip(1 - u * u - v * v, 0, 1))
    angle, lift = c.between(0, 2 * np.pi), c.between(0.4, 0.8)
    flat = np.sqrt(1 - lift * lift)
    facing = np.clip(u * np.float32(flat * np.cos(angle)) + v * np.float32(flat * np.sin(angle)) + height * lift, 0, 1)
    lit = paint * (np.float32(0.2) + np.float32(0.9) * facing[..., None].astype(np.float32))
    return lit + np.float32(c.between(0.0, 0.8)) * (facing**24)[..., None].astype(np.float32)


def _texture(c: _Canvas, name: str) -> Field:
    """A picture that is one texture from edge to edge, in two or three colours."""
    ground = _blend(_colour(c), _colour(c), _gradient(c))
    mark = _blend(_contrast(c, ground), _contrast(c, ground), _gradient(c))
    if name == "stripes":
        weight = _bands(c, c.between(2.5, 10), c.between(0.0, 0.12) if c.chance(0.5) else 0.0)
    elif name == "checker":
        weight = _squares(c, c.between(3, 9))
    elif name == "dots":
        weight = _grid_of_dots(c, c.between(3, 8))
    else:
        weight = _fractal(c, int(c.rng.integers(2, 7)), c.between(0.35, 0.8))
    return _blend(ground, mark, weight)


def draw(index: int, size: int, seed: int) -> tuple[NDArray[np.uint8], int]:
    """Picture `index` of the endless set `seed`: uint8 (size, size, 3) and its label, index mod NUM_CLASSES.

    Depends on the arguments alone. Another size shows the same scene at another resolution, but for the grain.
    """
    if size < 8:
        raise ValueError(f"shapes are drawn at 8 pixels or more, but size is {size}: ask for a larger picture")
    label = index % NUM_CLASSES
    c = _Canvas(size, *_centres(size), np.random.default_rng(derive("shapes", seed, index)))
    name = CLASS_NAMES[label]
    if name in _SHAPES:
        picture = _paint(c, _clutter(c, _background(c)), name)
    else:
        picture = _texture(c, name)
    light = np.float32(1) + np.float32(c.between(0, 0.35)) * (_gradient(c) * 2 - 1)
    picture = picture * light[..., None]
    if c.chance(0.25):
        picture = picture + np.float32(c.between(0.0, 0.03)) * c.rng.standard_normal((size, size, 1), dtype=np.float32)
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8), label
