"""`bench memory`: the peak extra memory of one IBQ training step for several K, ours beside the dense form.

This file reads the arguments and prints; what is run and how it is measured is that of `bench codes`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from . import command
from .setting import Setting

ABOUT = """\
Peak memory of one IBQ training step (forward with all losses, backward to tokens and rows), of one process and beyond
its inputs, for each K of --codes:

  rows             this process's rows, which are an input; their gradient takes as much again
  ours             vqscale, the gradient of the rows included
  without it       ours less the gradient of the rows: what a step needs beside parameters and gradients
  dense            the same step with tensors of tokens x codes, its gradient of the rows included
  tokens x codes   one such tensor

--tokens are per process; ours splits the rows over --processes, dense holds all of them in each."""


def _parser() -> argparse.ArgumentParser:
    out = command.parser("memory", ABOUT)
    powers = [2**n for n in range(12, 21, 2)]
    out.add_argument("--codes", type=int, nargs="+", default=powers, help="K, one or more (4096 16384 .. 1048576)")
    out.add_argument("--tokens", type=int, default=1024, help="N, tokens per process (1024)")
    out.add_argument("--dim", type=int, default=64, help="D, dimension of a code (64)")
    out.add_argument("--entropy", action="store_true", help="with the entropy loss, temperature 0.01 as released")
    command.add_options(out)
    return out


def problems(args: argparse.Namespace) -> Iterable[str]:
    return command.problems(args, "tokens", "codes", "dim")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    return command.parse(_parser(), argv, problems)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    found = [run(setting) for setting in choose(args)]
    report = {"memory": found} | command.origin("memory", argv, args.device, command.threads(args))
    report["config"] = {**vars(args), "threads": command.threads(args)}
    print(json.dumps(report) if args.json else table(report))
    return 0


def choose(args: argparse.Namespace) -> list[Setting]:
    """A setting for each K; says on stderr where the dense form is left out, and why."""
    from .forms import dense_memory

    out = []
    for codes in args.codes:
        setting = Setting(
            tokens=args.tokens,
            codes=codes,
            dim=args.dim,
            entropy=args.entropy,
            processes=args.processes,
            device=args.device,
            repeats=0,
            threads=command.threads(args),
            scan_mib=args.scan_mib,
            works=("step",),
            dense=("step",),
        )
        need = dense_memory(setting)["step"]
        if need > args.max_dense_gib * 2**30:
            setting = replace(setting, dense=())
            print(
                f"bench memory: dense is left out for {codes} codes: it needs about {need / 2**20:.1f} MiB, more "
                f"than the {args.max_dense_gib:g} GiB of --max-dense-gib",
                file=sys.stderr,
            )
        out.append(setting)
    return out


def run(setting: Setting) -> dict[str, Any]:
    """Bytes for one K, of the process that needs most; None where nobody counts or a form is left out."""
    from vqscale.codes.rows import Rows

    from .measure import peaks

    ranks = command.everywhere(peaks, setting)
    most = {name: max((rank[name] or 0 for rank in ranks), default=0) or None for name in ranks[0]}
    last = Rows(setting.codes, setting.processes, setting.processes - 1)  # no rank has more rows
    rows, ours = last.count * setting.dim * setting.item_bytes, most["ours"]
    return {
        "codes": setting.codes,
        "rows": rows,
        "ours": ours,
        "without_gradient": None if ours is None else max(0, ours - rows),
        "dense": most.get("dense"),
        "pairs": setting.tokens * setting.codes * setting.item_bytes,
    }


COLUMNS = ("rows", "ours", "without_gradient", "dense", "pairs")


def table(report: dict[str, Any]) -> str:
    config = report["config"]
    heads = ("rows", "ours", "without it", "dense", "tokens x codes")
    lines = [
        f"MiB of one IBQ step: {config['tokens']} tokens per process, dim {config['dim']}, float32, "
        f"{'with' if config['entropy'] else 'without'} entropy; {config['processes']} x {config['threads']} threads",
        command.place(report),
        "",
        f"{'codes':>10}" + "".join(f"{head:>16}" for head in heads),
    ]
    for row in report["memory"]:
        lines.append(f"{row['codes']:>10}" + "".join(_mib(row[name]) for name in COLUMNS))
    return "\n".join(lines)


def _mib(value: int | None) -> str:
    return f"{'-':>16}" if value is None else f"{value / 2**20:16.1f}"
