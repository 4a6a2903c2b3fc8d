"""Measure this checkout on this machine: ours beside what people run today, and beside the floor.

    python tools/bench.py codes --tokens 1024 --codes 65536 --dim 256      search and one IBQ training step
    python tools/bench.py data  ...                                        the data stream
    python tools/bench.py head  --codes 16384 65536 262144                 loss and sampling of a prior's head
    python tools/bench.py memory --codes 4096 65536 1048576                a training step's memory as K grows

`bench.py codes --help` has the options of a subcommand. This file only dispatches: bench_codes.py, bench_data.py,
bench_head.py and bench_memory.py are the subcommands.
"""

from __future__ import annotations

import sys
from importlib import import_module

SUBCOMMANDS = {"codes": "bench_codes", "data": "bench_data", "head": "bench_head", "memory": "bench_memory"}


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if argv else 2
    if argv[0] not in SUBCOMMANDS:
        known = ", ".join(SUBCOMMANDS)
        print(f"bench.py: there is no subcommand {argv[0]!r}, the first argument: use {known}", file=sys.stderr)
        return 2
    status: int = import_module(SUBCOMMANDS[argv[0]]).main(argv[1:])
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
