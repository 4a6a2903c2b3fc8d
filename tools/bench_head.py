"""`bench.py head`: loss and sampling of a prior's head, ours beside what torch and others have, and beside the floor.

This file reads the arguments, starts the processes and prints; bench_head_forms.py is what is run, bench_measure.py how
it is measured.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from bench_codes import TIMEOUT_S, commit, cores, machine, no_device

if TYPE_CHECKING:
    from bench_head_forms import Setting
    from bench_measure import Cost

ABOUT = """\
The loss of a head (mean cross entropy, forward and backward to the tokens and the rows) and one draw of ids, for each
K of --codes. Forms that start from the same numbers and take turns:

  ours    Head.loss and Head.sample, in blocks, the rows split over the processes; float32 products
  bf16    Head.loss with products: bf16 (tokens and rows rounded for the products, the rest float32)
  top-p   Head.sample with top-p 0.9
  dense   F.cross_entropy(F.linear(h, rows)); softmax of all logits and torch.multinomial
  torch   F.linear_cross_entropy of torch 2.13 in chunks, as it chooses them
  cce     the torch_compile form of cut-cross-entropy, the one that runs on a CPU, where the package is installed
  floor   three matrix products as torch.mm in blocks: logits, gradient of h, gradient of the rows

seconds is the median over the repeats, of the slowest process. Peak memory is of one process and beyond its inputs;
the gradients of h and of the rows are in it. Sent bytes are of one process and one run, as a ring sends them.

With --processes M, tokens are per process. Ours shares the K rows; the others are replicas with all K rows, whose
all-reduce of K x D gradients is not run: its bytes are computed."""


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="bench.py head", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("--tokens", type=int, default=1024, help="N, tokens of a loss per process (1024)")
    out.add_argument("--drawn", type=int, default=64, help="tokens of a draw per process (64)")
    out.add_argument(
        "--codes", type=int, nargs="+", default=[2**14, 2**16, 2**18], help="K, one or more (16384 65536 262144)"
    )
    out.add_argument("--dim", type=int, default=256, help="D, width of the model (256)")
    out.add_argument("--processes", type=int, default=1, help="M, processes that share the rows, CPU only (1)")
    out.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (cpu)")
    out.add_argument("--repeats", type=int, default=5, help="timed runs of each form (5)")
    out.add_argument("--threads", type=int, help="threads of each process (cores / processes)")
    out.add_argument("--scan-mib", type=int, default=64, help="memory of our blocks, MiB per process (64)")
    out.add_argument(
        "--max-dense-gib",
        type=float,
        default=8.0,
        help="leave out the forms that may hold all logits where they would need more than this (8)",
    )
    out.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return out


def problems(args: argparse.Namespace) -> Iterable[str]:
    """What is wrong with the arguments, each as the rule, where it came from and what to change."""
    for key in ("tokens", "drawn", "codes", "dim", "processes", "repeats", "threads", "scan_mib"):
        values = getattr(args, key)
        flag = "--" + key.replace("_", "-")
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < 1:
                yield f"{key} is {value} and must be at least 1; it comes from {flag}: give 1 or more"
    if args.drawn > args.tokens:
        yield f"{args.drawn} tokens are drawn of {args.tokens}; it comes from --drawn: give at most --tokens"
    if args.device == "cuda" and args.processes > 1:
        yield (
            f"{args.processes} processes need a device each and are started on a CPU only, but --device is cuda: "
            "use --processes 1 or --device cpu"
        )


def main(argv: list[str]) -> int:
    out = parser()
    args = out.parse_args(argv)
    if missing := no_device(args.device):
        out.error(missing)
    if wrong := list(problems(args)):
        out.error("\n".join(wrong))
    from bench_forms import Setting as Machine  # what `machine` is asked with

    settings, left_out = settle(args)
    for note in left_out:
        print(f"bench.py head: {note}", file=sys.stderr)
    report = {
        "head": {str(setting.codes): run(setting) for setting in settings},
        "left_out": left_out,
        "machine": machine(Machine(args.tokens, 1, args.dim, device=args.device, threads=settings[0].threads)),
        "commit": commit(),
        "command": shlex.join(["python", "tools/bench.py", "head", *argv]),
        "config": {**asdict(settings[0]), "codes": args.codes, "max_dense_gib": args.max_dense_gib},
    }
    print(json.dumps(report) if args.json else table(report))
    return 0


def settle(args: argparse.Namespace) -> tuple[list[Setting], list[str]]:
    """(what will be measured for each K, what is left out and why)."""
    from bench_head_forms import LOSSES, SAMPLES, Setting, dense_memory, missing

    absent = missing()
    notes = [f"{name} is left out: {reason}" for name, reason in absent.items()]
    settings = []
    for codes in args.codes:
        setting = Setting(
            tokens=args.tokens,
            codes=codes,
            dim=args.dim,
            drawn=args.drawn,
            processes=args.processes,
            device=args.device,
            repeats=args.repeats,
            threads=args.threads or max(1, cores() // args.processes),
            scan_mib=args.scan_mib,
        )
        big: set[str] = set()
        if (need := dense_memory(setting)) > args.max_dense_gib * 2**30:
            big = {"dense", "cce"}
            notes.append(
                f"dense and cce are left out for {codes} codes: they need about {need / 2**20:.1f} MiB, more than the "
                f"{args.max_dense_gib:g} GiB of --max-dense-gib"
            )
        losses = tuple(name for name in LOSSES if name not in absent and name not in big)
        settings.append(replace(setting, losses=losses, samples=tuple(name for name in SAMPLES if name not in big)))
    return settings, notes


def run(setting: Setting) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure on all processes and merge: {"loss": {form: costs}, "sample": {form: costs}}."""
    from bench_head_forms import measure

    if setting.device == "cuda":
        ranks = [measure(setting)]
    else:
        from vqscale.parallel import spawn

        ranks = spawn.run(measure, setting.processes, setting, timeout_s=TIMEOUT_S)
    return {work: merge([rank[work] for rank in ranks], work, setting) for work in ("loss", "sample")}


