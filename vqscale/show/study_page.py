"""What a study shows of the runs of a task, and its page: table, figures, laws, pictures, and how it was made.

TASKS is an open set: a task of a run has an entry, which names numbers by their keys in summary.json, and what follows
from these. A table has the columns that any of its runs has, in this order.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vqscale.disk import files
from vqscale.show import laws, page
from vqscale.show.laws import Fitted, Law
from vqscale.show.page import Figure, Line

ENOUGH = 0.98  # ceiling of usage, from which on usage tells of the codes alone
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
    measured: Mapping[str, str] = field(default_factory=dict)
    """columns of what a study measures besides: how their keys begin -> format"""
    logged: Mapping[str, str] = field(default_factory=dict)
    """numbers of the last logged step that stand beside those of the summary: name there -> name here"""
    others: Sequence[str] = ()
    """numbers that results.csv has of any run, and the table leaves out"""
    pictures: str = ""
    """pattern of pictures in the run folder, of which the last is shown"""
    about_pictures: str = ""
    derived: Callable[[Line], Mapping[str, float]] = lambda line: {}
    """numbers that follow from those of a run"""
    laws: Sequence[Law] = ()
    """which numbers are fitted against which, in a study with a dial of numbers"""
    cautions: Callable[[Sequence[Line]], Sequence[str]] = lambda lines: ()
    """what a reader should know of the numbers of all runs"""


def _derived(line: Line) -> dict[str, float]:
    """Usage as a share of its ceiling, mean squared error by the PSNR, and the bits of a token: those that the
    quantizer says are stored (SCQ), or else the entropy of its ids on held-out samples."""
    found = {}
    if (usage := line.get("usage")) is not None and line.get("ceiling"):
        found["usage_of_ceiling"] = usage / line["ceiling"]
    if (psnr := line.get("psnr")) is not None:
        found["distortion"] = 10 ** (-psnr / 10)
    if (bits := line.get("codes/bits", line.get("id_bits"))) is not None:
        found["bits"] = bits
    elif line.get("perplexity") and line.get("ids_per_token") == 1:
        found["bits"] = math.log2(line["perplexity"])
    return found


def _below_enough(lines: Sequence[Line]) -> list[str]:
    """Which runs were looked at on too few tokens."""
    low = [f"{line['run']} ({line['ceiling']:.1%})" for line in lines if (line.get("ceiling") or 1) < ENOUGH]
    said = f"The ceiling of usage is below {ENOUGH:.0%}, the held-out tokens being too few for so many codes, in"
    return [f"{said} {', '.join(low)}. Perplexity is held down there too."] if low else []


def _of_codes(line: Line) -> str:
    """Whether the codes are in use on held-out images, and when not, what was measured of the reasons."""
    usage, perplexity, codes = line.get("usage"), line.get("perplexity"), line.get("num_codes")
    if usage is None or perplexity is None or not codes:
        return ""
    ceiling = line.get("ceiling") or 1.0
    if line.get("codes_begin", 0) >= line.get("steps", math.inf):
        return f"codes never began: the warm-up of {line['codes_begin']} steps is not over in {line['steps']}"
    if usage >= COLLAPSED_USAGE * ceiling and perplexity >= COLLAPSED_PERPLEXITY * ceiling * codes:
        return f"in use, {usage / ceiling:.1%} of the ceiling" if ceiling < ENOUGH else "in use"
    reasons = ("codes/saturation", "codes/code_norm", "codes/latent_norm")
    measured = [f"{key.rpartition('/')[2]} {line[key]:.3g}" for key in reasons if line.get(key) is not None]
    used = f"usage {usage:.0%} of at most {ceiling:.0%}, perplexity {perplexity:.0f} of {codes}"
    return f"collapsed: {used}; {', '.join(measured)}"


def _of_ids(line: Line) -> str:
    """Whether a prior knows more than how often each id occurs."""
    loss, unigram = line.get("loss"), line.get("unigram")
    if loss is None or unigram is None:
        return ""
    bound = "; the loss is an upper bound" if line.get("bound") else ""
    if loss < unigram:
        return f"{unigram - loss:.3g} nats below how often ids occur{bound}"
    return f"learnt nothing of the images: {loss:.4g} nats, and how often ids occur gives {unigram:.4g}{bound}"


COST = Figure("cost: seconds per step, times processes (median of the logged steps of the second half)", log=True)

TASKS = {
    "tokenizer": Task(
        columns={
            "num_codes": "{:,.0f}", "usage": "{:.1%}", "ceiling": "{:.1%}", "perplexity": "{:,.0f}", "psnr": "{:.2f}",
            "ssim": "{:.3f}", "bits": "{:.2f}", "loss": "{:.4f}", "reconstruction": "{:.4f}", "images_per_s": "{:.0f}",
            "memory_mib": "{:,.0f}", "process_s": "{:.3f}", "code_axis_share": "{:.0%}",
        },
        measured={
            "psnr_": "{:.2f}", "shapes_distance": "{:.3f}", "rfid": "{:.2f}", "distance_other_inception": "{:.3f}",
            "prior_nats": "{:.3f}", "unigram_nats": "{:.3f}", "moved_": "{:.2%}",
            "reached": "{:.1%}", "reached_evenly": "{:.1%}",
        },
        figures={
            "usage": Figure("usage: share of codes that held-out images use", beside="ceiling"),
            "perplexity": Figure("perplexity of the codes held-out images use", log=True),
            "psnr": Figure("PSNR on held-out images, dB", from_zero=False),
            "distortion": Figure(
                "distortion (mean squared error, peak 1, by the mean PSNR) against the bits a token carries",
                log=True, over="bits",
            ),
            "loss": Figure("training loss at the end"),
            "reconstruction": Figure("reconstruction loss at the end of training", log=True),
            "process_s": COST,
        },
        verdict=_of_codes,
        logged={"loss/l1": "reconstruction", "loss/l2": "reconstruction"}
        | {key: key for key in ("loss", "codes/saturation", "codes/code_norm", "codes/latent_norm", "codes/bits")},
        others=("usage_of_ceiling", "distortion", "dead", "id_bits"),
        pictures="samples/reconstructions/*.png",
        about_pictures="Originals above reconstructions",
        derived=_derived,
        laws=(
            Law("perplexity", "power"),
            Law("distortion", "power"),
            Law("distortion", "exponential", over="bits"),
            Law("reconstruction", "power"),
            Law("process_s", "linear"),
        ),
        cautions=_below_enough,
    ),
    "prior": Task(
        columns={
            "num_codes": "{:,.0f}", "loss": "{:.4f}", "perplexity": "{:,.1f}", "accuracy": "{:.1%}",
            "unigram": "{:.4f}", "recognised": "{:.1%}", "recognised_real": "{:.1%}", "shapes_distance": "{:.3f}",
            "shapes_distance_real": "{:.3f}", "training loss": "{:.4f}", "training_gflop": "{:.3f}",
            "sampling_gflop": "{:.3f}", "samples_per_s": "{:.1f}", "images_per_s": "{:.0f}",
            "memory_mib": "{:,.0f}", "process_s": "{:.3f}", "code_axis_share": "{:.0%}",
        },
        figures={
            "loss": Figure("loss on held-out ids, nats per id", from_zero=False),
            "perplexity": Figure("perplexity on held-out ids", log=True),
            "accuracy": Figure("share of held-out ids that were the most probable"),
            "recognised": Figure("share of samples that the shapes classifier recognises as their class"),
            "samples_per_s": Figure("samples per second, drawn by one run after the other"),
            "images_per_s": Figure("images per second in training"),
            "process_s": COST,
        },
        verdict=_of_ids,
        logged={"loss": "training loss"},
        pictures="samples/grid.png",
        about_pictures="Samples, a row for each class",
        laws=(Law("loss", "power"), Law("perplexity", "power"), Law("process_s", "linear")),
    ),
}  # fmt: skip


def columns(task: Task, lines: Sequence[Line]) -> dict[str, str]:
    """{key: format} of the table: the name and how it went, and what any run has of its numbers."""
    keys = dict.fromkeys(key for line in lines for key in line if key not in task.columns)
    begun = {key: form for key in keys for start, form in task.measured.items() if key.startswith(start)}
    every = {"run": "{}", "status": "{}", "steps": "{:,.0f}", **task.columns, **begun, "verdict": "{}"}
    return {key: form for key, form in every.items() if any(line.get(key) not in (None, "") for line in lines)}


@dataclass(frozen=True)
class Results:
    """All that a page tells."""

    title: str
    task: Task
    lines: Sequence[Line]
    dials: Sequence[str]
    folders: Mapping[str, Path]
    """of the runs, by name"""
    how: Sequence[str]
    """texts on how it was made"""

    @cached_property
    def fitted(self) -> list[Fitted]:
        return laws.fitted(self.task.laws, self.lines, self.dials)


def write(place: Path, results: Results) -> Path:
    """Write PLACE/figures and PLACE/index.html."""
    task, lines, fitted = results.task, results.lines, results.fitted
    shown = _pictures(task, results.folders)
    told = [how_many(lines), *task.cautions(lines)]
    parts = [
        ("Results", page.paragraphs(told) + page.table(lines, columns(task, lines)) + _failures(lines)),
        ("Figures", page.paragraphs([BANDS]) + "".join(_figures(place / "figures", results, fitted))),
        *([("Laws", page.table([law.line for law in fitted], LAWS) + page.paragraphs([laws.ABOUT]))] if fitted else []),
        *([(task.about_pictures, page.side_by_side(shown))] if shown else []),
        ("How", page.blocks(results.how)),
    ]
    path = place / "index.html"
    files.write(path, page.page(f"Study {results.title}", parts))
    return path


LAWS = laws.COLUMNS
BANDS = (
    "Over a dial of numbers a point is the mean of its seeds, the band goes from the least to the greatest of them, "
    "and dots are the laws that are fitted below."
)


def how_many(lines: Sequence[Line]) -> str:
    """How many runs are done, and how the others are: those that failed by name."""
    found = Counter(str(line["status"]) for line in lines)
    failed = ", ".join(str(line["run"]) for line in lines if line["status"] == "failed")
    others = [f"{count} {status}" + f" ({failed})" * (status == "failed") for status, count in found.items()]
    return f"Of {len(lines)} runs are: {', '.join(others)}."


def _failures(lines: Sequence[Line]) -> str:
    return page.paragraphs((f"{line['run']}: {line['error']}" for line in lines if line.get("error")), failed=True)


def _figures(folder: Path, results: Results, fitted: Sequence[Fitted]) -> list[str]:
    folder.mkdir(exist_ok=True)
    drawn = []
    for key, figure in results.task.figures.items():
        own = {
            each.curve: each.fit.at
            for each in fitted
            if (each.law.of, each.law.over) == (key, figure.over) and each.fit
        }
        chart, path = page.chart(figure, results.lines, key, results.dials, own), folder / f"{key}.png"
        if chart is not None:
            files.write(path, chart)
            drawn.append(page.picture(path, figure.caption, chart=True))
    return drawn


def _pictures(task: Task, folders: Mapping[str, Path]) -> dict[str, Path]:
    found = {name: sorted(folder.glob(task.pictures)) if task.pictures else [] for name, folder in folders.items()}
    return {name: paths[-1] for name, paths in found.items() if paths}


def text(task: Task, lines: Sequence[Line]) -> str:
    """The table for a terminal."""
    return aligned(lines, columns(task, lines))


def aligned(lines: Sequence[Line], columns: Mapping[str, str]) -> str:
    """A table of these columns, {key: format}, in letters of one width."""
    rows = [list(columns), *([page.cell(line.get(key), form) for key, form in columns.items()] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{word:<{width}}" for word, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def result(task: Task, summary: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a run that is done, with what follows from them and the verdict; `row` is its last logged step."""
    line = dict(summary) | {name: row[key] for key, name in task.logged.items() if key in row}
    line |= task.derived(line)
    return line | {"verdict": task.verdict(line)}
