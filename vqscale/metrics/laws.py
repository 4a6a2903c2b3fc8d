"""Straight lines through measured numbers, in logarithms where the law is a power: slopes with their intervals.

    power         y ~ x^b            log2 y = a + b log2 x
    exponential   y ~ 2^(b x)        log2 y = a + b x
    linear        y = a + b x

Ordinary least squares over all points alike. The interval of b is Student's at COVERAGE, from the residuals: it tells
how much points scatter about the line, seeds and curvature together, and not whether the line is the right one. numpy
alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Form = Literal["power", "exponential", "linear"]
COVERAGE = 0.95
LEAST_VALUES = 3  # two points lie on a line whatever the law is


@dataclass(frozen=True)
class Fit:
    """a + b x in the logarithms of its form."""

    form: Form
    intercept: float
    slope: float
    low: float
    """where the interval of the slope begins"""
    high: float
    r2: float
    """share of the variance of y, in its logarithm if the form has one, that the line explains; nan of constant y"""

    def at(self, x: Sequence[float]) -> list[float]:
        """y of the law at x."""
        line = self.intercept + self.slope * _abscissa(self.form, x)
        return list(map(float, line if self.form == "linear" else 2.0**line))

    @property
    def constant(self) -> float:
        """What stands before the power, or is added: y of the law where x^b or 2^(b x) is 1, or x is 0."""
        return self.intercept if self.form == "linear" else 2.0**self.intercept


def has_place(form: Form, x: float, y: float) -> bool:
    """Whether a point is finite, and positive where its logarithm is taken."""
    return math.isfinite(x) and math.isfinite(y) and (x > 0 or form != "power") and (y > 0 or form == "linear")


def fit(form: Form, x: Sequence[float], y: Sequence[float]) -> Fit:
    """The law of this form through the points; ValueError for fewer than LEAST_VALUES different x."""
    values = len(set(x))
    if values < LEAST_VALUES:
        raise ValueError(f"{values} different values, and a law needs at least {LEAST_VALUES}")
    u = _abscissa(form, x)
    v = np.asarray(y, np.float64) if form == "linear" else np.log2(np.asarray(y, np.float64))
    centred, spread = u - u.mean(), float(np.square(u - u.mean()).sum())
    slope = float(centred @ v) / spread
    intercept = float(v.mean()) - slope * float(u.mean())
    left, whole = float(np.square(v - intercept - slope * u).sum()), float(np.square(v - v.mean()).sum())
    degrees = len(u) - 2
    reach = student_t(COVERAGE, degrees) * math.sqrt(left / degrees / spread)
    return Fit(form, intercept, slope, slope - reach, slope + reach, 1 - left / whole if whole else math.nan)


def _abscissa(form: Form, x: Sequence[float]) -> npt.NDArray[np.float64]:
    values = np.asarray(x, np.float64)
    return np.log2(values) if form == "power" else values


def student_t(coverage: float, degrees: int) -> float:
    """t with P(|T| <= t) = coverage, for Student's T with so many degrees of freedom."""
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < coverage else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """P(|T| <= t) for t = sqrt(degrees) tan(angle): the finite sums for odd and for even degrees (Abramowitz and Stegun
    26.7.3 and 26.7.4)."""
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= (k - 1) / k * math.cos(angle) ** 2
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total
