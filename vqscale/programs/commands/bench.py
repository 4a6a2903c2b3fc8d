"""The benchmark by the name `vqscale bench`: tools/bench of the checkout, vqscale_bench of an installed wheel."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from vqscale.run.checkout import checkout


def main(argv: Sequence[str] | None = None) -> int:
    root, name = checkout(), "vqscale_bench"
    if root is not None:  # by a name that processes find which are started anew: they get this path
        sys.path.insert(0, str(root / "tools"))
        name = "bench"
    status: int = import_module(f"{name}.__main__").main(sys.argv[1:] if argv is None else list(argv))
    return status
