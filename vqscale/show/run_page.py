"""The page that tells a run from images to samples: tokenizer, reconstructions, prior, samples beside real images.

Everything is in the one file. Numbers come from what the runs have written (run.yaml, by its schema, metrics.jsonl,
summary.json), so nothing is measured here; what a run has not written is left out. Not here: pages of evaluations and
studies.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vqscale.disk import files, png
from vqscale.show import canvas, page
from vqscale.show.pictures import Picture

Part = tuple[str, str]  # heading and HTML
Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl
_TILE = 64  # pixels of a side of an image that is shown
_BETWEEN = 3


def write(path: Path, title: str, parts: Iterable[Part]) -> Path:
    """Write the page, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, page.page(title, parts))
    return path


def tokenizer(config: Any, grid: Sequence[int], summary: Mapping[str, Any], rows: Rows) -> Part:
    """What the tokenizer is in words, what it reached, and how usage and PSNR went. The config is a TokenizerRun, and
    the grid the places that its net makes of a picture."""
    quantizer, dim = config.tokenizer.quantizer, getattr(config.tokenizer.quantizer, "dim", None)
    most = "up to " if len(config.data.train.shapes) > 1 else ""
    text = (
        f"Pictures of {most}{_by(config.data.train.sides)} pixels become {_by(grid)} ids out of K = "
        f"{int(summary['num_codes']):,} codes (quantizer <b>{html.escape(quantizer.name)}</b>"
        + (f", {dim} numbers each" if dim else "")
        + f"). Trained for {int(summary['steps']):,} steps of {config.data.batch} pictures on "
        f"{int(summary['processes'])} processes, over which the codes are split." + unbegun(summary)
    )
    names = {
        "psnr": ("PSNR on held-out images, dB", "{:.2f}"),
        "ssim": ("SSIM", "{:.3f}"),
        "usage": ("usage: share of the codes that held-out images use", "{:.1%}"),
        "ceiling": ("the most that so many tokens could use", "{:.1%}"),
        "perplexity": ("perplexity of their use", "{:,.0f}"),
        "images_per_s": ("images/s in training", "{:.1f}"),
    }
    curves = {
        "usage of codes": {"training": points(rows, "codes/usage"), "held out": points(rows, "val/usage")},
        "perplexity": {"training": points(rows, "codes/perplexity"), "held out": points(rows, "val/perplexity")},
        "PSNR, dB": {"held out": points(rows, "val/psnr")},
    }
    return "The tokenizer", f"<p>{text}</p>{numbers(summary, names)}{chart(curves, 'over the steps of training')}"


def reconstructions(picture: Path) -> Part:
    return "Reconstructions", page.picture(picture, "held-out originals, below each its reconstruction")


def prior(config: Any, summary: Mapping[str, Any], rows: Rows) -> Part:
    """What the prior is in words, and its loss beside what is reached by knowing less. The config is a PriorRun."""
    settings, net = config.prior, getattr(config.prior, "net", None)
    model = f"A transformer of {net.num_layers} blocks of width {net.width}" if net else "A model"
    given = f", given one of {settings.num_classes} classes" if settings.num_classes else ""
    text = (
        f"{model} (<b>{html.escape(settings.name)}</b>) learns which of the {settings.num_codes:,} ids stand at "
        f"the {_by(settings.grid)} places of a picture{given}. Trained for {int(summary['steps']):,} steps of "
        f"{config.data.batch} pictures on {int(summary['processes'])} processes."
    )
    bound = ", an upper bound" if summary.get("bound") else ""
    names = {
        "loss": (f"loss on held-out ids, nats per id{bound}", "{:.3f}"),
        "perplexity": ("perplexity: as if it chose among so many ids", "{:,.0f}"),
        "unigram": ("cross entropy of the ids, knowing only how often each occurs in training", "{:.3f}"),
        "uniform": ("log K, knowing nothing", "{:.3f}"),
        "images_per_s": ("images/s in training", "{:.1f}"),
    }
    levels = {
        names[key][0]: float(summary[key])
        for key in ("uniform", "unigram")
        if isinstance(summary.get(key), int | float)
    }
    lines = {"training": points(rows, "loss"), "held out": points(rows, "val/loss")}
    drawn = chart({"loss, nats per id": lines}, "loss over the steps of training", levels)
    return "The prior", f"<p>{text}</p>{numbers(summary, names)}{drawn}"


