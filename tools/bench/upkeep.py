"""`bench upkeep`: what statistics and revival cost beside an IBQ step whose rows are split over processes.

This file reads the arguments, builds the forms and prints; how they are measured is measure.py.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any

from . import command
from .setting import Setting

if TYPE_CHECKING:
    from torch import Tensor

    from vqscale.codes.revival import Upkeep
    from vqscale.parallel.mesh import Mesh
    from vqscale.quantizers.base import Quantizer

    from .forms import Form
    from .measure import Cost

ABOUT = """\
One IBQ training step (forward with all losses, backward to tokens and rows, the update after it), with ever more of
what keeps codes in use; forms take turns, and each is divided by the step of its own round that has none of it:

  step       nobody drives: no counts, no window, no revival
  counted    the window of counts, and no revival (revive_every: 0)
  revived    with revival in every step (revive_every: 1), and no code is dead
  many dead  the same, and every code is dead in every step: as many are revived as one step may

The optimiser's step, which costs the same in all of them, is in none. cpu is the processor time of all processes: on
a machine that others use too, its ratio is the one to read."""

FORMS = ("step", "counted", "revived", "many dead")


def _parser() -> argparse.ArgumentParser:
    out = command.parser("upkeep", ABOUT)
    out.add_argument("--tokens", type=int, default=512, help="N, tokens per process (512)")
    out.add_argument("--codes", type=int, default=2**18, help="K, all codes (262144)")
    out.add_argument("--dim", type=int, default=16, help="D, dimension of a code (16)")
    out.add_argument("--repeats", type=int, default=9, help="timed runs of each form (9)")
    command.add_options(out)
    return out


def problems(args: argparse.Namespace) -> Iterable[str]:
    return command.problems(args, "tokens", "codes", "dim", "repeats")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    return command.parse(_parser(), argv, problems)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    setting = Setting(
        tokens=args.tokens,
        codes=args.codes,
        dim=args.dim,
        processes=args.processes,
        device=args.device,
        repeats=args.repeats,
        threads=command.threads(args),
        scan_mib=args.scan_mib,
    )
    report = run(setting) | command.origin("upkeep", argv, setting.device, setting.threads)
    report["config"] = asdict(setting)
    print(json.dumps(report) if args.json else table(report))
    return 0


def run(setting: Setting) -> dict[str, Any]:
    """{"upkeep": {form: {"seconds", "ratio", "cpu", "cpu_ratio", "peak_bytes", "sent_bytes"}}} of all processes."""
    ranks = command.everywhere(measure, setting)
    costs = {name: [rank[0][name] for rank in ranks] for name in FORMS}
    slowest = {name: _over(max, [cost.seconds for cost in costs[name]]) for name in FORMS}
    cpu = {name: _over(sum, [rank[1][name] for rank in ranks]) for name in FORMS}
    return {
        "upkeep": {
            name: command.joined(costs[name])
            | {"ratio": _ratio(slowest[name], slowest["step"])}
            | {"cpu": median(cpu[name]), "cpu_ratio": _ratio(cpu[name], cpu["step"])}
            for name in FORMS
        }
    }


def _over(join: Callable[[Iterable[float]], float], processes: Sequence[Sequence[float]]) -> list[float]:
    """One number per repeat of those of all processes."""
    return [join(repeat) for repeat in zip(*processes, strict=True)]


def _ratio(times: Sequence[float], to: Sequence[float]) -> float:
    """The median over the repeats, each beside its own."""
    return median(a / b for a, b in zip(times, to, strict=True))


def measure(setting: Setting) -> tuple[dict[str, Cost], dict[str, list[float]]]:
    """({form: cost}, {form: processor seconds of each repeat}) of this process; the same call on every process."""
    import torch

    from vqscale.parallel.mesh import Mesh

    from .measure import alone, seconds

    torch.set_num_threads(setting.threads)
    mesh = Mesh(codes=setting.processes, device=setting.device)
    forms = build(setting, mesh)
    costs = {name: alone(form, mesh) for name, form in forms.items()}
    cpu: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(setting.repeats):
        for name, form in forms.items():
            before = time.process_time()
            costs[name].seconds.append(seconds(form, mesh.device, mesh.codes))
            cpu[name].append(time.process_time() - before)
    return costs, cpu


def build(setting: Setting, mesh: Mesh) -> dict[str, Form]:
    """The forms: every one with rows of its own, on the same tokens, which are the same in every step."""
    import torch

    from vqscale.codes import tally
    from vqscale.seed import derive

    generator = torch.Generator().manual_seed(derive("bench", mesh.codes.rank))
    x_ND = torch.randn(setting.tokens, setting.dim, generator=generator).to(mesh.device).requires_grad_()

    def form(name: str) -> Form:
        quantizer, upkeep = _driven(setting, mesh, name)

        def step() -> tuple[Tensor, ...]:
            with tally.silent():  # as in a step that is not logged
                out = quantizer(x_ND)
            torch.stack([out.z.sum(), *out.losses.values()]).sum().backward()
            quantizer.update()
            for x in (x_ND, *quantizer.parameters()):
                x.grad = None
            if name == "many dead":
                upkeep.window.age_k.fill_(1e6)
                upkeep.window.counts_k.zero_()
            return ()

        return step

    return {name: form(name) for name in FORMS}


def _driven(setting: Setting, mesh: Mesh, name: str) -> tuple[Quantizer, Upkeep]:
    from vqscale import quantizers
    from vqscale.quantizers.ibq import IBQ

    config = {
        "name": "ibq",
        "num_codes": setting.codes,
        "dim": setting.dim,
        "init": "normal",
        "init_scale": setting.dim**-0.5,
        "revive_every": int(name in ("revived", "many dead")),
        "revive_after": 0 if name == "many dead" else 10**9,
        "scan_mib": setting.scan_mib,
    }
    quantizer = quantizers.build(config, mesh, seed=0).train()
    assert isinstance(quantizer, IBQ)
    if name != "step":
        quantizer.begin()
    return quantizer, quantizer.upkeep


def table(report: dict[str, Any]) -> str:
    config = report["config"]
    lines = [
        f"{config['tokens']} tokens per process, {config['codes']} codes x {config['dim']}, float32; "
        f"{config['processes']} x {config['threads']} threads",
        command.place(report),
        "",
        f"{'':12}{'seconds':>10}{'/ step':>9}{'cpu':>9}{'/ step':>9}{'sent KiB':>11}{'more than a step, bytes':>26}",
    ]
    bare = report["upkeep"]["step"]["sent_bytes"]
    for name, row in report["upkeep"].items():
        sent = row["sent_bytes"]
        times = f"{row['seconds']:10.4f}{row['ratio']:9.3f}{row['cpu']:9.3f}{row['cpu_ratio']:9.3f}"
        lines.append(f"{name:12}{times}{sent / 2**10:11.1f}{sent - bare:26,}")
    return "\n".join(lines)
