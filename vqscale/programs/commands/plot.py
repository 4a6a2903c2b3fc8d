"""Draw curves of one or several runs over their steps: a panel for each key, a line for each run.

    vqscale plot RUN [RUN ...] --keys codes/usage,codes/perplexity,val/psnr --out usage.png
    vqscale plot RUN --keys loss,val/psnr --keep curves.csv          keep the curves of a run, to compare others with
    vqscale plot RUN --against curves.csv [--within 0.05]            is this run like the one whose curves were kept?

RUN is a run folder, finished or not; keys are those of the rows of its metrics.jsonl. What was not finite is a gap.
With --against the keys are those of the file, its curves are drawn too, and the means over each quarter of its steps
are compared: exit status 1 where one differs by more than the share --within. Quarters that the run has not come
through are left out.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vqscale.config.text import data_of
from vqscale.disk import files
from vqscale.programs.commands import words
from vqscale.run import processes
from vqscale.show.curves import Curve, apart, keep, kept

KEYS = "codes/usage,codes/perplexity,val/psnr"
PANEL_INCHES = (5.0, 3.4)
MOST_MARKED = 30  # points of a curve that are still marked one by one


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the picture is there, 1 failed on the way or unlike --against, 2 the user's input."""
    return processes.status_of(lambda: _plot(arguments(sys.argv[1:] if argv is None else argv)))


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked as far as no file is needed; ValueError where there is no key."""
    args = _parser().parse_args(given)
    names = args.keys
    args.keys = [key.strip() for key in names.split(",") if key.strip()]
    if not args.keys:
        raise ValueError(f"--keys {names!r} names no key: give some, such as --keys {KEYS}")
    if (args.keep or args.against) and len(args.runs) > 1:
        raise ValueError(f"--keep and --against are about one run, and {len(args.runs)} are given: give one")
    if args.within < 0:
        raise ValueError(f"--within is {args.within}: give a share of 0 or more, such as 0.05")
    return args


def _plot(args: argparse.Namespace) -> int:
    runs = dict(zip(labels(args.runs), map(rows, args.runs), strict=True))
    if args.against is not None:
        return _compare(args, *runs.popitem())
    curves = {key: {label: curve(found, key) for label, found in runs.items()} for key in args.keys}
    _check(curves, runs)
    if args.keep is not None:
        keep({key: line for key, lines in curves.items() for line in lines.values()}, args.keep)
        print(args.keep)
        return 0
    draw(curves, args.out)
    for key, lines in curves.items():
        without = [label for label, (steps, _) in lines.items() if not steps]
        if without:
            print(f"warning: {key} is not there, or has no row yet, in {', '.join(without)}", file=sys.stderr)
    print(args.out)
    return 0


def _compare(args: argparse.Namespace, label: str, found: Sequence[dict[str, Any]]) -> int:
    """Draw a run beside kept curves and say how far each is from its own; 1 where one is too far."""
    others = kept(args.against)
    own = {key: curve(found, key) for key in others}
    _check({key: {label: line} for key, line in own.items()}, {label: list(found)})
    far = 0
    for key, other in others.items():
        result = apart(key, own[key], other)
        if result is None:
            print(f"{key}: not yet, the run has not come through the first quarter of the kept steps")
            continue
        like = result.most <= args.within
        far += not like
        print(f"{key}: {'alike' if like else 'DIFFERENT'}, at most {result.most:.1%} apart; {result}")
    draw({key: {args.against.name: other, label: own[key]} for key, other in others.items()}, args.out)
    print(args.out)
    return 1 if far else 0


def _parser() -> argparse.ArgumentParser:
    parser = words.parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--keys", default=KEYS, help=f"keys of metrics.jsonl, a panel each (default: {KEYS})")
    parser.add_argument("--keep", type=Path, metavar="CSV", help="write the curves of the run there, draw nothing")
    parser.add_argument("--against", type=Path, metavar="CSV", help="kept curves to compare those of the run with")
    parser.add_argument("--within", type=float, default=0.05, help="the share that may differ (default: 0.05)")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="picture (default: curves.png)")
    return parser


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; a last line without an end is that of a run that writes it, or died there."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run} is no run folder, it has no metrics.jsonl: give what run.folder in the config names")
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            found.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number} is no row of metrics ({error}): remove the line, or the run") from None
    return found


def curve(found: Sequence[dict[str, Any]], key: str) -> Curve:
    """(steps, values) of the rows that have the key; nan where the value was not finite."""
    points = [(row["step"], row[key]) for row in found if key in row]
    return [step for step, _ in points], [math.nan if value is None else float(value) for _, value in points]


def labels(runs: Sequence[Path]) -> list[str]:
    """`quantizer folder` for each run, the folder with as much of its path as tells them apart."""
    places = [run.resolve() for run in runs]
    if len(set(places)) < len(places):
        raise ValueError(f"the same run is given twice: {', '.join(map(str, runs))}: give each once")
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return [f"{quantizer(place)} {Path(*place.parts[-depth:])}".strip() for place in places]


def quantizer(run: Path) -> str:
    """The name of the run's quantizer; nothing where its run.yaml does not say one."""
    try:
        return str(data_of(run / "run.yaml")["tokenizer"]["quantizer"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _check(curves: dict[str, dict[str, Curve]], runs: dict[str, list[dict[str, Any]]]) -> None:
    """ValueError that names what there is when a key is in none of the runs."""
    known = sorted({key for found in runs.values() for row in found for key in row} - {"step"})
    for key, lines in curves.items():
        if any(steps for steps, _ in lines.values()):
            continue
        near = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"no row of {', '.join(runs)} has the key {key}: {hint}change --keys; there are "
            f"{', '.join(known) or 'no rows yet'}"
        )


def draw(curves: dict[str, dict[str, Curve]], out: Path) -> None:
    """Write the picture; the kind of file is that of its suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # lazily: --help and errors need none of it
    from matplotlib.figure import Figure

    kinds = FigureCanvasAgg.get_supported_filetypes()
    if out.suffix.removeprefix(".") not in kinds:
        raise ValueError(f"--out {out} has no suffix of a picture: use one of {', '.join(sorted(kinds))}")
    columns = min(len(curves), 3)
    lines = -(-len(curves) // columns)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(columns * width, lines * height), dpi=120, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for panel, (key, runs) in zip(panels, curves.items(), strict=False):
        for number, (label, (steps, values)) in enumerate(runs.items()):
            marker = "o" if 0 < len(steps) <= MOST_MARKED else ""
            panel.plot(steps, values, label=label, marker=marker, markersize=3, color=f"C{number % 10}")
        panel.set(title=key, xlabel="step")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    for panel in list(figure.axes)[len(curves) :]:
        panel.remove()
    figure.axes[0].legend(fontsize="small")
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.writing(out) as file:
        figure.savefig(file, format=out.suffix.removeprefix("."))
