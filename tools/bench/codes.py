"""`bench codes`: search and one IBQ training step, ours beside the dense published form and beside the floor.

This file reads the arguments and prints; command.py is what subcommands share, forms.py what is run,
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
from .setting import Setting

if TYPE_CHECKING:
    from .measure import Cost

FORMS = ("ours", "bf16", "released", "dense", "faiss")  # and the floor
WORKS = ("step", "search")

ABOUT = """\
Search (Codebook.nearest) and one IBQ training step (forward with all losses, backward to the tokens and the rows),
each in forms that start from the same numbers and take turns:

  ours      vqscale, in blocks, the rows split over the processes
  bf16      the step with engine.matmul: medium, on CPUs with products in bfloat16; of a search, that product alone,
            which a search by prefilter cannot do without
  released  the training step in plain torch as the released code lays it out: images, codes in dimension 1
  dense     the same on tokens in rows, which is kinder: one-hot products and tensors of tokens x codes, no copies into
            another layout; its search is one product and a maximum
  faiss     search only: IndexFlatIP of faiss-cpu with the same rows and threads; building it is not timed
  floor     the matrix products alone that the result cannot do without, as torch.mm in blocks into one buffer: the
            table names them

seconds is the median over the repeats, of the slowest process. Peak memory is of one process and beyond its inputs;
the gradients of tokens and rows are in it. Sent bytes are of one process and one run, as a ring sends them.

With --processes M, tokens are per process. Ours shares one codebook, K/M rows each, and its collectives are in its
time. The dense form is what data parallelism runs today: every process has all K rows and its own tokens, all M run at
once. The all-reduce of its K x D gradient is not run, so it is not in its seconds; its sent bytes are computed:
2 (M-1)/M K D numbers per step.

