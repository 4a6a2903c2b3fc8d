"""Whether two runs are the same: what they logged, and every tensor of a checkpoint, to the bit or within bounds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqscale.disk import checkpoint

MOST = 5  # differences that are told
BOUNDS = {"val/psnr": 0.3, "val/usage": 0.03, "val/loss": 0.05, "val/accuracy": 0.02}
"""By how much the last held-out scores of two runs may differ that took other numbers of processes: sums in another
order round otherwise, and a code that is nearest by a hair becomes another one. PSNR in dB, loss of a prior in nats."""


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in row.items() if key != "time" and not key.startswith("time/")} for row in lines]


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    """Everything that a checkpoint holds, by name, rows whole."""
    contents = checkpoint.read(run / "checkpoints" / f"{step:010d}")
    found = {name: contents.whole(name) for name in contents.ranges}
    for name, entry in contents.rows.items():
        found[f"rows/{name}"] = contents.some_rows(name, 0, entry["shape"][0], entry["shape"][0])
    return found


def scores(run: Path) -> dict[str, float]:
    """The last held-out scores."""
    found: dict[str, float] = {}
    for row in rows(run):
        found |= {name: value for name, value in row.items() if name.startswith("val/")}
    return found


def bits(run: Path, other: Path, step: int) -> list[str]:
    """How the second run differs from the first in what was logged and in the checkpoint of a step; []: in no bit."""
    told = []
    mine, theirs = rows(run), rows(other)
    if len(mine) != len(theirs):
        told.append(f"{len(mine)} and {len(theirs)} rows of metrics.jsonl")
    for one, two in zip(mine, theirs, strict=False):
        told += [
            f"step {one['step']}, {name}: {one.get(name)} and {two.get(name)}"
            for name in dict.fromkeys([*one, *two])
            if one.get(name) != two.get(name)
        ]
    ours, others = tensors(run, step), tensors(other, step)
    for name in dict.fromkeys([*ours, *others]):
        if name not in ours or name not in others or not _same(ours[name], others[name]):
            told.append(f"step {step}, the tensor {name}")
    return told if len(told) <= MOST else [*told[:MOST], f"and {len(told) - MOST} more"]


def _same(x: Tensor, y: Tensor) -> bool:
    """Equal in every bit: a NaN is like itself, and minus zero is not zero."""
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(_raw(x), _raw(y))


def _raw(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def within(run: Path, other: Path, bounds: Mapping[str, float]) -> list[str]:
    """Scores of the second run that are further from the first's than these bounds, or lacking; []: none is."""
    mine, theirs = scores(run), scores(other)
    known = [name for name in bounds if name in mine]
    if not known:
        return [f"{run} has none of the scores {', '.join(bounds)}"]
    return [
        f"{name}: {mine[name]} and {theirs.get(name)}, bound {bounds[name]}"
        for name in known
        if not abs(mine[name] - theirs.get(name, math.nan)) <= bounds[name]
    ]
