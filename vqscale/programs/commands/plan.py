"""Predict a training step of a tokenizer or a prior on 1 to 1024 GPUs, and say how to split the codebook.

    vqscale plan [CONFIG] [dotted.key=value ...] [--gpu h200] [--gpus 1,8,64,1024] [--images 32]
    vqscale plan --check

A run as for `vqscale train`; in a checkout, without one, configs/tokenizer/ibq_imagenet256_262144.yaml. For every
number of GPUs: the split data x codes with the shortest predicted step, what it holds, sends and takes, and the
smallest code axis that fits. engine.matmul=highest, high, medium or low is the precision on the code axis. Formulas:
bytes in vqscale/plan/traffic.py, seconds and memory in vqscale/plan/cost.py. They do not know waiting for data, nor
what the discriminator sends. Of a prior the code axis is its head, and the formulas are in vqscale/plan/prior.py and
prior_step.py; operations of drawing an image are told, and not their time.

--check measures here: rates of this machine and real steps of the code axis on 1, 2 and 4 processes, predicted beside
measured; with --codes (and --dim, and --tokens of all processes) at that size. What the model says of the kernels
of a GPU is counted in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vqscale import config as configuration
from vqscale.nets.config import by
from vqscale.plan.cost import codes_rate, has_kernels, on_machine, predict
from vqscale.plan.machines import MACHINES, Machine, from_results
from vqscale.plan.report import advice, answer, plain, table
from vqscale.plan.traffic import grids, rows
from vqscale.programs.commands import words
from vqscale.run import checkout, processes
from vqscale.train.config import Run, TokenizerRun
from vqscale.train.config.prior import PriorRun

DEFAULT = "tokenizer/ibq_imagenet256_262144.yaml"
WORLDS = [2**i for i in range(11)]


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked as far as no file is needed; ValueError for what does not go together."""
    args = _parser().parse_intermixed_args(given)
    for name in ("codes", "dim", "images", "tokens", "global_batch"):
        value, option = getattr(args, name), "--" + name.replace("_", "-")
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value} and must be at least 1; it comes from {option}: give 1 or more")
    twice = [f"--{name.replace('_', '-')}" for name in ("images", "tokens", "global_batch") if getattr(args, name)]
    if len(twice) > 1 and not args.check:
        raise ValueError(f"{' and '.join(twice)} say the same thing twice: give one of them")
    config, args.changes = words.config_and_changes(args.words)
    if config and args.config:
        raise ValueError(f"there is one CONFIG, found {config} and {args.config}: give one")
    args.config = args.config or config
    return args


def _parser() -> argparse.ArgumentParser:
    out = words.parser(__doc__)
    out.add_argument("words", nargs="*", metavar="CONFIG or key=value", help="a run, and changes of its keys")
    out.add_argument("--config", type=Path, help="the run, as the first word")
    out.add_argument("--codes", type=int, help="K, for tokenizer.quantizer.num_codes or prior.num_codes")
    out.add_argument("--dim", type=int, help="D, for tokenizer.quantizer.dim")
    out.add_argument("--gpu", choices=[*MACHINES, "here"], default="h200", help="here: this CPU, measured (h200)")
    out.add_argument("--gpus", help="numbers of GPUs (1,2,4,...,1024; with --check of processes, 1,2,4)")
    out.add_argument("--images", type=int, help="per GPU and micro-batch, whatever their number (32)")
    out.add_argument("--tokens", type=int, help="the same in tokens: whole images")
    out.add_argument(
        "--global-batch", type=int, help="images in all, in place of --images: work per GPU falls with their number"
    )
    out.add_argument("--splits", action="store_true", help="print every split, not the best of each number of GPUs")
    out.add_argument("--json", action="store_true", help="print one JSON object")
    out.add_argument("--check", action="store_true", help="measure here, and compare")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """0, 1 failed on the way, 2 the user's input."""
    return processes.status_of(lambda: _plan(arguments(sys.argv[1:] if argv is None else argv)))


def _plan(args: argparse.Namespace) -> int:
    if args.check:
        from vqscale.plan.check import PROCESSES, SIZES, check

        one = ((args.tokens or 512, args.codes, args.dim or 64),) if args.codes else SIZES
        return check(one, _worlds(args.gpus) if args.gpus else PROCESSES, args.json)
    report = plan(args)
    print(json.dumps(report["json"], indent=1) if args.json else report["text"])
    return 0


def plan(args: argparse.Namespace) -> dict[str, Any]:
    config = _run(args)
    return _prior(args, config) if isinstance(config, PriorRun) else _tokenizer(args, config)


