"""The command `vqscale NAME ...`, also as `python -m vqscale` and `torchrun -m vqscale`: starts one of the programs."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module, metadata

from vqscale.programs.commands import COMMANDS


def main(argv: Sequence[str] | None = None) -> int:
    """The status of the program that is named; 2 where none is, or an unknown one."""
    given = sys.argv[1:] if argv is None else list(argv)
    if not given or given[0] in ("-h", "--help"):
        print(overview())
        return 0 if given else 2
    if given[0] == "--version":
        print(metadata.version("vqscale"))
        return 0
    name, *rest = given
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        print(f"error: no program is named {name!r}: {hint}There are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv = [f"vqscale {name}", *rest]  # how a program names itself and its command
    status: int = import_module(f"vqscale.programs.commands.{COMMANDS[name][0]}").main(rest)
    return status


def overview() -> str:
    lines = [f"  {name:12}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "vqscale PROGRAM ...: tokenizers with very large codebooks, and priors over their ids",
            "",
            *lines,
            "",
            "vqscale PROGRAM --help says more. On 8 processes: torchrun --nproc_per_node=8 -m vqscale PROGRAM ...",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
