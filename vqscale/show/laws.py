"""The laws of a study: which numbers follow which, fitted for each curve, as lines of laws.csv and of the page's table.

A study has laws when it has a dial of numbers that go by powers of two. A curve is a combination of the other dials, as
in the figures. Whatever is left out of a fit is named in its note.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vqscale.metrics import laws as least_squares
from vqscale.metrics.laws import COVERAGE, Fit, Form
from vqscale.show import page
from vqscale.show.page import Line

COLUMNS = {
    "law": "{}", "curve": "{}", "b": "{:.4g}", "low": "{:.4g}", "high": "{:.4g}", "constant": "{:.4g}", "r2": "{:.3f}",
    "n": "{:.0f}", "values": "{:.0f}", "seeds": "{:.0f}", "note": "{}",
}  # fmt: skip
ABOUT = (
    "Least squares over all n runs of a curve, of different values of x and of seeds; low to high is the "
    f"{COVERAGE:.0%} interval of b, Student's t of the residuals, and r2 the share of the variance that the line "
    "explains. The interval knows the scatter about the line, not whether the line is the right law. constant is y "
    "where x^b or 2^(b x) is 1, or where x is 0."
)
FEW = 3  # runs that a note names; of more it tells the number, the table of runs has the names


@dataclass(frozen=True)
class Law:
    """That one number of a run follows another, or the dial of numbers."""

    of: str
    """key of the number"""
    form: Form
    over: str = ""
    """key of what it follows; empty: the dial of numbers"""

    def text(self, x: str) -> str:
        """The law in words, `x` the name of what it follows."""
        return {
            "power": f"{self.of} ~ {x}^b",
            "exponential": f"{self.of} ~ 2^(b {x})",
            "linear": f"{self.of} = a + b {x}",
        }[self.form]


@dataclass(frozen=True)
class Fitted:
    """A law of one curve; `fit` is None where it could not be fitted, and the line says why."""

    law: Law
    curve: str
    fit: Fit | None
    line: Mapping[str, Any]


def fitted(laws: Sequence[Law], lines: Sequence[Line], dials: Sequence[str]) -> list[Fitted]:
    """Each law of each curve, of laws that any run has a number for; [] without a dial of numbers by powers of two."""
    dial = page.numeric_dial(lines, dials)
    if dial is None or not page.by_powers([float(line[dial]) for line in lines]):
        return []
    curves: dict[str, list[Line]] = {}
    for line in lines:
        curves.setdefault(page.curve(line, dial, dials), []).append(line)
    told = [law for law in laws if any(page.number(line.get(law.of)) is not None for line in lines)]
    return [_fitted(law, law.over or dial, curve, runs) for law in told for curve, runs in curves.items()]


def _fitted(law: Law, x: str, curve: str, lines: Sequence[Line]) -> Fitted:
    points = {str(line["run"]): point for line in lines if (point := _point(law, x, line)) is not None}
    seeds = len({str(line.get("seed")) for line in lines if str(line["run"]) in points})
    missing = [line for line in lines if str(line["run"]) not in points]
    found, notes = None, list[str]()
    try:
        found = least_squares.fit(law.form, *map(list, zip(*points.values(), strict=True))) if points else None
    except ValueError as error:
        notes.append(f"not fitted: {error}")
    if found is not None and seeds == 1:
        notes.append("one seed: the interval is of the residuals alone")
    numbers = {} if found is None else _numbers(found)
    counts = {"n": len(points), "values": len({place for place, _ in points.values()}), "seeds": seeds}
    note = "; ".join([*notes, *_without(missing, x, law.of)])
    return Fitted(law, curve, found, {"law": law.text(x), "curve": curve, **numbers, **counts, "note": note})


def _point(law: Law, x: str, line: Line) -> tuple[float, float] | None:
    """Where a run lies; None when it is no point of this law."""
    place, value = page.number(line.get(x)), page.number(line.get(law.of))
    if place is None or value is None or not least_squares.has_place(law.form, place, value):
        return None
    return place, value


def _without(lines: Sequence[Line], x: str, y: str) -> list[str]:
    """Which runs are no points, by the reason."""
    reasons: dict[str, list[str]] = {}
    for line in lines:
        reasons.setdefault(_why(line, x, y), []).append(str(line["run"]))
    return [
        f"without {', '.join(runs) if len(runs) <= FEW or why == 'failed' else f'{len(runs)} runs'} ({why})"
        for why, runs in reasons.items()
    ]


def _why(line: Line, x: str, y: str) -> str:
    """Why a run is no point: it is not done, or which of its numbers cannot be used."""
    if line.get("status", "done") != "done":
        return str(line["status"])
    lacking = [key for key in (x, y) if page.number(line.get(key)) is None]
    return f"no {' and no '.join(lacking)}" if lacking else f"{x} {line[x]}, {y} {line[y]}"


def _numbers(found: Fit) -> dict[str, float]:
    r2 = {} if found.r2 != found.r2 else {"r2": found.r2}
    return {"b": found.slope, "low": found.low, "high": found.high, "constant": found.constant, **r2}
