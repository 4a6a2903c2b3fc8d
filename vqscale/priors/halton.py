"""Halton's low-discrepancy order of the positions of a grid: those that follow each other lie far apart.

Point j = 1, 2, ... of side s is the radical inverse of j in the s-th prime (2 for rows, 3 for columns), times the
length of the side; a position comes where a point first falls on it. As in Halton-MaskGIT (2503.17076), whose code
stops at 10,000 points, too few for 64 x 64: here points go on until every position is met.
"""

from __future__ import annotations

import math
from functools import cache

PRIMES = (2, 3, 5, 7)


def radical_inverse(number: int, base: int) -> tuple[int, int]:
    """The digits of a number mirrored at the point, as an exact fraction."""
    top, bottom = 0, 1
    while number:
        number, digit = divmod(number, base)
        top, bottom = top * base + digit, bottom * base
    return top, bottom


@cache
def order(grid: tuple[int, ...]) -> tuple[int, ...]:
    """All positions of a grid (its last side fastest), in Halton's order."""
    assert len(grid) <= len(PRIMES), grid
    found: dict[int, None] = {}
    point = 0
    while len(found) < math.prod(grid):
        point += 1
        place = 0
        for side, base in zip(grid, PRIMES, strict=False):
            top, bottom = radical_inverse(point, base)
            place = place * side + side * top // bottom
        found[place] = None
    return tuple(found)
