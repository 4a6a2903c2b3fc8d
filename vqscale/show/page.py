"""Figures and one self-contained HTML page from lines of results: everything that a reader needs is in the file.

A line is a dictionary: labels of dials, status, and numbers. With a dial of numbers (K, say) figures are curves over
it, one per combination of the other dials, with a band from the least to the greatest of the seeds; without one they
are bars. A figure over another number than the dial has the same curves, each point at the mean of its seeds.
"""

from __future__ import annotations

import base64
import html
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqscale.show import canvas, document

Line = Mapping[str, Any]
Law = Callable[[Sequence[float]], Sequence[float]]  # what a law says of these places


@dataclass(frozen=True)
class Figure:
    """How one number of all runs is drawn."""

    caption: str
    log: bool = False
    """over a dial of numbers, the number goes by powers of two"""
    from_zero: bool = True
    """bars begin at zero; otherwise a little below the least value, where bars from zero would hide what differs"""
    over: str = ""
    """the number that it is drawn over; empty: the dial of numbers"""
    beside: str = ""
    """a number that is drawn beside it as a dashed line, as the ceiling of it"""


def numeric_dial(lines: Sequence[Line], dials: Sequence[str]) -> str | None:
    """The first dial with at least two positions, all of them numbers; None if there is none."""
    for dial in dials:
        labels = {str(line[dial]) for line in lines}
        if len(labels) > 1 and all(number(label) is not None for label in labels):
            return dial
    return None


def curve(line: Line, x: str | None, dials: Sequence[str]) -> str:
    """The name of the curve that a run belongs to: its positions of the dials but x; "all" where x is the only one."""
    return ", ".join(str(line[dial]) for dial in dials if dial != x) or "all"


def series(lines: Sequence[Line], key: str, x: str, dials: Sequence[str]) -> dict[str, dict[float, list[float]]]:
    """{name of a curve: {position of dial x: values of the seeds}} of runs that have `key`."""
    found: dict[str, dict[float, list[float]]] = {}
    for line in lines:
        value, place = number(line.get(key)), number(line[x])
        if value is not None and place is not None:
            found.setdefault(curve(line, x, dials), {}).setdefault(place, []).append(value)
    return found


def chart(
    figure: Figure, lines: Sequence[Line], key: str, dials: Sequence[str], laws: Mapping[str, Law] | None = None
) -> bytes | None:
    """One number of all runs as a PNG, with the laws of its curves dotted; None when no run has it."""
    done = [line for line in lines if all(number(line.get(name)) is not None for name in (key, figure.over or key))]
    if not done:
        return None
    drawn, (axes,) = canvas.figure(6.4, 4)
    x = numeric_dial(lines, dials)
    if x is not None or figure.over:
        _curves(axes, _points(done, key, x, figure.over, dials), figure, laws or {})
        axes.set_xlabel(figure.over or x)
    else:
        _bars(axes, done, key, dials, figure)
    if x is not None and figure.beside and not figure.over:
        _beside(axes, lines, figure.beside, x)
    axes.set_title(textwrap.fill(figure.caption, 70), fontsize=10)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    return canvas.png(drawn)


def _points(
    lines: Sequence[Line], key: str, x: str | None, over: str, dials: Sequence[str]
) -> dict[str, list[tuple[float, list[float]]]]:
    """{name of a curve: (place, values of the seeds) of each position of x, in order of place}."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in lines:
        position = "" if x is None else str(line[x])
        place = float(line[over] if over else position)
        curves.setdefault(curve(line, x, dials), {}).setdefault(position, []).append((place, float(line[key])))
    return {
        name: sorted((_mean([place for place, _ in seeds]), [value for _, value in seeds]) for seeds in found.values())
        for name, found in curves.items()
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _curves(
    axes: Any, curves: Mapping[str, Sequence[tuple[float, Sequence[float]]]], figure: Figure, laws: Mapping[str, Law]
) -> None:
    if not figure.over and by_powers([place for points in curves.values() for place, _ in points]):
        axes.set_xscale("log", base=2)
    if figure.log:
        axes.set_yscale("log", base=2)
    for name, points in curves.items():
        places = [place for place, _ in points]
        (drawn,) = axes.plot(places, [_mean(y) for _, y in points], marker="o", markersize=4, label=name)
        axes.fill_between(
            places, [min(y) for _, y in points], [max(y) for _, y in points], alpha=0.2, color=drawn.get_color()
        )
        if name in laws:
            axes.plot(places, laws[name](places), linestyle=":", color=drawn.get_color())


def _beside(axes: Any, lines: Sequence[Line], key: str, x: str) -> None:
    """The number `key` of all curves together, dashed."""
    places: dict[float, list[float]] = {}
    for points in series(lines, key, x, [x]).values():
        for place, values in points.items():
            places.setdefault(place, []).extend(values)
    if places:
        axes.plot(sorted(places), [_mean(places[place]) for place in sorted(places)], "--", color="#666", label=key)


def by_powers(places: Sequence[float]) -> bool:
    """Whether positions of a dial spread so wide that they go by powers of two."""
    return bool(places) and min(places) > 0 and max(places) >= 8 * min(places)


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
    head = [html.escape(key) for key in columns]
    body = []
    for line in lines:
        cells = "".join(f"<td>{html.escape(cell(line.get(key), form))}</td>" for key, form in columns.items())
        body.append(f'<tr class="{html.escape(str(line.get("status", "")))}">{cells}</tr>')
    return table_of(head, body)


def table_of(head: Sequence[str], body: Iterable[str]) -> str:
    """An HTML table of rows below a head, all of them HTML: it sorts, and scrolls where it is too wide."""
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    table = f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def cell(value: Any, form: str) -> str:
    found = number(value)
    return form.format(found) if found is not None and form != "{}" else "" if value is None else str(value)


def paragraphs(texts: Iterable[str], failed: bool = False) -> str:
    """A paragraph of each text; `failed` as what has gone wrong."""
    return "".join(f"<p{' class=failed' * failed}>{html.escape(text)}</p>" for text in texts)


def blocks(texts: Iterable[str]) -> str:
    """A block of letters of one width of each text."""
    return "".join(f"<pre>{html.escape(text)}</pre>" for text in texts)


def chart_of(png: bytes, caption: str) -> str:
    """A figure of a chart; the caption is for who does not see it."""
    return f"<figure>{img(png, caption, chart=True)}</figure>"


def picture(path: Path, caption: str, chart: bool = False) -> str:
    """An <img> that carries its file."""
    return f"<figure>{img(path.read_bytes(), caption, chart)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def img(png: bytes, caption: str, chart: bool = False) -> str:
    """An <img> that carries these bytes of a PNG. A chart keeps its size, so that its letters can be read: the <figure>
    around it scrolls."""
    data, kind = base64.b64encode(png).decode(), ' class="chart"' if chart else ""
    return f'<img{kind} alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'


def side_by_side(paths: Mapping[str, Path], rows: int = 2) -> str:
    """The tops of pictures under each other, each named: `rows` is how many of its 2 n rows of images are kept."""
    from PIL import Image

    from vqscale.disk import png

    parts = []
    for name, path in paths.items():
        with Image.open(path, formats=["PNG"]) as image:
            top = image.crop((0, 0, image.width, image.height * rows // 4 if rows < 4 else image.height))
            parts.append(f"<h3>{html.escape(name)}</h3>{img(png.encoded(top), name)}")
    return "".join(parts)


def page(title: str, parts: Iterable[tuple[str, str]]) -> str:
    """A whole HTML document of (heading, HTML) parts."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in parts)
    return document.whole(title, body)


def number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
