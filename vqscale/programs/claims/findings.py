"""One comparison of numbers of runs, over seeds with its interval, and what it comes to.

Whatever is compared comes down to numbers, one for each seed, that are to lie beyond a level: differences of runs with
the same seed, or the numbers themselves. With the interval of their mean (Student's t, 95 %),

    holds                  the whole interval is beyond the level
    does not hold here     nothing of the interval is
    not decided            the level is within the interval, or there is one seed and no interval

Not here: which numbers a rule compares, and the verdict of a claim with its comparisons (rules.py).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from vqscale.metrics.laws import COVERAGE, student_t

HOLDS, IN_PART, NOT_HERE, UNTESTED = (
    "holds",
    "holds in part",
    "does not hold here",
    "cannot be tested here",
)
UNDECIDED = "not decided"  # of a comparison, and no verdict of a claim


@dataclass(frozen=True)
class Finding:
    """One comparison."""

    what: str
    """what is compared, in words"""
    verdict: str
    where: str = ""
    """labels of the dials that the rule leaves open, and the two positions that are compared along one"""
    why: str = ""
    """why it cannot be tested, or is not decided"""
    ours: float | None = None
    """mean of the number"""
    others: float | None = None
    """mean of what stands beside it"""
    difference: float | None = None
    """mean of what is judged: of the differences, or of the numbers"""
    low: float | None = None
    """where the interval of that mean begins; None with one seed"""
    high: float | None = None
    level: float | None = None
    """what it is to lie beyond"""
    seeds: tuple[str, ...] = ()
    beyond: bool = False
    """the mean is beyond the level"""


class UntestedError(Exception):
    """Why a comparison cannot be made."""


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Of the mean, at COVERAGE; None of one value."""
    if len(values) < 2:
        return None
    mean, reach = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    reach *= student_t(COVERAGE, len(values) - 1)
    return mean - reach, mean + reach


def judged(
    what: str, seeds: Sequence[str], values: Sequence[float], level: float, *, sign: int, strict: bool
) -> Finding:
    """Whether the values lie above the level (sign 1) or below it (-1), or with strict False at it."""
    mean, ends = statistics.fmean(values), interval(values)

    def beyond(value: float) -> bool:
        return sign * value > sign * level or (value == level and not strict)

    low, high = ends or (None, None)
    if ends is None:
        verdict, why = UNDECIDED, "one seed, and so no interval"
    elif beyond(ends[0]) == beyond(ends[1]):
        verdict, why = HOLDS if beyond(mean) else NOT_HERE, ""
    else:
        verdict, why = UNDECIDED, "the level is within the interval"
    return Finding(what, verdict, "", why, None, None, mean, low, high, level, tuple(seeds), beyond(mean))
