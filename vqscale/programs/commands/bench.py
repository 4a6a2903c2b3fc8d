"""The benchmark by the name `vqscale bench`: tools/bench of the checkout, vqscale_bench of an installed wheel."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from vqscale.run.checkout import checkout


def main(argv: Sequence[str] | None = None) -> int:
    status: int = subcommand("__main__").main(sys.argv[1:] if argv is None else list(argv))
    return status


def subcommand(name: str) -> Any:
    """A module of the benchmark."""
    root = checkout()
    if root is None:
        return import_module(f"vqscale_bench.{name}")
    tools = str(root / "tools")  # on the path, which processes get that are started anew
    if tools not in sys.path:
        sys.path.insert(0, tools)
    return import_module(f"bench.{name}")
