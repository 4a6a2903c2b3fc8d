"""Measure a prior under several sampling settings: FID, Inception score, sFID, precision and recall over its dials.

    vqscale sweep PRIOR TOKENIZER OUT --guidance 1,1.5,2 --temperature 0.9,1.0 \\
        --reference VIRTUAL_imagenet256_labeled.npz --inception pt_inception-2015-12-05-6726825d.pth

Every combination of the lists draws --num-images images (`vqscale sample` says how), measured as `vqscale evaluate
samples` says; the dials are those of the prior in PRIOR. OUT gets sweep.json, sweep.csv and sweep.png, written
again after every setting; a setting that is measured is not measured again, so the same command goes on, on any number
of processes; TERM, USR1, USR2 or a file STOP in OUT end it with status 75. The whole table is kept, with what other
commands measured in OUT at other settings of the dials: the best of many, chosen on the very reference, is not a number
to publish without it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqscale.programs.commands import drawing
from vqscale.run import checkout, processes

if TYPE_CHECKING:
    from vqscale.parallel.mesh import Mesh
    from vqscale.programs.sampling.request import SampleRequest


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 failed on the way, 2 the user's input, 75 stopped on request."""
    given = sys.argv[1:] if argv is None else list(argv)
    return processes.status_of(lambda: _sweep(arguments(given), checkout.command("sweep", given)))


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """As drawing.arguments."""
    return drawing.arguments(_parser(), given, _problems)


def _sweep(args: argparse.Namespace, command: str) -> int:
    from vqscale.run.folder import EXIT_STOPPED

    with processes.joined(args.device, args.grid, args.timeout_s) as mesh:
        told, missing = _measure(args, command, mesh)
    if mesh.world.rank == 0:
        print(told, flush=True)
    return EXIT_STOPPED if missing else 0


def _measure(args: argparse.Namespace, command: str, mesh: Mesh) -> tuple[str, int]:
    """(what to say at the end, how many settings are missing)."""
    from vqscale.nets.inception import load
    from vqscale.programs.sampling import draw as sample
    from vqscale.programs.sampling import sweep

    prior, tokenizer = sample.models(args, mesh)
    every = _requests(args, sample.classes_of(prior, args.classes))
    sample.remark((line for one in every for line in prior.remarks(one.how)), mesh)
    network = load(args.inception, args.inception_sha256).to(mesh.device)
    scoring, about = sweep.Scoring(network, args.reference), {"command": command}
    table, missing = sweep.sweep(prior, tokenizer, scoring, args.out, mesh, every, about=about, keep=args.keep)
    left = f"\nstopped after {len(every) - missing} of {len(every)} settings: the same command goes on"
    return f"{table.text()}\n{args.out}: sweep.json, sweep.csv, sweep.png{left * bool(missing)}", missing


def _problems(args: argparse.Namespace, classes: tuple[int, ...]) -> list[str]:
    """All that is wrong with the settings and the files, as far as can be seen without a model."""
    from vqscale.programs.sampling.request import noted

    found = list[str]()
    with noted(found):
        _requests(args, classes)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if 0 < args.num_images < world:
        found.append(
            f"--num-images {args.num_images} is less than the {world} processes that were started, of which each "
            "measures a part: give more images, or start fewer"
        )
    for option, path, what in (
        ("reference", args.reference, "an npz of ADM, or of `vqscale evaluate statistics`"),
        ("inception", args.inception, "pt_inception-2015-12-05-6726825d.pth"),
    ):
        if not path.is_file():
            why = "is no file" if path.exists() else f"does not exist (looked from {Path.cwd()})"
            found.append(f"--{option} {path} {why}, and nothing is downloaded: give the path of {what}")
    return found


def _requests(args: argparse.Namespace, classes: tuple[int, ...]) -> list[SampleRequest]:
    from vqscale.programs.sampling import options as sample_options
    from vqscale.programs.sampling.request import SampleRequest, combinations

    usual, values = sample_options.dials(args)
    return combinations(SampleRequest(args.num_images, classes, usual, args.seed, args.batch, args.resize), values)


def _parser() -> argparse.ArgumentParser:
    parser = drawing.parser(__doc__, "folder of the table: new, or begun by the same command", lists=True)
    add: Any = parser.add_argument
    add("--reference", required=True, type=Path, help="npz with mu, sigma, mu_s, sigma_s, arr_0, or some of them")
    add("--inception", required=True, type=Path, help="weights of FID's Inception, a path")
    add("--inception-sha256", default="6726825d", help='how its sha256 begins; "any" takes every file')
    add("--num-images", type=int, default=50_000, help="images of every setting (default: 50000, as is published)")
    add("--keep", action="store_true", help="keep samples.npz of every setting")
    return parser
