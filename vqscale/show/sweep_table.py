"""The table of a sweep of sampling settings: sweep.json, sweep.csv, and a figure of scores by guidance.

A row has the settings that were turned, and the scores of generation.compare under whatever names they deserve. The
whole table is kept, not its best row: guidance and temperature are chosen on the very numbers that are published.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vqscale.disk import files
from vqscale.metrics.generation import OTHER_NAMES

Row = Mapping[str, Any]
DIALS = ("guidance", "schedule", "temperature", "top_k", "top_p")
SCORES = ("fid", "inception_score", "sfid", "precision", "recall")
PANELS = ("fid", "inception_score")
TITLES = {"fid": "FID: lower is nearer", "inception_score": "Inception score: higher is clearer, and varied"}


def write(folder: Path, facts: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write all three from the rows that are there."""
    best = nearest(rows)
    content = {**facts, "nearest": best, "rows": list(rows)}
    files.write_json(folder / "sweep.json", content)
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    files.write(folder / "sweep.csv", text.getvalue())
    files.write(folder / "sweep.png", figure(rows))


def ordered(rows: Sequence[Row]) -> list[Row]:
    """By the dials, guidance turning fastest."""
    return sorted(rows, key=lambda row: [row[dial] for dial in (*DIALS[1:], DIALS[0])])


def nearest(rows: Sequence[Row]) -> Row | None:
    """The row with the lowest distance to the reference."""
    key = score(rows, "fid")
    return min((row for row in rows if key in row), key=lambda row: float(row[key]), default=None)


def score(rows: Sequence[Row], name: str) -> str:
    """The name of this score in the rows: another one when Inception's weights are not the published."""
    other = OTHER_NAMES[name]
    return other if any(other in row for row in rows) else name


def curves(rows: Sequence[Row], key: str) -> tuple[str, dict[str, list[tuple[float, float]]]]:
    """(dial along x, {settings of a curve: its points by x}): over guidance, or over the first dial that was turned."""
    turned = [dial for dial in DIALS if len({row[dial] for row in rows}) > 1 and dial != "schedule"]
    x = turned[0] if turned else "guidance"
    shown = [dial for dial in DIALS if dial != x and len({row[dial] for row in rows}) > 1]
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if key in row:
            name = ", ".join(f"{dial.replace('_', '-')} {row[dial]}" for dial in shown)
            found.setdefault(name, []).append((float(row[x]), float(row[key])))
    return x, {name: sorted(points) for name, points in found.items()}


def figure(rows: Sequence[Row]) -> bytes:
    """A PNG: distance to the reference and Inception score, a curve for each combination of the other dials."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # lazily: it costs half a second
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(drawn)
    for panel, name in zip(drawn.subplots(1, 2), PANELS, strict=True):
        key = score(rows, name)
        x, lines = curves(rows, key)
        for label, points in lines.items():
            panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
        panel.set(xlabel=x.replace("_", "-"), title=TITLES[name] if key == name else key.replace("_", " "))
        panel.title.set_fontsize(10)
        panel.grid(alpha=0.3)
        if any(lines):
            panel.legend(fontsize=8)
    held = io.BytesIO()
    drawn.savefig(held, format="png")
    return held.getvalue()


def table(rows: Sequence[Row]) -> str:
    """The rows for a terminal: what was turned, and the scores."""
    if not rows:
        return "no setting is measured yet"
    dials = [dial for dial in DIALS if len({row[dial] for row in rows}) > 1] or ["guidance"]
    keys = [key for key in (score(rows, name) for name in SCORES) if any(key in row for row in rows)]
    lines = [[*dials, *keys]]
    lines += [[*(str(row[d]) for d in dials), *(f"{row[k]:.4g}" if k in row else "" for k in keys)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)) for line in lines)
