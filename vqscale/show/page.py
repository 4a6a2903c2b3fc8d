"""Figures and one self-contained HTML page from lines of results: everything that a reader needs is in the file.

A line is a dictionary: labels of dials, status, and numbers. With a dial of numbers (K, say) figures are curves over
it, one per combination of the other dials, with the spread of the seeds as a band; without one they are bars.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqscale.show import canvas

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """How one number of all runs is drawn."""

    caption: str
    log: bool = False
    """over a dial of numbers, the number goes by powers of two"""
    from_zero: bool = True
    """bars begin at zero; otherwise a little below the least value, where bars from zero would hide what differs"""


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{background:#f4f4f4;padding:.8rem;
overflow:auto}.failed{color:#a00}figure{margin:1rem 0}figcaption{color:#666}"""


def numeric_dial(lines: Sequence[Line], dials: Sequence[str]) -> str | None:
    """The first dial with at least two positions, all of them numbers; None if there is none."""
    for dial in dials:
        labels = {str(line[dial]) for line in lines}
        if len(labels) > 1 and all(_number(label) is not None for label in labels):
            return dial
    return None


def series(lines: Sequence[Line], key: str, x: str, dials: Sequence[str]) -> dict[str, dict[float, list[float]]]:
    """{name of a curve: {position of dial x: values of the seeds}} of runs that have `key`."""
    found: dict[str, dict[float, list[float]]] = {}
    for line in lines:
        value, place = _number(line.get(key)), _number(line[x])
        if value is None or place is None:
            continue
        name = ", ".join(str(line[dial]) for dial in dials if dial != x) or key
        found.setdefault(name, {}).setdefault(place, []).append(value)
    return found


def chart(figure: Figure, lines: Sequence[Line], key: str, dials: Sequence[str]) -> bytes | None:
    """One number of all runs as a PNG; None when no run has it."""
    done = [line for line in lines if _number(line.get(key)) is not None]
    if not done:
        return None
    drawn, (axes,) = canvas.figure(6.4, 4)
    x = numeric_dial(lines, dials)
    if x is not None:
        _curves(axes, series(done, key, x, dials), figure)
        axes.set_xlabel(x)
    else:
        _bars(axes, done, key, dials, figure)
    axes.set_title(figure.caption, fontsize=10)
    axes.grid(alpha=0.3)
    return canvas.png(drawn)


def _curves(axes: Any, curves: Mapping[str, Mapping[float, Sequence[float]]], figure: Figure) -> None:
    if _by_powers([place for points in curves.values() for place in points]):
        axes.set_xscale("log", base=2)
    if figure.log:
        axes.set_yscale("log", base=2)
    for name, points in curves.items():
        places = sorted(points)
        means = [sum(points[place]) / len(points[place]) for place in places]
        (drawn,) = axes.plot(places, means, marker="o", markersize=4, label=name)
        low, high = [min(points[place]) for place in places], [max(points[place]) for place in places]
        axes.fill_between(places, low, high, alpha=0.2, color=drawn.get_color())
    axes.legend(fontsize=8)


def _by_powers(places: Sequence[float]) -> bool:
    """Whether positions of a dial spread so wide that they go by powers of two."""
    return min(places) > 0 and max(places) >= 8 * min(places)


def _bars(axes: Any, lines: Sequence[Line], key: str, dials: Sequence[str], figure: Figure) -> None:
    groups: dict[str, list[float]] = {}
    for line in lines:
        groups.setdefault(", ".join(str(line[dial]) for dial in dials), []).append(float(line[key]))
    means = [sum(values) / len(values) for values in groups.values()]
    reach = [[m - min(v) for m, v in zip(means, groups.values(), strict=True)],
             [max(v) - m for m, v in zip(means, groups.values(), strict=True)]]  # fmt: skip
    axes.bar(list(groups), means, yerr=reach if any(map(any, reach)) else None, capsize=4, color="#4878a8")
    axes.tick_params(axis="x", rotation=40, labelsize=8)
    if not figure.from_zero:
        every = [value for values in groups.values() for value in values]
        axes.set_ylim(min(every) - ((max(every) - min(every)) / 3 or abs(every[0]) / 10))


def table(lines: Sequence[Line], columns: Mapping[str, str]) -> str:
    """An HTML table of these columns, {key: format}; what a run does not have is left empty."""
    head = "".join(f"<th>{html.escape(key)}</th>" for key in columns)
    body = []
    for line in lines:
        cells = "".join(f"<td>{html.escape(cell(line.get(key), form))}</td>" for key, form in columns.items())
        body.append(f'<tr class="{html.escape(str(line.get("status", "")))}">{cells}</tr>')
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def cell(value: Any, form: str) -> str:
    number = _number(value)
    return form.format(number) if number is not None and form != "{}" else "" if value is None else str(value)


def picture(path: Path, caption: str) -> str:
    """An <img> that carries its file."""
    data = base64.b64encode(path.read_bytes()).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def side_by_side(paths: Mapping[str, Path], rows: int = 2) -> str:
    """The tops of pictures under each other, each named: `rows` is how many of its 2 n rows of images are kept."""
    from PIL import Image

    parts = []
    for name, path in paths.items():
        with Image.open(path) as image:
            top = image.crop((0, 0, image.width, image.height * rows // 4 if rows < 4 else image.height))
            held = io.BytesIO()
            top.save(held, "PNG")
        data = base64.b64encode(held.getvalue()).decode()
        text = html.escape(name)
        parts.append(f'<h3>{text}</h3><img alt="{text}" src="data:image/png;base64,{data}">')
    return "".join(parts)


def page(title: str, parts: Iterable[tuple[str, str]]) -> str:
    """A whole HTML document of (heading, HTML) parts."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in parts)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n"


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
