"""A sweep of a prior's dials (its SampleConfig): for each setting of them draw images, measure them against one
reference, and keep the whole table.

OUT/sweep.json, sweep.csv, sweep.png    the table so far: every setting that any sweep in OUT has measured, by the dials
OUT/SETTING/                            its samples while it is measured (programs/sampling/draw.py), then result.json
OUT/STOP                                made by hand: the sweep ends as it does for a signal

A setting that some result.json in OUT has is not drawn again, so the same command goes on with what is missing, or with
more settings, or others: the table is made of all of these files that differ in the dials alone. Whether to stop is
asked after every batch that is drawn, and when images have been measured. Not here: what is drawn (sample.py) and what
is measured (metrics/generation.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqscale.disk import files
from vqscale.metrics import generation
from vqscale.metrics.generation import Described, FeatureNetwork
from vqscale.metrics.sample_file import SampleFile
from vqscale.parallel.background import on_first
from vqscale.parallel.mesh import Mesh
from vqscale.programs.sampling import folder as sample_folder
from vqscale.programs.sampling.draw import check, sample
from vqscale.programs.sampling.request import SampleRequest
from vqscale.run.folder import StopRequest, own_signals
from vqscale.show import report
from vqscale.show.sweep_table import Row, Table, ordered
from vqscale.train import loop

if TYPE_CHECKING:
    from vqscale.priors.base import Prior
    from vqscale.priors.config import SampleConfig
    from vqscale.tokenizer.model import Tokenizer

RESULT = "result.json"


@dataclass(frozen=True)
class Scoring:
    """What images are measured by, and the file that they are compared with, which is read when there is need."""

    network: FeatureNetwork
    reference: Path

    def facts(self) -> dict[str, Any]:
        return {"inception": dict(self.network.facts), "reference": report.file(str(self.reference))}


def name(how: SampleConfig) -> str:
    """The folder of a setting, another one for all values of the dials: the first, and those that are not usual."""
    unusual, first = how.unusual(), how.dials()[:1]
    said = [dial for dial in how.dials() if dial in first or dial in unusual]
    return "-".join(_word(dial, getattr(how, dial)) for dial in said) or "usual"


def _word(dial: str, value: Any) -> str:
    return f"{dial}{repr(value).removesuffix('.0')}" if isinstance(value, int | float) else f"{dial}_{value}"


@own_signals()
def sweep(
    prior: Prior,
    tokenizer: Tokenizer,
    scoring: Scoring,
    folder: Path,
    mesh: Mesh,
    every: Sequence[SampleRequest],
    *,
    about: Mapping[str, Any] | None = None,
    keep: bool = False,
    measure_batch: int = 64,
) -> tuple[Table, int]:
    """(the table, how many of the settings are missing, because somebody asked to stop). Collective.

    `every` differ in the dials alone. keep: samples.npz of every setting stays; without, it goes when it is measured.
    """
    made_from = {
        "prior": {"fingerprint": prior.fingerprint},
        "tokenizer": {"fingerprint": tokenizer.fingerprint},
        "judge": on_first(scoring.facts, mesh),
    }
    stop = StopRequest(folder, mesh)
    kind = type(every[0].how)
    every = on_first(lambda: _as_begun(folder, every), mesh)
    facts = {name(one.how): {**made_from, "settings": json.loads(json.dumps(one.facts()))} for one in every}

    def tabled() -> Table:
        table = Table(kind.dials(), _rows(folder, facts[name(every[0].how)], kind))
        if table.rows:
            table.write(folder, {**made_from, **(about or {})})
        return table

    known = on_first(lambda: _known(folder, facts, kind), mesh)
    table, missing = on_first(tabled, mesh), [one for one in every if name(one.how) not in known]
    if missing:
        check(prior, tokenizer, missing[0])
        reference = generation.read_reference(scoring.reference, scoring.network, mesh, batch=measure_batch)
    while missing and not loop.agree(mesh, stop.here(), 0)[0]:
        one, place = missing[0], folder / name(missing[0].how)
        sample(prior, tokenizer, place, mesh, one, stop=stop)
        if loop.agree(mesh, stop.here(), 0)[0]:
            break
        seen = generation.describe(SampleFile(place / sample_folder.FILE), scoring.network, mesh, batch=measure_batch)
        on_first(partial(_write, place, facts[place.name], one, seen, reference, keep), mesh)
        table, missing = on_first(tabled, mesh), missing[1:]
    stop.clear()
    return table, len(missing)


def _as_begun(folder: Path, every: Sequence[SampleRequest]) -> list[SampleRequest]:
    """The requests as the oldest samples and results of the folder were begun."""
    begun = [sample_folder.settings(path.parent) for path in sorted(folder.glob(f"*/{sample_folder.FACTS}"))]
    begun += [_result(path)[1]["settings"] for path in sorted(folder.glob(f"*/{RESULT}"))]
    for settings in begun:
        every = [one.as_begun(settings) for one in every]
    return list(every)


def _results(folder: Path, kind: type[SampleConfig]) -> dict[Path, tuple[Row, Mapping[str, Any]]]:
    """(row, facts) of all settings that were measured in the folder, by their own folders, whatever their names. A
    field that came into being later was what it was before (config.Before).
    """
    found, before = dict[Path, tuple[Row, Mapping[str, Any]]](), kind.before()
    for path in sorted(folder.glob(f"*/{RESULT}")):
        row, facts = _result(path)
        row = {**{dial: before[dial] for dial in kind.dials()}, **row}
        found[path.parent] = row, {**facts, "settings": {**before, **facts["settings"]}}
    return found


def _rows(folder: Path, facts: Mapping[str, Any], kind: type[SampleConfig]) -> list[Row]:
    """The rows of all settings that were measured in the folder and differ from these facts in the dials alone."""
    found = _results(folder, kind).values()
    rows = [row for row, before in found if not _differences(before, facts).keys() - _keys(kind)]
    return ordered(rows, kind.dials())


def _keys(kind: type[SampleConfig]) -> set[str]:
    return {f"settings.{dial}" for dial in kind.dials()}


def _result(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(row, facts) that were written of a setting. ValueError where they cannot be read."""
    try:
        found = json.loads(path.read_text())
        row, facts = dict(found["row"]), dict(found["facts"])
        _identity(facts)
        return row, facts
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): remove {path.parent}, and it is measured again") from None


