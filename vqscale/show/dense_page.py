"""The evaluation of guiding codes as a table for a terminal, and as a folder: result.json, and a page with the table
and a picture of images, truths and predictions side by side.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vqscale.disk import files
from vqscale.show import page, pictures, report

RESULT, PICTURE = "result.json", "beside.png"


def tell(
    result: Mapping[str, Any], folder: str | None, as_json: bool, title: str, shown: tuple[str, pictures.Picture]
) -> str:
    """The table, or all as JSON; writes the folder too, if one is given. `result` has its table under "rows", and
    "notes"; `shown` is (names of the columns, the picture)."""
    told = [report.text(result)] if as_json else [*lines(result["rows"]), *(f"note: {x}" for x in result["notes"])]
    if folder:
        at = write(Path(folder), title, result, shown)
        told += [] if as_json else [f"page: {at}, numbers: {at.with_name('result.json')}"]
    return "\n".join(told)


def lines(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The table as text: a line for each way, a column for each metric."""
    table = [["", *columns(rows)], *([name, *cells(numbers, columns(rows))] for name, numbers in rows.items())]
    widths = [max(len(row[place]) for row in table) for place in range(len(table[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(n) for x, n in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in table
    ]


def columns(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for numbers in rows.values() for name in numbers))


def cells(numbers: Mapping[str, float], names: list[str]) -> list[str]:
    found = {name: float("nan") if value is None else value for name, value in numbers.items()}  # JSON has no nan
    return [dict(report.lines({name: found[name]}))[name] if name in found else "" for name in names]


def write(folder: Path, title: str, result: Mapping[str, Any], shown: tuple[str, pictures.Picture]) -> Path:
    """Write the folder; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {**result, "title": title, "shown": shown[0]}
    pictures.save(folder / PICTURE, shown[1])
    files.write(folder / RESULT, report.text(whole) + "\n")
    rest = {key: value for key, value in result.items() if key not in ("rows", "notes", "classes")}
    how = ("How", page.blocks([report.text(rest)]))
    files.write(folder / "index.html", page.page("Guiding codes", [part(folder), how]))
    return folder / "index.html"


def part(folder: Path) -> tuple[str, str]:
    """(heading, HTML) of an evaluation that `write` has written. ValueError for another folder."""
    try:
        result = json.loads((folder / RESULT).read_text())
        table, title, shown, notes = (result[key] for key in ("rows", "title", "shown", "notes"))
        classes = result.get("classes", {})
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder} has no evaluation of guiding codes ({type(error).__name__}: {error}): give a folder that "
            "`vqscale evaluate dense` wrote by its --out"
        ) from error
    names = columns(table)
    rows = [{"": name, **dict(zip(names, cells(numbers, names), strict=True))} for name, numbers in table.items()]
    text = page.table(rows, dict.fromkeys(["", *names], "{}")) + page.paragraphs(notes, failed=True)
    text += page.picture(folder / PICTURE, f"from left to right: {shown}")
    return title, text + "".join(_of_classes(classes))


def _of_classes(classes: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[str]:
    """A table of the first metric of each class, a column for each row of the table above; nothing without classes."""
    for ways in list(classes.values())[:1]:
        metric = next(iter(next(iter(ways.values()))))
        rows = [{"": name} | _cells(of, metric) for name, of in classes.items()]
        yield page.paragraphs([f"{metric} of each class:"]) + page.table(rows, dict.fromkeys(["", *ways], "{}"))


def _cells(of: Mapping[str, Mapping[str, float]], metric: str) -> dict[str, str]:
    return {way: cells(numbers, [metric])[0] for way, numbers in of.items()}