The arithmetic is float32 or float64 because the search, the softmax and the statistics run in float32 or better
whatever the autocast is."""


def _parser() -> argparse.ArgumentParser:
    out = command.parser("codes", ABOUT)
    out.add_argument("--tokens", type=int, default=1024, help="N, tokens per process (1024)")
    out.add_argument("--codes", type=int, default=65536, help="K, all codes (65536)")
    out.add_argument("--dim", type=int, default=256, help="D, dimension of a code (256)")
    out.add_argument("--work", choices=(*WORKS, "both"), default="both", help="what is measured (both)")
    out.add_argument("--entropy", action="store_true", help="with the entropy loss, temperature 0.01 as released")
    out.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="of tokens and rows (float32)")
    out.add_argument(
        "--products",
        choices=("fp32", "bf16"),
        default="fp32",
        help="what ours and the floor multiply in; bf16 is for --device cuda, dense then takes tf32 (fp32)",
    )
    out.add_argument("--repeats", type=int, default=5, help="timed runs of each form (5)")
    out.add_argument(
        "--spread",
        type=float,
        default=1.0,
        help="standard deviation of the logits: 1 is a soft assignment; the published initialisation has 16 (1)",
    )
    command.add_options(out)
    return out


def problems(args: argparse.Namespace) -> Iterable[str]:
    """What is wrong with the arguments, each as the rule, where it came from and what to change."""
    yield from command.problems(args, "tokens", "codes", "dim", "repeats")
    if not 0 < args.spread < float("inf"):
        yield f"spread is {args.spread} and must be a positive number; it comes from --spread: give 1, or 16"
    if args.products == "bf16" and not (args.device == "cuda" and args.dtype == "float32"):
        yield (
            f"products in bf16 are those of float32 numbers on a GPU, but --device is {args.device} and --dtype is "
            f"{args.dtype}; it comes from --products: give --products fp32, or --device cuda --dtype float32"
        )


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    return command.parse(_parser(), argv, problems)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    setting = choose(args)
    report = run(setting) | command.origin("codes", argv, setting.device, setting.threads)
    report["config"] = {**asdict(setting), "max_dense_gib": args.max_dense_gib}
    print(json.dumps(report) if args.json else table(report))
    return 0


def choose(args: argparse.Namespace) -> Setting:
    """What will be measured; says on stderr which dense forms are left out, and why."""
    from . import search
    from .forms import dense_memory

    setting = Setting(
        tokens=args.tokens,
        codes=args.codes,
        dim=args.dim,
        entropy=args.entropy,
        processes=args.processes,
        dtype=args.dtype,
        device=args.device,
        repeats=args.repeats,
        threads=command.threads(args),
        scan_mib=args.scan_mib,
        spread=args.spread,
        products=args.products,
        works=WORKS if args.work == "both" else (args.work,),
    )
    for name, why in search.missing(setting).items() if "search" in setting.works else ():
        print(f"bench codes: {name} is left out: {why}", file=sys.stderr)
    kept = []
    for work, need in dense_memory(setting).items():
        if need <= args.max_dense_gib * 2**30:
            kept.append(work)
            continue
        if work not in setting.works:
            continue
        print(
            f"bench codes: the dense {work} is left out: it needs about {need / 2**20:.1f} MiB, more than the "
            f"{args.max_dense_gib:g} GiB of --max-dense-gib",
            file=sys.stderr,
        )
    return replace(setting, dense=tuple(work for work in kept if work in setting.works))


def run(setting: Setting) -> dict[str, Any]:
    """Measure on all processes and merge: {"step": {"ours", "dense", "floor", ...}, "search": the same}."""
    from .measure import measure

    ranks = command.everywhere(measure, setting)
    return {work: merge([rank[work] for rank in ranks], work, setting) for work in setting.works}


def merge(ranks: list[dict[str, Cost]], work: str, setting: Setting) -> dict[str, dict[str, Any]]:
    """The costs of all processes as one."""
    from .forms import PRODUCTS, dense_bytes

    out: dict[str, dict[str, Any]] = {"dense": {"seconds": None, "peak_bytes": None}}
    for name in ranks[0]:
        costs = [rank[name] for rank in ranks]
        out[name] = command.joined(costs)
        if costs[0].same_ids is not None:
            out[name]["same_ids"] = sum(cost.same_ids or 0.0 for cost in costs) / len(costs)
    for name in ("released", "dense"):
        if name in out:
            out[name]["sent_bytes"] = dense_bytes(setting)[work]
    floor = {"seconds": out["floor"]["seconds"], "products": len(PRODUCTS[work])}
    return {**{name: out[name] for name in FORMS if name in out}, "floor": floor}


def table(report: dict[str, Any]) -> str:
    from .forms import PRODUCTS

    config = report["config"]
    lines = [
        f"{config['tokens']} tokens per process, {config['codes']} codes x {config['dim']}, {config['dtype']}, "
        f"products {config['products']}, "
        f"{'with' if config['entropy'] else 'without'} entropy, spread {config['spread']:g}; "
        f"{config['processes']} x {config['threads']} threads",
        command.place(report),
        "",
        f"{'':18}{'seconds':>10}{'/ floor':>9}{'peak MiB':>11}{'sent MiB':>11}",
    ]
    for work in config["works"]:
        floor = report[work]["floor"]["seconds"]
        for name, row in report[work].items():
            ratio = None if row["seconds"] is None else row["seconds"] / floor
            memory = [None if row.get(key) is None else row[key] / 2**20 for key in ("peak_bytes", "sent_bytes")]
            cells = (
                command.cell(row["seconds"], 10, 4),
                command.cell(ratio, 9, 2),
                *(command.cell(value, 11, 2) for value in memory),
            )
            lines.append(f"{work:8}{name:10}{''.join(cells)}")
        lines += [f"{'':8}{name} / ours: {_ratios(report[work], name)}" for name in FORMS[1:] if name in report[work]]
        lines.append(
            f"{'':8}floor: {report[work]['floor']['products']} of 2 N K D operations: {', '.join(PRODUCTS[work])}"
        )
    return "\n".join(lines)


def _ratios(work: dict[str, dict[str, Any]], name: str) -> str:
    """How many times more another form takes."""
    out = []
    for key, what in (("seconds", "time"), ("peak_bytes", "memory"), ("sent_bytes", "bytes")):
        ours, other = work["ours"].get(key), work[name].get(key)
        if ours and other:
            out.append(f"{other / ours:.2f} x the {what}")
    if "same_ids" in work[name]:
        out.append(f"{work[name]['same_ids']:.2%} of the ids are ours")
    return ", ".join(out) or "not measured"
