"""Train a tokenizer and a prior under attack (kills, stops, TERM, damaged checkpoints, a full disk, other numbers of
processes), and compare where they end with where they end undisturbed.

    vqscale soak                                         two hours of the quickstart's, into runs/soak
    vqscale soak --minutes 20 --steps 200 --seed 1       shorter

What is done follows from the seed. OUT/soak.md tells it as a table, OUT/soak.jsonl as lines of JSON. Rounds go on until
their time is over; in even ones every start has as many processes as the undisturbed training, and the end has to be
equal in every bit, in odd ones starts have 1, 2 or 4, and held-out scores have to agree. A disk is filled where this
user may mount one (root). Status 0: all held; 1: something did not. Linux.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vqscale.programs.commands import words
from vqscale.run import checkout, processes


def main(argv: Sequence[str] | None = None) -> int:
    """0 all held, 1 something did not or failed, 2 the user's input."""
    given = sys.argv[1:] if argv is None else list(argv)
    return processes.status_of(lambda: _soak(arguments(given)))


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked as far as no file is needed."""
    return _parser().parse_args(given)


def _soak(args: argparse.Namespace) -> int:
    from vqscale.programs.soak.rounds import Settings, soak

    if not Path("/proc/self/environ").exists():
        raise ValueError("a soak finds the processes of a training under /proc, which this system has not: use Linux")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: it leaves no process and no disk behind
    given = vars(args) | {"out": args.out.resolve()}
    for name in ("tokenizer", "prior"):
        given[name] = given[name] or checkout.config(f"quickstart/{name}.yaml")
    settings = Settings(**given)
    held = soak(settings, words.made_by("soak"))
    print(f"{'all trainings ended as they should' if held else 'NOT all held'}: {settings.out / 'soak.md'}")
    return 0 if held else 1


def _parser() -> argparse.ArgumentParser:
    parser = words.parser(__doc__)
    add: Any = parser.add_argument
    add("--out", type=Path, default=Path("runs/soak"), help="folder of all that is made (default: runs/soak)")
    add("--tokenizer", type=Path, metavar="CONFIG", help="of the tokenizer (default: the quickstart's)")
    add("--prior", type=Path, metavar="CONFIG", help="of the prior (default: the quickstart's)")
    add("--minutes", type=words.time, default=120.0, help="after which no round begins but the first (default: 120)")
    add("--steps", type=words.count, help="of each training (default: as its config says)")
    add("--attacks", type=words.number, default=12, help="on each training (default: 12)")
    add("--seed", type=int, default=0, help="what is done follows from it (default: 0)")
    add("--processes", type=words.count, default=2, help="of the undisturbed trainings (default: 2)")
    add("--first-round", type=words.number, default=0, help="number of the first one, to do them apart (default: 0)")
    return parser
