"""Curves that are kept, and how far those of a run are from them.

A kept file is a CSV: a column `step`, and one for each key; what a row does not have is empty, what was not finite nan.
Curves are compared by the means over the quarters of the kept steps, because single steps are noise.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vqscale.disk import files

Curve = tuple[list[int], list[float]]

QUARTERS = 4


def keep(curves: Mapping[str, Curve], out: Path) -> None:
    """Write curves by key to a CSV."""
    rows: dict[int, dict[str, float | int]] = {}
    for key, (steps, values) in curves.items():
        for step, value in zip(steps, values, strict=True):
            rows.setdefault(step, {"step": step})[key] = float(f"{value:.6g}")
    text = io.StringIO()
    writer = csv.DictWriter(text, ["step", *curves], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[step] for step in sorted(rows))
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write(out, text.getvalue())


def kept(path: Path) -> dict[str, Curve]:
    """The curves of a CSV that `keep` wrote; ValueError for another file."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give one that --keep has written")
    found: dict[str, Curve] = {}
    try:
        for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")), strict=True):
            step = int(row.pop("step"))
            for key, value in row.items():
                steps, values = found.setdefault(key, ([], []))
                if value != "":
                    steps.append(step)
                    values.append(float(value))
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no file of kept curves ({error!r}): write one with --keep") from None
    if not found:
        raise ValueError(f"{path} has no curves: write it with --keep")
    return found


@dataclass(frozen=True)
class Apart:
    """How far a curve is from a kept one: the means over each quarter of the kept steps that it has come through."""

    key: str
    ends: list[int]
    """the last step of each quarter"""
    here: list[float]
    there: list[float]

    @property
    def most(self) -> float:
        """The largest difference, as a share of the larger one; nan where one of them has no finite mean."""
        shares = [_share(a, b) for a, b in zip(self.here, self.there, strict=True)]
        return max(shares, key=lambda share: math.inf if math.isnan(share) else share)

    def __str__(self) -> str:
        pairs = zip(self.ends, self.here, self.there, strict=True)
        return ", ".join(f"to step {end}: {a:.4g} ({b:.4g})" for end, a, b in pairs)


def _share(a: float, b: float) -> float:
    return 0.0 if a == b else abs(a - b) / max(abs(a), abs(b))


def apart(key: str, run: Curve, other: Curve) -> Apart | None:
    """The curve of a run beside a kept one; None while it has not come through the first quarter."""
    first, last = other[0][0], other[0][-1]
    edges = [first + (last - first) * i / QUARTERS for i in range(1, QUARTERS + 1)]
    found = Apart(key, [], [], [])
    low = -math.inf
    for edge in edges:
        here, there = _mean(run, low, edge), _mean(other, low, edge)
        if there is not None:
            if here is None or run[0][-1] < math.floor(edge):
                break
            found.ends.append(math.floor(edge))
            found.here.append(here)
            found.there.append(there)
            low = edge
    return found if found.ends else None


def _mean(curve: Curve, low: float, high: float) -> float | None:
    """Of the values after step `low` up to `high`; None where there are none."""
    values: Sequence[float] = [y for x, y in zip(*curve, strict=True) if low < x <= high]
    return sum(values) / len(values) if values else None
