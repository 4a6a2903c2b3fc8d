"""Starts a subcommand of the benchmark, and does nothing else; each is a file of this folder."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

if not __package__:  # python tools/bench: this folder is on the path, where the one above and the checkout should be
    HERE = Path(__file__).resolve().parent
    sys.path[:1] = [str(HERE.parents[1]), str(HERE.parent)]
    __package__ = HERE.name
    import_module(__package__)

SUBCOMMANDS = (
    "codes",
    "data",
    "gpu",
    "head",
    "kernels",
    "memory",
    "quickstart",
    "rounding",
    "sample",
    "save",
    "upkeep",
)


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(sys.modules[__package__].__doc__)
        return 0 if argv else 2
    if argv[0] not in SUBCOMMANDS:
        known = ", ".join(SUBCOMMANDS)
        print(f"error: there is no subcommand {argv[0]!r}, the first argument: use {known}", file=sys.stderr)
        return 2
    from vqscale.run import processes  # here, because this file finds the checkout first

    return processes.status_of(lambda: import_module(f".{argv[0]}", __package__).main(argv[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