def _prior(args: argparse.Namespace, config: PriorRun) -> dict[str, Any]:
    from vqscale.plan import prior_step
    from vqscale.train import nulls

    config = nulls.fill(config)
    machine, known = _machine(args.gpu)
    work = prior_step.work(config)
    per_gpu = _per_gpu(args, work.tokens)
    steps = {world: prior_step.predict(config, images, world, machine, work) for world, images in per_gpu.items()}
    operations = ", ".join(f"{name} {n / 1e9:.1f} GFLOP" for name, n in work.operations.items())
    lines = [
        f"{config.prior.name} prior, K {config.prior.num_codes:,}, images of {work.tokens} tokens, on {machine.name}; "
        + _batch(args, per_gpu),
        f"of an image: {operations}; network in {config.engine.precision}, head at matmul={config.engine.matmul}",
        "",
        *table(steps, args.splits),
        "",
        *advice(steps, machine, "a higher engine.zero_stage"),
        "",
        *answer(work.codes, steps, f"engine.matmul={config.engine.matmul}"),
    ]
    found: dict[str, Any] = {"machine": asdict(machine), "efficiencies": known, "operations": work.operations}
    found["steps"] = [
        plain(step, -(-work.codes // step.grid.codes), per_gpu[world]) for world, some in steps.items() for step in some
    ]
    return {"text": "\n".join(lines), "json": found}


def _per_gpu(args: argparse.Namespace, tokens: int) -> dict[int, int]:
    """Images per GPU by number of GPUs."""
    worlds = _worlds(args.gpus) if args.gpus else WORLDS
    per_gpu = {world: images for world in worlds if (images := _images(args, world, tokens))}
    if not per_gpu:
        raise ValueError(
            f"--global-batch {args.global_batch} divides by none of the numbers of GPUs {', '.join(map(str, worlds))}: "
            "change --global-batch or --gpus"
        )
    return per_gpu


def _batch(args: argparse.Namespace, per_gpu: Mapping[int, int]) -> str:
    if args.global_batch:
        return f"{args.global_batch} images in all"
    return f"{next(iter(per_gpu.values()))} images per GPU"


def _tokenizer(args: argparse.Namespace, config: TokenizerRun) -> dict[str, Any]:
    from vqscale.plan.tokenizer import workload

    machine, known = _machine(args.gpu)
    work, network, axis = workload(config, 1)
    axis, kernels = on_machine(axis, work, machine), has_kernels(work, machine)
    per_gpu = _per_gpu(args, network.tokens)
    steps = {}
    for world, images in per_gpu.items():
        here = replace(work, images=images, tokens=images * network.tokens)
        steps[world] = [predict(here, grid, machine, axis, network) for grid in grids(world)]
    lines = [
        f"{config.tokenizer.quantizer.name}, K {work.codes:,} x D {work.dim}, samples of {by(config.data.train.sides)} "
        f"with {network.tokens} tokens, on {machine.name}; {_batch(args, per_gpu)}",
        f"network {(network.forward + network.backward) / 1e12:.3f} TFLOP per image (forward "
        f"{network.forward / 1e12:.3f}), {work.precision}; code axis {axis.products} products of 2 N K D, "
        f"{work.codes_precision} ({codes_rate(work, machine):.3g} TFLOP/s), "
        + (
            f"fused kernels at {machine.kernels:.2f} of the rate of products, others at {machine.library:.2f} ({known})"
            if kernels
            else f"{axis.passes} passes over blocks"
        ),
        "",
        *table(steps, args.splits),
        "",
        *advice(steps, machine, "tokenizer.net.checkpointing, a higher engine.zero_stage"),
        "",
        *answer(work.codes, steps, f"{work.codes_precision}, {'fused kernels' if kernels else 'blocks'}"),
    ]
    found: dict[str, Any] = {
        "machine": asdict(machine),
        "efficiencies": known,
        "work": asdict(work),
        "code_axis": asdict(axis),
    }
    found["network"] = {"forward": network.forward, "backward": network.backward, "parameters": network.parameters}
    found["steps"] = [
        plain(step, rows(work, step.grid), per_gpu[world]) for world, some in steps.items() for step in some
    ]
    return {"text": "\n".join(lines), "json": found}


def _run(args: argparse.Namespace) -> Run:
    path = args.config or checkout.config(DEFAULT)
    task = configuration.load(Run, path, args.changes).task
    if task == "prior" and args.dim:
        raise ValueError("--dim is the width of a codebook's rows, and a prior has prior.net.width: leave --dim out")
    codes, dim = ("prior" if task == "prior" else "tokenizer.quantizer"), args.dim
    changes = [f"{codes}.num_codes={args.codes}"] if args.codes else []
    changes += [f"tokenizer.quantizer.dim={dim}"] if dim else []
    return configuration.load(Run, path, [*args.changes, *changes])


def _worlds(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise ValueError(f"--gpus takes numbers of GPUs, found {text!r}: use e.g. --gpus 1,8,64")
    return sorted({int(word) for word in words})


def _machine(name: str) -> tuple[Machine, str]:
    """(the machine, where what kernels reach there comes from)."""
    if name != "here":
        root = checkout.checkout()
        return from_results(name, None if root is None else root / "tools" / "results" / "gpu")
    from vqscale.plan.check import calibrate

    return calibrate(1), "measured here"


def _images(args: argparse.Namespace, world: int, per_image: int) -> int:
    """Images per GPU; 0 where --global-batch does not divide."""
    if args.global_batch:
        return 0 if args.global_batch % world else args.global_batch // world
    if args.tokens and args.tokens % per_image:
        raise ValueError(f"--tokens {args.tokens} is no number of images of {per_image} tokens: use a multiple")
    return args.tokens // per_image if args.tokens else args.images or 32
