"""A sweep of sampling settings: for each draw images, measure them against one reference, and keep the whole table.

OUT/sweep.json, sweep.csv, sweep.png    the table so far, in the order of the settings
OUT/SETTING/                            samples of a setting while it is measured (train/sample.py), then result.json
OUT/STOP                                made by hand: the sweep leaves as it does for a signal

A setting whose result.json is there is not drawn again, so the same command goes on with what is missing, or with more
settings. A request to stop is heard after every batch that is drawn, and when images have been measured. Not here: what
is drawn (sample.py) and what is measured (metrics/generation.py).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vqscale.metrics import generation
from vqscale.metrics import sweep as written
from vqscale.metrics.generation import Described, Network
from vqscale.metrics.sample_file import SampleFile
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.train import ending, sample_folder
from vqscale.train.folder import StopRequest
from vqscale.train.sample import Settings, sample

if TYPE_CHECKING:
    from vqscale.priors.base import Prior
    from vqscale.tokenizer import Tokenizer

RESULT = "result.json"


@dataclass(frozen=True)
class Judge:
    """What images are measured by, and against."""

    network: Network
    reference: Described
    about: Mapping[str, Any]  # names of the files and their sha256


def settings(base: Settings, dials: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """Every combination of the dials' positions, the last dial turning fastest. ValueError for what cannot be drawn."""
    empty = [name for name, values in dials.items() if not values]
    if empty:
        raise ValueError(f"--{empty[0].replace('_', '-')} names no value: give some, such as 1,1.5,2")
    made = [replace(base, **dict(zip(dials, values, strict=True))) for values in itertools.product(*dials.values())]
    problems = list(dict.fromkeys(problem for one in made for problem in one.problems()))
    if problems:
        raise ValueError("; ".join(problems))
    return list(dict.fromkeys(made))


def name(one: Settings) -> str:
    """The folder of a setting."""
    words = [f"guidance{one.guidance:g}", f"temperature{one.temperature:g}"]
    words += [one.schedule] * (one.schedule != "constant")
    words += [f"top{one.top_k}"] * bool(one.top_k) + [f"share{one.top_p:g}"] * (one.top_p < 1)
    return "-".join(words)


def sweep(
    prior: Prior,
    tokenizer: Tokenizer,
    judge: Judge,
    folder: Path,
    mesh: Mesh,
    every: Sequence[Settings],
    *,
    about: Mapping[str, Any] | None = None,
    keep: bool = False,
    measure_batch: int = 64,
) -> tuple[list[written.Row], bool]:
    """(rows of the settings that are measured, whether somebody asked to stop before all were). Collective.

    keep: samples.npz of every setting stays; without, it goes when it is measured.
    """
    made_from = {
        "prior": {"fingerprint": prior.fingerprint},
        "tokenizer": {"fingerprint": tokenizer.fingerprint},
        "judge": dict(judge.about),
    }
    rows: list[written.Row] = []
    stop = StopRequest(folder, mesh)
    for one in every:
        place = folder / name(one)
        facts = {**made_from, "settings": json.loads(json.dumps(asdict(one)))}
        row = ending.first(lambda place=place, facts=facts: _read(place, facts), mesh)  # type: ignore[misc]
        if row is None:
            if not _asked(stop, mesh):
                sample(prior, tokenizer, place, mesh, one, stop=stop)
            if _asked(stop, mesh):
                break
            images = SampleFile(place / sample_folder.FILE)
            seen = generation.describe(images, judge.network, mesh, batch=measure_batch)
            row = ending.first(lambda s=one, d=seen: _row(s, d, judge), mesh)  # type: ignore[misc]
            ending.first(lambda place=place, facts=facts, row=row: _write(place, facts, row, keep), mesh)  # type: ignore[misc]
        rows.append(row)
        ending.first(lambda: written.write(folder, {**made_from, **(about or {})}, rows), mesh)
    stop.clear()
    return rows, len(rows) < len(every)


def _asked(stop: StopRequest, mesh: Mesh) -> bool:
    """Whether a rank was asked to stop, the same on every rank. Collective."""
    here = torch.tensor([float(stop.here())], device=mesh.device)
    return bool(ops.sum_over(here, mesh.world) > 0)


def _row(one: Settings, seen: Described, judge: Judge) -> dict[str, Any]:
    dials = {key: value for key, value in asdict(one).items() if key in written.DIALS}
    return {**dials, **generation.compare(seen, judge.reference), "num_images": one.num_images, "seed": one.seed}


def _read(place: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row of a setting that was measured; None if it was not. ValueError if it was of something else."""
    path = place / RESULT
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        row, before = dict(found["row"]), dict(found["facts"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): remove {place}, and it is measured again") from None
    lines = [key for key in facts if before.get(key) != facts[key]]
    if lines:
        raise ValueError(
            f"{place} was measured of something else, {'; '.join(_both(key, before, facts) for key in lines)}: give "
            f"another OUT, or remove {place}"
        )
    return row


def _both(key: str, before: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    old, new = before.get(key) or {}, facts[key]
    parts = [f"{key}.{name} is {new.get(name)}, and was {old.get(name)}" for name in new if old.get(name) != new[name]]
    return "; ".join(parts) or key


def _write(place: Path, facts: Mapping[str, Any], row: Mapping[str, Any], keep: bool) -> None:
    beside = place / f"{RESULT}.tmp"
    beside.write_text(json.dumps({"row": row, "facts": facts}, indent=1) + "\n")
    beside.replace(place / RESULT)
    if not keep:
        (place / sample_folder.FILE).unlink(missing_ok=True)
