"""Where the squares lie that are cut out of a photograph: a pure function of its bytes, the number of the square and
the settings. No picture is opened here (photographs.py does), and nothing heavy imported.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vqscale.seed import derive


@dataclass(frozen=True)
class CropsConfig:
    """Squares of photographs, all resized to one size."""

    crops: int
    "squares of a photograph"
    size: int = 64
    "pixels of a side of what comes out"
    scales: tuple[int, int] | None = None
    "shortest and longest side that is cut, in pixels of the photograph; null = size and three times that"
    held_out: float = 0.0
    "share of the photographs, all their squares with them, that goes into shards of its own"
    seed: int = 0
    "which squares, which photographs are held out, and their order"
    max_broken: int = 100
    "files without a whole picture, or with one too small, above which nothing is made"

    @property
    def sides(self) -> tuple[int, int]:
        """Shortest and longest side that is cut."""
        return (self.size, 3 * self.size) if self.scales is None else self.scales

    def problems(self) -> Iterable[tuple[str, str]]:
        """(key, message) of all that cannot be made."""
        low, high = self.sides
        for key, least in (("crops", 1), ("size", 8), ("max_broken", 0)):
            if getattr(self, key) < least:
                yield key, f"{key} is {getattr(self, key)}, but must be at least {least}: raise {key}"
        if low > high:
            yield "scales", f"scales begin at {low} and end at {high} pixels: give the shorter side first"
        elif low < self.size:
            yield (
                "scales",
                f"squares of {low} pixels would be enlarged to the {self.size} of size: raise scales or lower size",
            )
        if not 0 <= self.held_out < 1:
            yield "held_out", f"held_out is {self.held_out}, but a share is at least 0 and below 1: change held_out"


def box(config: CropsConfig, digest: str, number: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a square of the photograph with these bytes and this width and height.

    The logarithm of the side is uniform, as far as the photograph goes, and so is the place.
    """
    low, high = config.sides
    high = min(high, *size)
    draw = random.Random(derive("square", config.seed, digest, number))  # random() is the same in every Python
    side = min(high, max(low, round(low * (high / low) ** draw.random())))
    left, top = (int(draw.random() * (room - side + 1)) for room in size)
    return left, top, left + side, top + side


def split(digests: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """(places to train on, places held out) of these photographs: at least one of each unless share is 0.

    By the bytes, so that neither names nor the order of files decide. ValueError where there are too few.
    """
    if not share:
        return list(range(len(digests))), []
    if len(digests) < 2:
        raise ValueError(
            f"there is {len(digests)} photograph, of which {share:g} cannot be held out as squares of one photograph "
            "are never on both sides: bring more photographs, or leave out --held-out"
        )
    count = min(len(digests) - 1, max(1, round(share * len(digests))))
    ranked = sorted(range(len(digests)), key=lambda place: (derive("held out", seed, digests[place]), digests[place]))
    return sorted(ranked[count:]), sorted(ranked[:count])
