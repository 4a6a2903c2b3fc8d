"""What a study shows of the runs of a task, and its page: table, figures, pictures, and how it was made.

TASKS is an open set: a task of a run has an entry, which names numbers by their keys in summary.json. A table has the
columns that any of its runs has, in this order.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqscale.disk import files
from vqscale.show import page
from vqscale.show.page import Figure, Line

COLLAPSED_USAGE, COLLAPSED_PERPLEXITY = 0.5, 0.1  # of the ceilings of usage, and of perplexity


@dataclass(frozen=True)
class Task:
    """What is shown of a run of one task."""

    columns: Mapping[str, str]
    """of the table: key -> format"""
    figures: Mapping[str, Figure]
    """key -> how it is drawn"""
    verdict: Callable[[Line], str]
    """what a reader should know of a run that is done, in words"""
    logged: Mapping[str, str] = field(default_factory=dict)
    """numbers of the last logged step that stand beside those of the summary: name there -> name here"""
    pictures: str = ""
    """pattern of pictures in the run folder, of which the last is shown"""
    about_pictures: str = ""


def _of_codes(line: Line) -> str:
    """Whether the codes are in use on held-out images, and when not, what was measured of the reasons."""
    usage, perplexity, codes = line.get("usage"), line.get("perplexity"), line.get("num_codes")
    if usage is None or perplexity is None or not codes:
        return ""
    ceiling = line.get("ceiling") or 1.0
    if line.get("codes_begin", 0) >= line.get("steps", math.inf):
        return f"codes never began: the warm-up of {line['codes_begin']} steps is not over in {line['steps']}"
    if usage >= COLLAPSED_USAGE * ceiling and perplexity >= COLLAPSED_PERPLEXITY * ceiling * codes:
        return f"in use, {usage / ceiling:.1%} of the ceiling" if ceiling < 0.98 else "in use"
    reasons = ("codes/saturation", "codes/code_norm", "codes/latent_norm")
    measured = [f"{key.rpartition('/')[2]} {line[key]:.3g}" for key in reasons if line.get(key) is not None]
    used = f"usage {usage:.0%} of at most {ceiling:.0%}, perplexity {perplexity:.0f} of {codes}"
    return f"collapsed: {used}; {', '.join(measured)}"


def _of_ids(line: Line) -> str:
    """Whether a prior knows more than how often each id occurs."""
    loss, unigram = line.get("loss"), line.get("unigram")
    if loss is None or unigram is None:
        return ""
    if loss < unigram:
        bound = "; an upper bound" if line.get("bound") else ""
        return f"{unigram - loss:.3g} nats below how often ids occur{bound}"
    return f"learnt nothing of the images: {loss:.4g} nats, and how often ids occur gives {unigram:.4g}"


TASKS = {
    "tokenizer": Task(
        columns={
            "num_codes": "{:,.0f}", "usage": "{:.1%}", "ceiling": "{:.1%}", "perplexity": "{:,.0f}", "psnr": "{:.2f}",
            "ssim": "{:.3f}", "loss": "{:.4f}", "images_per_s": "{:.0f}", "code_axis_share": "{:.0%}",
        },
        figures={
            "usage": Figure("usage: share of codes that held-out images use"),
            "perplexity": Figure("perplexity of the codes held-out images use", log=True),
            "psnr": Figure("PSNR on held-out images, dB", from_zero=False),
            "loss": Figure("training loss at the end"),
        },
        verdict=_of_codes,
        logged={key: key for key in ("loss", "codes/saturation", "codes/code_norm", "codes/latent_norm")},
        pictures="samples/reconstructions/*.png",
        about_pictures="Originals above reconstructions",
    ),
    "prior": Task(
        columns={
            "num_codes": "{:,.0f}", "loss": "{:.4f}", "perplexity": "{:,.1f}", "accuracy": "{:.1%}",
            "unigram": "{:.4f}", "recognised": "{:.1%}", "recognised_real": "{:.1%}", "shapes_distance": "{:.3f}",
            "shapes_distance_real": "{:.3f}", "training loss": "{:.4f}", "images_per_s": "{:.0f}",
            "code_axis_share": "{:.0%}",
        },
        figures={
            "loss": Figure("loss on held-out ids, nats per id", from_zero=False),
            "perplexity": Figure("perplexity on held-out ids", log=True),
            "accuracy": Figure("share of held-out ids that were the most probable"),
            "recognised": Figure("share of samples that the shapes classifier recognises as their class"),
            "images_per_s": Figure("images per second in training"),
        },
        verdict=_of_ids,
        logged={"loss": "training loss"},
    ),
}  # fmt: skip


def columns(task: Task, lines: Sequence[Line]) -> dict[str, str]:
    """{key: format} of the table: the name and how it went, and what any run has of its numbers."""
    every = {"run": "{}", "status": "{}", "steps": "{:,.0f}", **task.columns, "verdict": "{}"}
    return {key: form for key, form in every.items() if any(line.get(key) not in (None, "") for line in lines)}


def write(
    place: Path,
    task: Task,
    lines: Sequence[Line],
    dials: Sequence[str],
    folders: Mapping[str, Path],
    how: Sequence[str],
) -> Path:
    """Write PLACE/figures and PLACE/index.html; `folders` are the runs' own by name, `how` texts on how it was made."""
    shown = _pictures(task, folders)
    parts = [
        ("Results", page.table(lines, columns(task, lines)) + _failures(lines)),
        ("Figures", "".join(_figures(place / "figures", task, lines, dials))),
        *([(task.about_pictures, page.side_by_side(shown))] if shown else []),
        ("How", "".join(f"<pre>{html.escape(text)}</pre>" for text in how)),
    ]
    path = place / "index.html"
    files.write(path, page.page(f"Study {place.name}", parts))
    return path


def _failures(lines: Sequence[Line]) -> str:
    told = [(str(line["run"]), str(line["error"])) for line in lines if line.get("error")]
    return "".join(f"<p class=failed>{html.escape(run)}: {html.escape(error)}</p>" for run, error in told)


def _figures(folder: Path, task: Task, lines: Sequence[Line], dials: Sequence[str]) -> list[str]:
    folder.mkdir(exist_ok=True)
    drawn = []
    for key, figure in task.figures.items():
        chart, path = page.chart(figure, lines, key, dials), folder / f"{key}.png"
        if chart is not None:
            files.write(path, chart)
            drawn.append(page.picture(path, figure.caption))
    return drawn


def _pictures(task: Task, folders: Mapping[str, Path]) -> dict[str, Path]:
    found = {name: sorted(folder.glob(task.pictures)) if task.pictures else [] for name, folder in folders.items()}
    return {name: paths[-1] for name, paths in found.items() if paths}


def text(task: Task, lines: Sequence[Line]) -> str:
    """The table for a terminal."""
    shown = columns(task, lines)
    rows = [list(shown), *([page.cell(line.get(key), form) for key, form in shown.items()] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{word:<{width}}" for word, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def result(task: Task, summary: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a run that is done, with the verdict; `row` is its last logged step."""
    line = dict(summary) | {name: row[key] for key, name in task.logged.items() if key in row}
    return line | {"verdict": task.verdict(line)}
