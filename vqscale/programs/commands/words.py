"""What the command lines share: their parser, CONFIG and key=value, numbers, and how a command is written down."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

CHANGE = re.compile(r"[^/]*=")  # a path may have an equals sign in it, after a slash


def parser(about: str | None) -> argparse.ArgumentParser:
    """A parser with the text of a module, named as the program was started: `vqscale encode`, or encode.py."""
    return argparse.ArgumentParser(
        prog=Path(sys.argv[0]).name, description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def config_and_changes(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """(CONFIG if there is one, the key=value words that change its keys); ValueError for anything else."""
    changes = [word for word in words if CHANGE.match(word)]
    files = [word for word in words if word not in changes]
    options = [word for word in files if word.startswith("-")]
    if options or len(files) > 1:
        raise ValueError(
            f"{' '.join(options or files[1:])} is neither an option nor key=value, and there is one CONFIG "
            "(where its path has an = before any /, put ./ before it): see --help"
        )
    return (Path(files[0]) if files else None), changes


def add_processes(parser: argparse.ArgumentParser) -> None:
    """--device and --timeout-s of the programs whose processes meet."""
    devices, wait = ["auto", "cpu", "cuda"], "seconds that processes wait for each other (default: 600)"
    parser.add_argument("--device", choices=devices, default="auto", help="auto takes a GPU per process if there are")
    parser.add_argument("--timeout-s", type=float, default=600.0, help=wait)


def add_weights(parser: argparse.ArgumentParser, whose: str = "a run") -> None:
    """--weights, which of the two that a training leaves."""
    said = f"of {whose}: moving averages, where it has them (default), or parameters"
    parser.add_argument("--weights", choices=["average", "parameters"], default="average", help=said)


def add_codes(parser: argparse.ArgumentParser, what: str = "codebook") -> None:
    """--codes, which processes.divide checks."""
    said = f"processes that share the {what} (default: 1)"
    parser.add_argument("--codes", type=int, default=1, help=said)


def count(text: str) -> int:
    """A number of things, as the type of an option."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number of things, which begins at 1")
    return value


def number(text: str) -> int:
    """A number of things of which there may be none, as the type of an option."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0: give 0 or more")
    return value


def time(text: str) -> float:
    """How long something takes, in the unit of its option: a number that has an end, 0 or more."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{value:g} is no time: give a number, 0 or more")
    return value


def made_by(name: str) -> dict[str, object]:
    """Which code a result was made by, and by which command."""
    from vqscale.run import checkout, folder

    return {"commit": folder.commit(), "versions": folder.versions(), "command": checkout.command(name, sys.argv[1:])}