def merge(ranks: list[dict[str, Cost]], work: str, setting: Setting) -> dict[str, dict[str, Any]]:
    """The costs of all processes as one: a repeat lasts as long as its slowest process."""
    from bench_head_forms import dense_bytes

    out: dict[str, dict[str, Any]] = {}
    for name in ranks[0]:
        costs = [rank[name] for rank in ranks]
        peaks = [cost.peak_bytes for cost in costs if cost.peak_bytes is not None]
        replica = work == "loss" and name in ("dense", "torch", "cce")
        out[name] = {
            "seconds": median(max(repeat) for repeat in zip(*(cost.seconds for cost in costs), strict=True)),
            "peak_bytes": max(peaks, default=None),
            "sent_bytes": dense_bytes(setting) if replica else max(cost.sent_bytes for cost in costs),
        }
    return out


def table(report: dict[str, Any]) -> str:
    from bench_head_forms import PRODUCTS

    config, host = report["config"], report["machine"]
    lines = [
        f"{config['tokens']} tokens per process, dim {config['dim']}, {config['drawn']} drawn; "
        f"{config['processes']} x {host['threads']} threads",
        f"{host.get('gpu') or host['cpu']}, {host['cores']} cores, torch {host['torch']}, commit {report['commit']}",
        "",
        f"{'codes':>8} {'':14}{'seconds':>10}{'/ floor':>9}{'peak MiB':>11}{'sent MiB':>11}",
    ]
    for codes, works in report["head"].items():
        for work, forms in works.items():
            floor = works["loss"]["floor"]["seconds"] if work == "loss" else None
            for name, row in forms.items():
                ratio = f"{row['seconds'] / floor:9.2f}" if floor else f"{'-':>9}"
                peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.2f}"
                sent = f"{row['sent_bytes'] / 2**20:.2f}"
                lines.append(f"{codes:>8} {work:7}{name:7}{row['seconds']:10.4f}{ratio}{peak:>11}{sent:>11}")
    lines.append(f"floor: {len(PRODUCTS)} of 2 N K D operations: {', '.join(PRODUCTS)}")
    return "\n".join(lines)
