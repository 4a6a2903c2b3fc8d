"""One comparison of numbers of runs, over seeds with its interval, and which of four verdicts it comes to.

Whatever is compared comes down to numbers, one for each seed, that are to lie beyond a level: differences of runs with
the same seed, or the numbers themselves. With the interval of their mean (Student's t, 95 %),

    holds                  the mean is beyond the level, and so is the whole interval
    holds in part          the mean is, and the interval is not, or there is one seed and no interval
    does not hold here     the mean is not

Not here: which numbers a rule compares, and what becomes of a claim with several comparisons (claim_rules.py).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from vqscale.metrics.laws import COVERAGE, student_t

HOLDS, IN_PART, NOT_HERE, UNTESTED = VERDICTS = (
    "holds",
    "holds in part",
    "does not hold here",
    "cannot be tested here",
)


@dataclass(frozen=True)
class Finding:
    """One comparison."""

    what: str
    """what is compared, in words"""
    verdict: str
    where: str = ""
    """labels of the dials that the rule leaves open, and the two positions that are compared along one"""
    why: str = ""
    """why it cannot be tested, or holds in part"""
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
    if not beyond(mean):
        verdict, why = NOT_HERE, ""
    elif ends is None:
        verdict, why = IN_PART, "one seed, and so no interval"
    elif all(map(beyond, ends)):
        verdict, why = HOLDS, ""
    else:
        verdict, why = IN_PART, "the interval is not beyond the level"
    return Finding(what, verdict, "", why, None, None, mean, low, high, level, tuple(seeds))
