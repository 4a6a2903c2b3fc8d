"""A sweep of sampling settings: for each draw images, measure them against one reference, and keep the whole table.

OUT/sweep.json, sweep.csv, sweep.png    the table so far: every setting that any sweep in OUT has measured, by the dials
OUT/SETTING/                            samples of a setting while it is measured (programs/sample.py), then result.json
OUT/STOP                                made by hand: the sweep leaves as it does for a signal

A setting whose result.json is there is not drawn again, so the same command goes on with what is missing, or with more
settings, or others: the table is made of all of these files that differ in the dials alone. A request to stop is heard
after every batch that is drawn, and when images have been measured. Not here: what is drawn (sample.py) and what is
measured (metrics/generation.py).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqscale.disk import files
from vqscale.metrics import generation
from vqscale.metrics.generation import Described, Network
from vqscale.metrics.sample_file import SampleFile
from vqscale.parallel.mesh import Mesh
from vqscale.programs import sample_folder
from vqscale.programs.sample import check, sample
from vqscale.programs.sample_settings import Settings
from vqscale.run import processes
from vqscale.run.folder import StopRequest
from vqscale.show import report
from vqscale.show import sweep_table as written
from vqscale.train import loop

if TYPE_CHECKING:
    from vqscale.priors.base import Prior
    from vqscale.tokenizer.model import Tokenizer

RESULT = "result.json"


@dataclass(frozen=True)
class Judge:
    """What images are measured by, and the file that they are compared with, which is read when there is need."""

    network: Network
    reference: Path

    def facts(self) -> dict[str, Any]:
        return {"inception": dict(self.network.facts), "reference": report.file(str(self.reference))}


def settings(base: Settings, dials: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """Every combination of the dials' positions, the last dial turning fastest. ValueError for what cannot be drawn."""
    problems = [
        f"--{name.replace('_', '-')} names no value: give some, such as 1,1.5,2"
        for name, values in dials.items()
        if not values
    ]
    turned = {name: values for name, values in dials.items() if values}
    made = [replace(base, **dict(zip(turned, values, strict=True))) for values in itertools.product(*turned.values())]
    problems += dict.fromkeys(problem for one in made for problem in one.problems())
    if problems:
        raise ValueError("; ".join(problems))
    return list(dict.fromkeys(made))


def name(one: Settings) -> str:
    """The folder of a setting, another one for every position of the dials."""
    guidance, temperature, share = (repr(x).removesuffix(".0") for x in (one.guidance, one.temperature, one.top_p))
    words = [f"guidance{guidance}", f"temperature{temperature}"]
    words += [one.schedule] * (one.schedule != "constant")
    words += [f"top{one.top_k}"] * bool(one.top_k) + [f"share{share}"] * (one.top_p < 1)
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
) -> tuple[list[written.Row], int]:
    """(rows of the table, how many of the settings are missing, because somebody asked to stop). Collective.

    `every` differ in the dials alone. keep: samples.npz of every setting stays; without, it goes when it is measured.
    """
    made_from = {
        "prior": {"fingerprint": prior.fingerprint},
        "tokenizer": {"fingerprint": tokenizer.fingerprint},
        "judge": processes.first(judge.facts, mesh),
    }
    stop = StopRequest(folder, mesh)
    facts = {name(one): {**made_from, "settings": json.loads(json.dumps(asdict(one)))} for one in every}

    def tabled() -> list[written.Row]:
        rows = _rows(folder, facts[name(every[0])])
        if rows:
            written.write(folder, {**made_from, **(about or {})}, rows)
        return rows

    known = processes.first(lambda: {place for place in facts if _measured(folder / place, facts[place])}, mesh)
    rows, missing = processes.first(tabled, mesh), [one for one in every if name(one) not in known]
    if missing:
        check(prior, tokenizer, missing[0])
        reference = generation.read_reference(judge.reference, judge.network, mesh, batch=measure_batch)
    while missing and not loop.agree(mesh, stop.here(), 0)[0]:
        one, place = missing[0], folder / name(missing[0])
        sample(prior, tokenizer, place, mesh, one, stop=stop)
        if loop.agree(mesh, stop.here(), 0)[0]:
            break
        seen = generation.describe(SampleFile(place / sample_folder.FILE), judge.network, mesh, batch=measure_batch)
        processes.first(partial(_write, place, facts[place.name], one, seen, reference, keep), mesh)
        rows, missing = processes.first(tabled, mesh), missing[1:]
    stop.clear()
    return rows, len(missing)


def _rows(folder: Path, facts: Mapping[str, Any]) -> list[written.Row]:
    """The rows of all settings that were measured in the folder and differ from these facts in the dials alone."""
    found = [_result(path) for path in folder.glob(f"guidance*/{RESULT}")]
    dials = {f"settings.{dial}" for dial in written.DIALS}
    return written.ordered([row for row, before in found if not _differences(before, facts).keys() - dials])


def _result(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(row, facts) that were written of a setting. ValueError where they cannot be read."""
    try:
        found = json.loads(path.read_text())
        row, facts = dict(found["row"]), dict(found["facts"])
        _identity(facts)
        return row, facts
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): remove {path.parent}, and it is measured again") from None


def _measured(place: Path, facts: Mapping[str, Any]) -> bool:
    """Whether this setting was measured. ValueError if it was of something else."""
    if not (place / RESULT).exists():
        return False
    lines = _differences(_result(place / RESULT)[1], facts).values()
    if lines:
        raise ValueError(
            f"{place} was measured of something else, {'; '.join(lines)}: give another OUT, or remove {place}"
        )
    return True


def _differences(before: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, str]:
    """What of two facts gives other scores: a line for each name. Files are known by what is in them, not by paths."""
    old, new = _identity(before), _identity(facts)
    return {key: f"{key} is {new.get(key)}, and was {old.get(key)}" for key in new if old.get(key) != new[key]}


def _identity(facts: Mapping[str, Any]) -> dict[str, Any]:
    weights = {f"judge.{what}.sha256": file.get("sha256") for what, file in facts["judge"].items()}
    made_by = {f"{what}.fingerprint": facts[what]["fingerprint"] for what in ("prior", "tokenizer")}
    return {**made_by, **weights, **{f"settings.{key}": value for key, value in facts["settings"].items()}}


def _write(
    place: Path, facts: Mapping[str, Any], one: Settings, seen: Described, reference: Described, keep: bool
) -> None:
    """Compare what was seen of a setting's images with the reference, and write its result."""
    dials = {key: value for key, value in asdict(one).items() if key in written.DIALS}
    row = {**dials, **generation.compare(seen, reference), "num_images": one.num_images, "seed": one.seed}
    files.write_json(place / RESULT, {"row": row, "facts": facts})
    if not keep:
        (place / sample_folder.FILE).unlink(missing_ok=True)
