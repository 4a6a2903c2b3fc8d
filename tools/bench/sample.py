"""`bench sample`: drawing ids from a prior, ours beside `transformers`' generate, and beside the products of both.

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
Images drawn from a prior of random weights, ids one after the other. Forms that take turns, all with the same layers,
width, heads, hidden width, number of ids, batch and length:

  ours          Prior.sample
  bf16          with precision: bf16
  transformers  LlamaForCausalLM.generate with its cache, where the package is installed
  products      the matrix products of all steps alone, as torch's F.linear: what both cannot do without

seconds is wall time, processor the time of all threads of this process: on a machine that others use too, compare
that."""


def _parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="bench sample", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("--batch", type=int, default=8, help="images at once (8)")
    out.add_argument("--side", type=int, default=16, help="an image has side x side ids (16)")
    out.add_argument("--codes", type=int, default=2**14, help="K (16384)")
    out.add_argument("--width", type=int, default=384, help="of the transformer (384)")
    out.add_argument("--layers", type=int, default=6, help="of the transformer (6)")
    out.add_argument("--heads", type=int, default=6, help="of every attention (6)")
    out.add_argument("--greedy", action="store_true", help="take the likeliest id instead of drawing")
    out.add_argument("--repeats", type=int, default=3, help="timed runs of each form (3)")
    command.add_options(out)
    return out


def problems(args: argparse.Namespace) -> Iterable[str]:
    """What is wrong with the arguments, each as the rule, where it came from and what to change."""
    yield from command.problems(args, "batch", "side", "codes", "width", "layers", "heads", "repeats")
    if args.processes != 1:
        yield f"generate draws on one process, but --processes is {args.processes}: leave it out"
    if args.heads > 0 and args.width % (4 * args.heads):
        yield (
            f"width {args.width} cut into {args.heads} heads must give heads of a multiple of 4 numbers, which are "
            "turned in pairs over two sides; it comes from --width and --heads: change one"
        )


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    return command.parse(_parser(), argv, problems)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    keys = ("batch", "side", "codes", "width", "layers", "heads", "greedy", "repeats", "device")
    setting = SampleSetting(**{key: getattr(args, key) for key in keys}, threads=command.threads(args))
    report = run(setting) | command.origin("sample", argv, args.device, setting.threads) | {"config": asdict(setting)}
    for note in report["left_out"]:
        print(f"bench sample: {note}", file=sys.stderr)
    print(json.dumps(report) if args.json else table(report))
    return 0


def run(setting: SampleSetting) -> dict[str, Any]:
    from .sample_forms import measure, missing

    absent = missing()
    return {"sample": measure(setting, absent), "left_out": [absent] if absent else []}


def table(report: dict[str, Any]) -> str:
    config, forms = report["config"], report["sample"]
    lines = [
        f"{config['batch']} images of {config['side']} x {config['side']} ids, K {config['codes']}, "
        f"{config['layers']} layers of width {config['width']}; {config['threads']} threads",
        command.place(report),
        "",
        f"{'':14}{'seconds':>10}{'processor':>11}{'/ transformers':>16}{'images/s':>10}",
    ]
    other = forms.get("transformers", {}).get("processor")
    for name, row in forms.items():
        ratio = f"{row['processor'] / other:.2f}" if other else "-"
        rate = f"{config['batch'] / row['seconds']:.2f}"
        lines.append(f"{name:14}{row['seconds']:10.3f}{row['processor']:11.3f}{ratio:>16}{rate:>10}")
    return "\n".join(lines)
