"""The table of a sweep: sweep.json, sweep.csv, and a figure of scores over the first of the prior's dials.

A row has the dials, and the scores of generation.compare under whatever names they deserve. The whole table is kept,
not its best row: guidance and temperature are chosen on the very numbers that are published.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqscale.disk import files
from vqscale.metrics.generation import OTHER_NAMES
from vqscale.show import canvas

Row = Mapping[str, Any]
SCORES = ("fid", "inception_score", "sfid", "precision", "recall")
PANELS = ("fid", "inception_score")
TITLES = {"fid": "FID: lower is nearer", "inception_score": "Inception score: higher is clearer, and varied"}


@dataclass(frozen=True)
class Table:
    """Rows in order, and the dials of the prior, the most important first."""

    dials: Sequence[str]
    rows: Sequence[Row]

    def write(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Write all three files from the rows that are there."""
        content = {**facts, "dials": list(self.dials), "nearest": nearest(self.rows), "rows": list(self.rows)}
        files.write_json(folder / "sweep.json", content)
        text = io.StringIO()
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        table = csv.DictWriter(text, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        files.write(folder / "sweep.csv", text.getvalue())
        files.write(folder / "sweep.png", self.chart())

    def varied(self) -> list[str]:
        """The dials that have more than one value."""
        return [dial for dial in self.dials if len({row[dial] for row in self.rows}) > 1]

    def curves(self, key: str) -> tuple[str, dict[str, list[tuple[float, float]]]]:
        """(dial along x, {values of the others: its points by x}): over the first dial with several values that are
        numbers, or over the first of all.
        """
        numbers = [dial for dial in self.varied() if all(_is_number(row[dial]) for row in self.rows)]
        x = numbers[0] if numbers else self.dials[0]
        shown = [dial for dial in self.varied() if dial != x]
        found: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows:
            if key in row and _is_number(row[x]):
                name = ", ".join(f"{dial.replace('_', '-')} {row[dial]}" for dial in shown)
                found.setdefault(name, []).append((float(row[x]), float(row[key])))
        return x, {name: sorted(points) for name, points in found.items()}

    def chart(self) -> bytes:
        """A PNG: distance to the reference and Inception score, a curve for each combination of the other dials."""
        drawn, panels = canvas.figure(10, 3.6, dpi=120, panels=len(PANELS))
        for panel, name in zip(panels, PANELS, strict=True):
            key = score(self.rows, name)
            x, lines = self.curves(key)
            for label, points in lines.items():
                panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
            panel.set(xlabel=x.replace("_", "-"), title=TITLES[name] if key == name else key.replace("_", " "))
            panel.title.set_fontsize(10)
            panel.grid(alpha=0.3)
            if any(lines):
                panel.legend(fontsize=8)
        return canvas.png(drawn)

    def text(self) -> str:
        """The rows for a terminal: the dials that vary, and the scores."""
        if not self.rows:
            return "no setting is measured yet"
        rows, dials = self.rows, self.varied() or self.dials[:1]
        keys = [key for key in (score(rows, name) for name in SCORES) if any(key in row for row in rows)]
        lines = [[*dials, *keys]]
        lines += [[*(str(row[d]) for d in dials), *(f"{row[k]:.4g}" if k in row else "" for k in keys)] for row in rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def ordered(rows: Sequence[Row], dials: Sequence[str]) -> list[Row]:
    """By the dials, the first varying fastest."""
    return sorted(rows, key=lambda row: [row[dial] for dial in (*dials[1:], *dials[:1])])


def nearest(rows: Sequence[Row]) -> Row | None:
    """The row with the lowest distance to the reference."""
    key = score(rows, "fid")
    return min((row for row in rows if key in row), key=lambda row: float(row[key]), default=None)


def score(rows: Sequence[Row], name: str) -> str:
    """The name of this score in the rows: another one when Inception's weights are not the published."""
    other = OTHER_NAMES[name]
    return other if any(other in row for row in rows) else name


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
