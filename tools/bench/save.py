"""`bench save`: the share of a training's steps that saving takes, written beside the steps and before them.

This file reads the arguments, trains and prints; how a checkpoint is written is vqscale/disk/writer.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from . import command

if TYPE_CHECKING:
    from vqscale.disk.writer import Writer
    from vqscale.engine.engine import Engine
    from vqscale.parallel.mesh import Mesh

ABOUT = """\
Steps of a plain network and of rows of codes under AdamW, of which every --every-th saves, beginning with the first;
forms take turns:

  unsaved     no step saves
  background  as a run does it: a step that saves waits for a copy to host memory, the rest is written beside the next
  foreground  the step that saves waits until its checkpoint is written, sealed and durable

A form ends when its last checkpoint is written. `lost` is the share of its seconds beyond those of `unsaved` in the
same round. On a machine whose cores are all busy with the steps writing takes from them, and a full disk queue takes
from both; give --folder a place like that of real runs."""

FORMS = ("unsaved", "background", "foreground")


@dataclass(frozen=True)
class Saving:
    width: int
    layers: int
    batch: int
    codes: int
    dim: int
    steps: int
    every: int
    repeats: int
    folder: str
    processes: int
    device: str
    threads: int


def _parser() -> argparse.ArgumentParser:
    out = command.parser("save", ABOUT)
    out.add_argument("--width", type=int, default=1024, help="of the network's square layers (1024)")
    out.add_argument("--layers", type=int, default=8, help="how many of them (8)")
    out.add_argument("--batch", type=int, default=256, help="vectors per process and step (256)")
    out.add_argument("--codes", type=int, default=2**14, help="K, all rows (16384)")
    out.add_argument("--dim", type=int, default=64, help="D, dimension of a row (64)")
    out.add_argument("--steps", type=int, default=40, help="steps of a form (40)")
    out.add_argument("--every", type=int, default=10, help="steps from one save to the next (10)")
    out.add_argument("--repeats", type=int, default=3, help="rounds of all forms (3)")
    out.add_argument("--folder", help="where a folder is made for the checkpoints, and removed (the system's for such)")
    command.add_options(out)
    return out


def problems(args: argparse.Namespace) -> Iterable[str]:
    yield from command.problems(args, "width", "layers", "batch", "codes", "dim", "steps", "every", "repeats")
    if args.folder is not None and not Path(args.folder).is_dir():
        yield f"--folder {args.folder} is no folder: make it, or leave --folder out"


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    return command.parse(_parser(), argv, problems)


def main(argv: list[str]) -> int:
    args = arguments(argv)
    asked = {key: getattr(args, key) for key in ("width", "layers", "batch", "codes", "dim", "steps", "every")}
    place = Path(tempfile.mkdtemp(prefix="bench-save-", dir=args.folder))
    setting = Saving(**asked, repeats=args.repeats, folder=str(place), processes=args.processes,
                     device=args.device, threads=command.threads(args))  # fmt: skip
    try:
        report = run(setting) | command.origin("save", argv, setting.device, setting.threads)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    report["config"] = asdict(setting)
    print(json.dumps(report) if args.json else table(report))
    return 0


def run(setting: Saving) -> dict[str, Any]:
    """{"save": {form: {"seconds" of a step, "lost", "waited_s" of a step that saves}}, "bytes" of a checkpoint}; a
    round lasts as long as on its slowest process."""
    ranks = command.everywhere(measure, setting)
    slowest = {name: _slowest([rank[0][name] for rank in ranks]) for name in FORMS}
    waited = {name: _slowest([rank[1][name] for rank in ranks]) for name in FORMS}
    lost = {
        name: median(1 - bare / each for bare, each in zip(slowest["unsaved"], slowest[name], strict=True))
        for name in FORMS
    }
    rows = {
        name: {"seconds": median(slowest[name]) / setting.steps, "lost": lost[name], "waited_s": median(waited[name])}
        for name in FORMS
    }
    return {"save": rows, "bytes": ranks[0][2]}


def _slowest(processes: Sequence[Sequence[float]]) -> list[float]:
    return [max(each) for each in zip(*processes, strict=True)]


def measure(setting: Saving) -> tuple[dict[str, list[float]], dict[str, list[float]], int]:
    """({form: seconds of each round}, {form: seconds that a step which saves waits for it}, bytes of a checkpoint) on
    this process; the same call on every process."""
    import torch

    from vqscale.disk.writer import Writer
    from vqscale.parallel.mesh import Mesh

    torch.set_num_threads(setting.threads)
    mesh = Mesh(codes=setting.processes, device=setting.device)
    engine = _engine(setting, mesh)
    writing = Writer(Path(setting.folder), mesh, keep=1)
    _train(setting, engine, writing, "foreground", setting.every)  # files and moments are there
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    waited: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(setting.repeats):
        for name in FORMS:
            took, waits = _train(setting, engine, writing, name, setting.steps)
            seconds[name].append(took)
            waited[name].append(waits)
    size = sum(file.stat().st_size for file in Path(setting.folder).rglob("*") if file.is_file())
    return seconds, waited, size


def _engine(setting: Saving, mesh: Mesh) -> Engine:
    import torch
    from torch import nn

    from vqscale.codes.rows import Rows
    from vqscale.engine.config import EngineConfig, OptimConfig
    from vqscale.engine.engine import Engine

    torch.manual_seed(0)
    layers = [nn.Linear(setting.width, setting.width) for _ in range(setting.layers)]
    net = nn.Sequential(*(part for layer in layers for part in (layer, nn.GELU()))).to(mesh.device)
    layout = Rows(setting.codes, mesh.codes.size, mesh.codes.rank)
    rows = nn.Parameter(torch.randn(layout.count, setting.dim, device=mesh.device))
    return Engine(net, {"codes": rows}, EngineConfig(name="torch"), OptimConfig(), mesh, 10**6)


def _train(setting: Saving, engine: Engine, writing: Writer, form: str, steps: int) -> tuple[float, float]:
    """(seconds of the steps and of what is left to write after them, of which a step that saves waits so many)"""
    import torch

    from vqscale.parallel import ops
    from vqscale.train import loop

    mesh, waits = engine.mesh, []
    x = torch.randn(setting.batch, setting.width, device=mesh.device)
    ops.barrier(mesh.world)
    began = time.perf_counter()
    for step in range(steps):
        engine.backward(engine(x).square().mean() + engine.rows["codes"].square().mean())
        engine.step()
        loop.agree(mesh, False, 0, writing)
        if form != "unsaved" and step % setting.every == 0:
            asked = time.perf_counter()
            _save(setting, engine, writing, form, step)
            waits.append(time.perf_counter() - asked)
    writing.wait()
    _finish(mesh)
    return time.perf_counter() - began, median(waits) if waits else 0.0


def _save(setting: Saving, engine: Engine, writing: Writer, form: str, step: int) -> None:
    from vqscale.codes.rows import Rows

    held, rows, facts = engine.held()
    start = Rows(setting.codes, engine.mesh.codes.size, engine.mesh.codes.rank).start
    writing.save(step, held, {name: (x, start, setting.codes) for name, x in rows.items()}, facts)
    if form == "foreground":
        writing.wait()


def _finish(mesh: Mesh) -> None:
    """What was asked of the device is done."""
    if mesh.device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def table(report: dict[str, Any]) -> str:
    config = report["config"]
    lines = [
        f"{config['layers']} layers of {config['width']}, {config['codes']} rows x {config['dim']}, a checkpoint of "
        f"{report['bytes'] / 2**20:.1f} MiB every {config['every']} steps; {config['processes']} x "
        f"{config['threads']} threads",
        command.place(report),
        "",
        f"{'':12}{'step s':>10}{'lost':>9}{'a save waits s':>18}",
    ]
    for name, row in report["save"].items():
        lines.append(f"{name:12}{row['seconds']:10.4f}{row['lost']:9.1%}{row['waited_s']:18.4f}")
    return "\n".join(lines)