def samples(
    drawn: Mapping[int, Sequence[Picture]],
    real: Mapping[int, Sequence[Picture]],
    names: Mapping[int, str],
    how: Mapping[str, Any],
) -> Part:
    """A row for each class: what was drawn, beside held-out images of this class. `how` has what to say of the drawing,
    by name.
    """
    lines = []
    for label, images in drawn.items():
        name = names.get(label, str(label))
        strips = _strip(images, f"drawn from the prior: {name}"), _strip(real.get(label, ()), f"real: {name}")
        lines.append(f"<tr><td>{html.escape(name)}</td><td>{strips[0]}</td><td>{strips[1]}</td></tr>")
    told = ", ".join(f"{key.replace('_', '-')} {value}" for key, value in how.items())
    table = page.table_of(("class", "drawn from the prior", "real"), lines)
    return "Samples", page.paragraphs([f"The first images of every class, none chosen: {told}."]) + table


def judged(found: Mapping[str, float], accuracy: float) -> Part:
    """What the shapes classifier says of the samples, beside as many real pictures; `accuracy` is its own."""
    text = (
        f"A small classifier of drawn shapes, which has {accuracy:.1%} of pictures right that it was not trained on, "
        f"looks at the {int(found['images']):,} samples and at as many real pictures of the same classes. The "
        "distance is Fréchet's, between its features of either and of other real pictures; it is not FID, and the "
        "fewer the pictures, the larger."
    )
    rows = [
        {"": label, "samples": form.format(found[key]), "real": form.format(found[f"{key}_real"])}
        for key, label, form in (
            ("recognised", "recognised as their class", "{:.1%}"),
            ("shapes_distance", "distance of the shapes classifier's features", "{:.3f}"),
        )
    ]
    table = page.table(rows, {"": "{}", "samples": "{}", "real": "{}"})
    return "The samples before a judge", page.paragraphs([text]) + table


def commands(lines: Sequence[str]) -> Part:
    return "To go on", page.blocks([os.linesep.join(lines)])


def unbegun(summary: Mapping[str, Any]) -> str:
    """A sentence where the warm-up was not over, or the codes had not landed, at the end of the training."""
    for key, what in (("codes_begin", "began"), ("codes_landed", "landed")):
        if summary.get(key, 0) >= summary["steps"]:
            return f" <b>Its codes never {what}</b>: that is after step {int(summary[key]):,}."
    return ""


def _by(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


def points(rows: Rows, key: str) -> list[tuple[int, float]]:
    """(step, value) of the rows that have a finite number under the key."""
    found = [(int(row["step"]), row[key]) for row in rows if isinstance(row.get(key), int | float)]
    return [(step, float(value)) for step, value in found if np.isfinite(value)]


def numbers(summary: Mapping[str, Any], names: Mapping[str, tuple[str, str]]) -> str:
    """An HTML table of those numbers that are there."""
    there = {key: (label, form) for key, (label, form) in names.items() if isinstance(summary.get(key), int | float)}
    return page.table([{"": label, "value": form.format(summary[key])} for key, (label, form) in there.items()],
                      {"": "{}", "value": "{}"})  # fmt: skip


def chart(
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]],
    caption: str,
    levels: Mapping[str, float] | None = None,
) -> str:
    """Curves over steps, a panel each, as an <img>; levels are lines across all. Nothing where there is no point."""
    shown = {title: {name: line for name, line in lines.items() if line} for title, lines in panels.items()}
    shown = {title: lines for title, lines in shown.items() if lines}
    if not shown:
        return ""
    drawn, panes = canvas.figure(max(6.0, 3.4 * len(shown)), 3.2, panels=len(shown))
    for axes, (title, lines) in zip(panes, shown.items(), strict=True):
        for name, line in lines.items():
            axes.plot(*zip(*line, strict=True), label=name, marker="o" if len(line) < 30 else "", markersize=3)
        for number, (name, value) in enumerate((levels or {}).items()):
            axes.axhline(value, linestyle=(":", "--")[number % 2], color="gray", label=f"{value:.2f}: {name}")
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return page.chart_of(canvas.png(drawn), caption)


def _strip(images: Sequence[Picture], caption: str) -> str:
    """Images side by side as one <img>, enlarged so that they can be looked at."""
    if not len(images):
        return ""
    times = max(1, _TILE // images[0].shape[0])
    tiles = [np.pad(np.kron(x, np.ones((times, times, 1), np.uint8)), ((0, 0), (0, _BETWEEN), (0, 0)),
                    constant_values=255) for x in images]  # fmt: skip
    return page.img(png.encoded(np.concatenate(tiles, axis=1)), caption)
