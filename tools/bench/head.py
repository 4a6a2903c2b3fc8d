"""`bench head`: loss and sampling of a prior's head, ours beside what torch and others have, and beside the floor.

This file reads the arguments and prints; command.py is what subcommands share, head_forms.py what is run,
measure.py how it is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from . import command
from .setting import LOSSES, SAMPLES, HeadSetting

if TYPE_CHECKING:
    from .measure import Cost

ABOUT = """\
The loss of a head (mean cross entropy, forward and backward to the tokens and the rows) and one draw of ids, for each
K of --codes. Forms that start from the same numbers and take turns:

  ours    Head.weighted and Head.sample, in blocks, the rows split over the processes; float32 products, three of a loss
  bf16    Head.weighted with products: bf16 (tokens and rows rounded for the products, the rest float32)
  twice   Head.loss, which makes the logits once more in the backward pass: four products, less memory
  top-p   Head.sample with top-p 0.9
  dense   F.cross_entropy(F.linear(h, rows)); softmax of all logits and torch.multinomial
  torch   F.linear_cross_entropy of torch 2.13 in chunks, as it chooses them
  cce     cut-cross-entropy where the package is installed, on a CPU its torch_compile form
  quack   QuACK's chunked loss where the package is installed, which is for GPUs
  floor   three matrix products as torch.mm in blocks: logits, gradient of h, gradient of the rows

seconds is the median over the repeats, of the slowest process; cpu s is processor time, of all its threads, which other
work on the machine disturbs least. Peak memory is of one process and beyond its inputs;
the gradients of h and of the rows are in it. Sent bytes are of one process and one run, as a ring sends them.

With --processes M, tokens are per process. Ours shares the K rows; the others are replicas with all K rows, whose
all-reduce of K x D gradients is not run: its bytes are computed."""


def _parser() -> argparse.ArgumentParser:
    out = command.parser("head", ABOUT)
    out.add_argument("--tokens", type=int, default=1024, help="N, tokens of a loss per process (1024)")
    out.add_argument("--drawn", type=int, default=64, help="tokens of a draw per process (64)")
    out.add_argument(
        "--codes", type=int, nargs="+", default=[2**14, 2**16, 2**18], help="K, one or more (16384 65536 262144)"
    )
    out.add_argument("--dim", type=int, default=256, help="D, width of the model (256)")
    out.add_argument("--repeats", type=int, default=5, help="timed runs of each form (5)")
    out.add_argument(
        "--losses", nargs="+", choices=LOSSES, default=list(LOSSES), help="forms of the loss, and the floor (all)"
    )
    command.add_options(out)
    return out


def problems(args: argparse.Namespace) -> Iterable[str]:
    """What is wrong with the arguments, each as the rule, where it came from and what to change."""
    yield from command.problems(args, "tokens", "drawn", "codes", "dim", "repeats")
    if args.drawn > args.tokens:
        yield f"{args.drawn} tokens are drawn of {args.tokens}; it comes from --drawn: give at most --tokens"


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    return command.parse(_parser(), argv, problems)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    settings, left_out = choose(args)
    for note in left_out:
        print(f"bench head: {note}", file=sys.stderr)
    report = {
        "head": {str(setting.codes): run(setting) for setting in settings},
        "left_out": left_out,
        **command.origin("head", argv, args.device, settings[0].threads),
        "config": {**asdict(settings[0]), "codes": args.codes, "max_dense_gib": args.max_dense_gib},
    }
    print(json.dumps(report) if args.json else table(report))
    return 0


def choose(args: argparse.Namespace) -> tuple[list[HeadSetting], list[str]]:
    """(what will be measured for each K, what is left out and why)."""
    from .head_forms import dense_memory, missing

    absent = missing(args.device)
    notes = [f"{name} is left out: {reason}" for name, reason in absent.items()]
    settings = []
    for codes in args.codes:
        setting = HeadSetting(
            tokens=args.tokens,
            codes=codes,
            dim=args.dim,
            drawn=args.drawn,
            processes=args.processes,
            device=args.device,
            repeats=args.repeats,
            threads=command.threads(args),
            scan_mib=args.scan_mib,
        )
        big: set[str] = set()
        if (need := dense_memory(setting)) > args.max_dense_gib * 2**30:
            big = {"dense", "cce"}
            notes.append(
                f"dense and cce are left out for {codes} codes: they need about {need / 2**20:.1f} MiB, more than the "
                f"{args.max_dense_gib:g} GiB of --max-dense-gib"
            )
        asked = {*args.losses, "floor"}
        losses = tuple(name for name in LOSSES if name in asked and name not in absent and name not in big)
        settings.append(replace(setting, losses=losses, samples=tuple(name for name in SAMPLES if name not in big)))
    return settings, notes


def run(setting: HeadSetting) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure on all processes and merge: {"loss": {form: costs}, "sample": {form: costs}}."""
    from .head_forms import measure

    ranks = command.everywhere(measure, setting)
    return {work: merge([rank[work] for rank in ranks], work, setting) for work in ("loss", "sample")}


def merge(ranks: list[dict[str, Cost]], work: str, setting: HeadSetting) -> dict[str, dict[str, Any]]:
    """The costs of all processes as one."""
    from .head_forms import dense_bytes

    out: dict[str, dict[str, Any]] = {}
    for name in ranks[0]:
        out[name] = command.joined([rank[name] for rank in ranks])
        if work == "loss" and name in ("dense", "torch", "cce", "quack"):
            out[name]["sent_bytes"] = dense_bytes(setting)
    return out


def table(report: dict[str, Any]) -> str:
    from .head_forms import PRODUCTS

    config = report["config"]
    lines = [
        f"{config['tokens']} tokens per process, dim {config['dim']}, {config['drawn']} drawn; "
        f"{config['processes']} x {config['threads']} threads",
        command.place(report),
        "",
        f"{'codes':>8} {'':14}{'seconds':>10}{'/ floor':>9}{'cpu s':>10}{'/ floor':>9}{'peak MiB':>11}{'sent MiB':>11}",
    ]
    for codes, works in report["head"].items():
        for work, forms in works.items():
            floor = works["loss"]["floor"] if work == "loss" else None
            for name, row in forms.items():
                times = ""
                for key in ("seconds", "processor_seconds"):
                    times += f"{row[key]:10.4f}" + (f"{row[key] / floor[key]:9.2f}" if floor else f"{'-':>9}")
                peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.2f}"
                sent = f"{row['sent_bytes'] / 2**20:.2f}"
                lines.append(f"{codes:>8} {work:7}{name:7}{times}{peak:>11}{sent:>11}")
    lines.append(f"floor: {len(PRODUCTS)} of 2 N K D operations: {', '.join(PRODUCTS)}")
    return "\n".join(lines)
