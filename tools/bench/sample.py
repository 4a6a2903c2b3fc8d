"""`bench sample`: drawing ids from priors of each kind, beside `transformers`' generate, and beside their products.

This file reads the arguments and prints; command.py is what subcommands share, sample_forms.py what is run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from . import command
from .setting import SampleSetting

ABOUT = """\
Images drawn from priors of random weights. Forms that take turns, all with the same layers, width, heads, hidden
width, number of ids, batch and length:

  autoregressive    Prior.sample, ids one after the other
  unpacked          the same as samples were drawn before matrices were packed
  bf16              the same with precision: bf16
  transformers      LlamaForCausalLM.generate with its cache, where the package is installed
  products          the matrix products of all these steps alone, as torch's F.linear: what none of them does without
  confidence        a masked prior, its ids revealed by confidence in --steps passes
  halton            a masked prior, in Halton's order in as many
  coarse_to_fine    --clusters clusters one after the other, then all ids within them; two networks of these layers

seconds is wall time, processor the time of all threads of this process: on a machine that others use too, compare
that."""


def _parser() -> argparse.ArgumentParser:
    out = command.parser("sample", ABOUT)
    out.add_argument("--batch", type=int, default=8, help="images at once (8)")
    out.add_argument("--side", type=int, default=16, help="an image has side x side ids (16)")
    out.add_argument("--codes", type=int, nargs="+", default=[2**14], help="K, one or several (16384)")
    out.add_argument("--width", type=int, default=384, help="of the transformer (384)")
    out.add_argument("--layers", type=int, default=6, help="of the transformer (6)")
    out.add_argument("--heads", type=int, default=6, help="of every attention (6)")
    out.add_argument("--steps", type=int, default=12, help="of a masked prior (12)")
    out.add_argument("--clusters", type=int, default=512, help="of the codes, of coarse_to_fine (512)")
    out.add_argument("--greedy", action="store_true", help="take the likeliest id instead of drawing")
    out.add_argument("--repeats", type=int, default=3, help="timed runs of each form (3)")
    command.add_options(out)
    return out


def problems(args: argparse.Namespace) -> Iterable[str]:
    """What is wrong with the arguments, each as the rule, where it came from and what to change."""
    counts = ("batch", "side", "codes", "width", "layers", "heads", "steps", "clusters", "repeats")
    yield from command.problems(args, *counts)
    if args.processes != 1:
        yield f"generate draws on one process, but --processes is {args.processes}: leave it out"
    if args.heads > 0 and args.width % (4 * args.heads):
        yield (
            f"width {args.width} cut into {args.heads} heads must give heads of a multiple of 4 numbers, which are "
            "turned in pairs over two sides; it comes from --width and --heads: change one"
        )
    if args.steps > args.side**2:
        yield (
            f"{args.steps} steps of a masked prior reveal at least an id each, and an image has {args.side**2}; it "
            "comes from --steps and --side: change one"
        )
    if args.clusters > min(args.codes):
        yield (
            f"{args.clusters} clusters of {min(args.codes)} codes: none is empty; it comes from --clusters and "
            "--codes: change one"
        )


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    return command.parse(_parser(), argv, problems)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    keys = ("batch", "side", "width", "layers", "heads", "steps", "clusters", "greedy", "repeats", "device")
    given = {key: getattr(args, key) for key in keys}
    settings = [SampleSetting(codes=codes, **given, threads=command.threads(args)) for codes in args.codes]
    report = run(settings) | command.origin("sample", argv, args.device, settings[0].threads)
    for note in report["left_out"]:
        print(f"bench sample: {note}", file=sys.stderr)
    print(json.dumps(report) if args.json else table(report))
    return 0


def run(settings: Sequence[SampleSetting]) -> dict[str, Any]:
    from .sample_forms import measure, missing

    absent = missing()
    rows = [{"config": asdict(one), "forms": measure(one, absent)} for one in settings]
    return {"sample": rows, "left_out": [absent] if absent else []}


def table(report: dict[str, Any]) -> str:
    return "\n".join([command.place(report), *(line for one in report["sample"] for line in _of_codes(**one))])


def _of_codes(config: dict[str, Any], forms: dict[str, dict[str, float]]) -> Iterable[str]:
    yield ""
    yield (
        f"{config['batch']} images of {config['side']} x {config['side']} ids, K {config['codes']}, "
        f"{config['layers']} layers of width {config['width']}; {config['threads']} threads"
    )
    yield f"{'':16}{'seconds':>10}{'processor':>11}{'/ transformers':>16}{'images/s':>10}"
    other = forms.get("transformers", {}).get("processor")
    for name, row in forms.items():
        ratio = f"{row['processor'] / other:.2f}" if other else "-"
        rate = f"{config['batch'] / row['seconds']:.2f}"
        yield f"{name:16}{row['seconds']:10.3f}{row['processor']:11.3f}{ratio:>16}{rate:>10}"