def _known(folder: Path, wanted: Mapping[str, Mapping[str, Any]], kind: type[SampleConfig]) -> set[str]:
    """Names of those that are measured. ValueError if one was measured of something else."""
    results, found = _results(folder, kind), set()
    for one, facts in wanted.items():
        lines = {place: _differences(before, facts) for place, (_, before) in results.items()}
        same = {place: other for place, other in lines.items() if not _keys(kind) & other.keys()}
        if same and all(same.values()):
            place, other = next(iter(same.items()))
            raise ValueError(
                f"{place} was measured of something else, {'; '.join(other.values())}: give another OUT, or remove "
                f"{place}"
            )
        found |= {one} if same else set()
    return found


def _differences(before: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, str]:
    """What of two facts gives other scores: a line for each name. Files are known by what is in them, not by paths."""
    old, new = _identity(before), _identity(facts)
    return {key: f"{key} is {new.get(key)}, and was {old.get(key)}" for key in new if old.get(key) != new[key]}


def _identity(facts: Mapping[str, Any]) -> dict[str, Any]:
    weights = {f"judge.{what}.sha256": file.get("sha256") for what, file in facts["judge"].items()}
    made_by = {f"{what}.fingerprint": facts[what]["fingerprint"] for what in ("prior", "tokenizer")}
    return {**made_by, **weights, **{f"settings.{key}": value for key, value in facts["settings"].items()}}


def _write(
    place: Path, facts: Mapping[str, Any], one: SampleRequest, seen: Described, reference: Described, keep: bool
) -> None:
    """Compare what was seen of a setting's images with the reference, and write its result."""
    row = {dial: getattr(one.how, dial) for dial in one.how.dials()}
    row |= {**generation.compare(seen, reference), "num_images": one.num_images, "seed": one.seed}
    files.write_json(place / RESULT, {"row": row, "facts": facts})
    if not keep:
        (place / sample_folder.FILE).unlink(missing_ok=True)
