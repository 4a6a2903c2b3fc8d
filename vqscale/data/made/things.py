"""What stands in drawn scenes: things of five classes and what nobody labelled, where they stand and how they look.

The two hues of a class have the same luminance, so that gray tells the class and not the hue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vqscale.data.config_dense import ScenesConfig

Field = NDArray[np.float64]  # (size, size), or (size, size, 3) of colours in [0, 1]

FOCAL = 1.1  # picture sides
CLASS = {category.name: category.id for category in ScenesConfig.categories}
LUMINANCE = np.array([0.299, 0.587, 0.114])
# Two directions in the plane of colours of one luminance, at right angles.
_RED = np.array([1.0, 0.0, 0.0]) - LUMINANCE[0] * LUMINANCE / (LUMINANCE @ LUMINANCE)
_RED /= np.linalg.norm(_RED)
_GREEN = np.cross(LUMINANCE / np.linalg.norm(LUMINANCE), _RED)


# Signed distances, in radii, of the things; u to the right and v downwards, the floor at v = 1.
def _ball(u: Field, v: Field) -> Field:
    return np.hypot(u, v) - 1


def _box(u: Field, v: Field) -> Field:
    return np.maximum(np.abs(u), np.abs(v)) - 1


def _cone(u: Field, v: Field) -> Field:
    return np.maximum(v - 1, (2 * np.abs(u) - v - 1) / np.sqrt(5))


def _star(u: Field, v: Field) -> Field:
    turn = np.abs((np.arctan2(u, -v) / (2 * np.pi / 5) + 0.5) % 1 - 0.5) * 2
    return (np.hypot(u, v) - (1 - 0.58 * turn)) * 0.7


def _ring(u: Field, v: Field) -> Field:
    return np.abs(np.hypot(u, v) - 0.74) - 0.26


@dataclass(frozen=True)
class _Thing:
    distance: Callable[[Field, Field], Field]
    metres: float  # radius
    luminance: float
    hue: float  # angle of one of its hues; the other is opposite


THINGS = {
    "ball": _Thing(_ball, 0.35, 0.50, 0.3),
    "box": _Thing(_box, 0.40, 0.42, 1.0),
    "cone": _Thing(_cone, 0.45, 0.55, 1.7),
    "star": _Thing(_star, 0.40, 0.60, 2.3),
    "ring": _Thing(_ring, 0.50, 0.38, 2.8),
}


@dataclass(frozen=True)
class View:
    """How the camera sees the floor."""

    horizon: float  # row, in picture sides
    height: float  # metres of the camera above the floor
    far: float  # metres to the farthest thing

    def row(self, metres: float) -> float:
        """Of a point of the floor at this distance."""
        return self.horizon + FOCAL * self.height / metres


@dataclass(frozen=True)
class Object:
    """What stands on the floor: where, how large, and what its pixels are."""

    kind: str  # of THINGS, or empty: what nobody labelled
    id: int  # of its segment
    crowd: bool
    metres: float
    radius_m: float
    centre: tuple[float, float]  # column and row, in picture sides
    colour: Field

    @property
    def radius(self) -> float:
        """In picture sides."""
        return FOCAL * self.radius_m / self.metres

    def distance(self, u: Field, v: Field) -> Field:
        """Signed distance in radii."""
        return THINGS[self.kind].distance(u, v) if self.kind else _blob(u, v)


def objects(rng: np.random.Generator, view: View) -> list[Object]:
    """Up to four things; in half of the scenes what nobody labelled; in a tenth a crowd."""
    names = list(THINGS)
    kinds = [str(rng.choice(names)) for _ in range(rng.integers(1, 5))]
    found = [_anywhere(rng, view, kind, number) for number, kind in enumerate(kinds, 1)]
    if rng.random() < 0.5:
        found.append(_anywhere(rng, view, "", 0))
    if rng.random() < 0.1:
        found += _crowd(rng, view, str(rng.choice(names)))
    return found


def _anywhere(rng: np.random.Generator, view: View, kind: str, number: int) -> Object:
    metres, column = rng.uniform(1.5, view.far), rng.uniform(0.05, 0.95)
    return _standing(rng, view, kind, number, metres, column)


def _crowd(rng: np.random.Generator, view: View, kind: str) -> list[Object]:
    """Three to six of a kind side by side, one segment."""
    metres, left = rng.uniform(0.5 * (1.5 + view.far), view.far), rng.uniform(0.05, 0.6)
    places = [(metres * rng.uniform(0.97, 1.03), left + 0.1 * number) for number in range(rng.integers(3, 7))]
    return [_standing(rng, view, kind, 0, *place, crowd=True) for place in places]


def _standing(
    rng: np.random.Generator, view: View, kind: str, number: int, metres: float, column: float, crowd: bool = False
) -> Object:
    radius_m = (THINGS[kind].metres if kind else 0.3) * rng.uniform(0.85, 1.15) * (0.7 if crowd else 1.0)
    centre = column, view.row(metres) - FOCAL * radius_m / metres
    colour = _hued(THINGS[kind], other=rng.random() < 0.5) if kind else np.full(3, rng.uniform(0.1, 0.25))
    return Object(kind, segment_id(kind, number) if kind else 0, crowd, metres, radius_m, centre, colour)


def _hued(thing: _Thing, other: bool) -> Field:
    """A colour of the thing's luminance, of one of its two hues."""
    turn = thing.hue + np.pi * other
    return thing.luminance + 0.3 * (np.cos(turn) * _RED + np.sin(turn) * _GREEN)


def segment_id(kind: str, number: int = 0) -> int:
    """Of a segment: above 255, so that more than one byte of its colour says it."""
    return 1000 * CLASS[kind] + number


def _blob(u: Field, v: Field) -> Field:
    return np.hypot(u, v) - 0.8 - 0.2 * np.sin(5 * np.arctan2(v, u))
