"""`bench quickstart`: the training steps of the quickstart's tokenizer and prior, beside plain torch loops.

This file reads the arguments and prints; what is run is in quickstart_forms.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vqscale import config as configuration
from vqscale.nets.config import grid
from vqscale.programs.commands import words
from vqscale.run import checkout

from . import command
from .setting import Rounds

if TYPE_CHECKING:
    from vqscale.train.config import TokenizerRun
    from vqscale.train.config.prior import PriorRun

ABOUT = """\
One whole training step, data apart: networks, losses, backward pass, clipping, optimiser, on one process. Forms that
take turns, on one batch of drawn pictures:

  ours         the tokenizer of configs/quickstart/tokenizer.yaml as launch/train.py trains it, engine torch
  ours, ema    the same with the quantizer ema: nearest codes that are moving averages, as VectorQuantize's are
  released     its encoder and decoder in a plain loop of torch, IBQ as its released code lays it out
  vector-quantize-pytorch   the same loop with VectorQuantize of the same K and dimension, where it is installed
  floor        the products and convolutions of `ours` alone, with the operands that they had in one step

and of random ids:

  ours         the prior of configs/quickstart/prior.yaml, engine torch
  transformers LlamaForCausalLM of the same sizes in a plain loop of torch, where it is installed
  floor        the products of `ours` alone, those of attention with its softmax

processor is the time of all threads of this process: on a machine that others use too, compare that."""

FIRST = ("engine.name=torch", "tokenizer.quantizer.warmup_steps=2", "tokenizer.quantizer.landing_steps=0")


def _parser() -> argparse.ArgumentParser:
    out = command.parser("quickstart", ABOUT)
    for name in ("tokenizer", "prior"):
        about = f"another config of the {name} (the quickstart's), and other values of its keys"
        out.add_argument(f"--{name}", nargs="*", default=[], metavar="CONFIG|KEY=VALUE", help=about)
    out.add_argument("--warm", type=int, default=10, help="steps of each form before it is timed (10)")
    out.add_argument("--repeats", type=int, default=9, help="timed steps of each form (9)")
    command.add_options(out)
    return out


def configs(args: argparse.Namespace) -> tuple[TokenizerRun, PriorRun]:
    """Both configs; the prior is of the tokenizer's ids. ValueError for what is wrong with them."""
    from vqscale.train.config import TokenizerRun
    from vqscale.train.config.prior import PriorRun

    path, changes = words.config_and_changes(args.tokenizer)
    first = configuration.load(TokenizerRun, path or checkout.config("quickstart/tokenizer.yaml"), [*FIRST, *changes])
    quantizer: Any = first.tokenizer.quantizer
    sides = grid(first.tokenizer.net, first.data.train.sides)
    known = [f"prior.num_codes={quantizer.num_codes}", f"prior.grid={list(sides)}", "engine.name=torch"]
    path, changes = words.config_and_changes(args.prior)
    place = path or checkout.config("quickstart/prior.yaml")
    second = configuration.load(PriorRun, place, [*known, f"prior.feature_dim={quantizer.dim}", *changes])
    return first, second


def problems(args: argparse.Namespace) -> Iterable[str]:
    """What is wrong with the arguments, each as the rule, where it came from and what to change."""
    yield from command.problems(args, "warm", "repeats")
    if args.processes != 1:
        yield f"quickstart measures one process, but --processes is {args.processes}: leave it out"
    if args.warm in (1, 2):
        yield f"the codes begin to act after 2 steps, and --warm is {args.warm}: give 3 or more"
    try:
        first, second = configs(args)
    except ValueError as error:
        yield str(error)
        return
    found = (first.tokenizer.signal.name, first.loss.adversarial, first.tokenizer.quantizer.name, second.prior.name)
    if found != ("images", None, "ibq", "autoregressive"):
        yield (
            "the plain loops are of images, of no discriminator, of ibq, and of an autoregressive prior; the configs "
            "of --tokenizer and --prior have others: give such as the quickstart's"
        )


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    return command.parse(_parser(), argv, problems)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    rounds = Rounds(args.warm, args.repeats, args.device, command.threads(args))
    report = run(*configs(args), rounds) | command.origin("quickstart", argv, args.device, rounds.threads)
    for note in report["left_out"]:
        print(f"bench quickstart: {note}", file=sys.stderr)
    print(json.dumps(report) if args.json else table(report))
    return 0


def run(tokenizer: TokenizerRun, prior: PriorRun, rounds: Rounds) -> dict[str, Any]:
    from .quickstart_forms import PACKAGES, measure, versions
    from .sample_forms import missing

    absent = {package: note for package in PACKAGES if (note := missing(package))}
    codes: Any = tokenizer.tokenizer.quantizer
    config = {
        "tokenizer": {"batch": tokenizer.data.batch, "num_codes": codes.num_codes, "dim": codes.dim},
        "prior": {"batch": prior.data.batch, "tokens": prior.prior.num_tokens, "width": prior.prior.net.width},
    }
    return {
        "quickstart": measure(tokenizer, prior, rounds, absent),
        "config": config | {"rounds": asdict(rounds)},
        "versions": versions(absent),
        "left_out": list(absent.values()),
    }


def table(report: dict[str, Any]) -> str:
    return "\n".join([command.place(report), *(line for part in report["quickstart"].items() for line in _of(*part))])


def _of(part: str, forms: dict[str, dict[str, float]]) -> Iterable[str]:
    yield ""
    yield f"{part:26}{'seconds':>10}{'processor':>11}{'ours / it':>11}"
    ours = forms["ours"]["processor"]
    for name, row in forms.items():
        yield f"{name:26}{row['seconds']:10.3f}{row['processor']:11.3f}{ours / row['processor']:11.2f}"
