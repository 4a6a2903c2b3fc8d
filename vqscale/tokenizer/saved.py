"""Find a trained model on disk and read it: a run folder, one of its checkpoint folders, or an exported folder.

    RUN/                            run.yaml says what it is; its newest whole checkpoint has the weights
    RUN/checkpoints/0000001000/     that checkpoint: replicated tensors and rows by global number
    EXPORTED/                       model.safetensors and card.json, as export.py writes them

Everything is checked before it is used: checksums (by rank 0), names and shapes. A rank reads its own rows only. Not
here: what a tokenizer or a prior is, and how it is built, and weights of other projects (tools).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vqscale import config as configuration
from vqscale.config.text import data_of
from vqscale.disk import checkpoint, manifest
from vqscale.nets.weights import check_shapes
from vqscale.parallel import ops
from vqscale.parallel.background import on_first
from vqscale.parallel.mesh import Mesh
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.export import CARD, FORMATS, VERSION, WEIGHTS, Entry, Kind, card_file, entries
from vqscale.tokenizer.run_files import Weights, facts_of_run, run_config

T = TypeVar("T")
NOT_FACTS = ("format", "version", "fingerprint", "config", "weights")


@dataclass(frozen=True)
class Wanted:
    """A tensor of a model on disk: the shape of all of it, and what is to be read of it."""

    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    """of rows over the code axis the first that is read, and the last + 1"""
    read: bool = True
    """False: it has to be there, and no more"""


@dataclass(frozen=True)
class Saved:
    """A model on disk: how to build it, what is known of it, and `fill`, which puts its weights into the built."""

    path: Path
    config: Any
    card: dict[str, Any]
    _read: Callable[[Mapping[str, Wanted]], dict[str, Tensor]]

    def fill(self, module: nn.Module, mesh: Mesh) -> None:
        """Copy the weights into the parameters of a module, on each rank its own rows. Collective."""
        wanted = entries(module)
        tensors = self.tensors({name: Wanted(entry.shape, _range(entry)) for name, entry in wanted.items()}, mesh)
        with torch.no_grad():
            for name, entry in wanted.items():
                entry.tensor.copy_(tensors[name])
        self.check_finite({name: entry.tensor for name, entry in wanted.items()}, mesh)

    def tensors(self, wanted: Mapping[str, Wanted], mesh: Mesh) -> dict[str, Tensor]:
        """What is wanted of a model, all of whose tensors are told; collective, each rank its own rows. ValueError on
        all ranks where names or shapes are others."""
        return _together(lambda: self._read(wanted), mesh)

    def check_finite(self, taken: Mapping[str, Tensor], mesh: Mesh) -> None:
        """ValueError on all ranks if any took what is not finite."""
        wrong = [name for name, x in taken.items() if not x.isfinite().all()]
        _together(lambda: _check_finite(self.path, wrong), mesh)


def _check_finite(path: Path, wrong: Sequence[str]) -> bool:
    if wrong:
        raise ValueError(
            f"{path}: {', '.join(wrong[:3])} has values that are not finite, and so would be all that follows from it: "
            "load another checkpoint"
        )
    return True


def find(
    path: str | Path, mesh: Mesh, weights: Weights = "average", task: Kind = "tokenizer", schema: Any = TokenizerConfig
) -> Saved:
    """What lies at `path`, its checksums verified; collective. ValueError on all ranks if any cannot use it.

    `task` is what is looked for: the task of a run, which is the model's key in its config, or the kind of an exported
    folder. `schema` is the type of its config.
    """
    path = Path(path)
    if weights not in ("average", "parameters"):
        raise ValueError(f"weights are {weights!r}, and a checkpoint has 'average' and 'parameters': give one of them")
    found = _result(on_first(lambda: _attempt(lambda: _verified(path, task)), mesh))
    assert found is not None
    return _together(lambda: _read(found, weights, task, schema), mesh)


def config_of(path: str | Path, task: Kind = "tokenizer", schema: Any = TokenizerConfig) -> Any:
    """The config of what lies at `path`, as `find` gives it, without a look at the weights."""
    path = Path(path)
    if card_file(path).is_file():
        return configuration.parse(schema, _card(path, task)["config"], source=f"{path / CARD}: config", written=True)
    file = run_file(path)
    if file is None:
        raise ValueError(
            f"{path} has neither {CARD} nor run.yaml: give the folder of a {task} that was trained or saved"
        )
    return configuration.parse(schema, run_config(file, path, task)[task], source=f"{file}: {task}", written=True)


def kind_of(path: str | Path) -> str | None:
    """What lies at `path`, as its card or its run.yaml says; None where neither can be read, and `find` tells why."""
    formats = {said: kind for kind, said in FORMATS.items()}
    file = run_file(path)
    try:
        if card_file(Path(path)).is_file():
            return formats.get(json.loads(card_file(Path(path)).read_text(encoding="utf-8"))["format"])
        return None if file is None else str(data_of(file)["task"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def run_file(path: str | Path) -> Path | None:
    """The run.yaml of a run folder, or of the run that a checkpoint folder lies in; None where there is none."""
    beside = (Path(path) / "run.yaml", Path(path).absolute().parent.parent / "run.yaml")
    return next((file for file in beside if file.is_file()), None)


def _read(found: Path, weights: Weights, task: Kind, schema: Any) -> Saved:
    if card_file(found).is_file():
        return _exported(found, task, schema)
    return _trained(found, weights, task, schema)


def _verified(path: Path, task: Kind) -> Path:
    """The folder whose weights are meant, every byte of them checked."""
    if card_file(path).is_file():
        _check_weights(path, _card(path, task), task)
        return path
    if (path / manifest.NAME).is_file():
        damage = manifest.damage(path)
        if damage is not None:
            raise ValueError(
                f"the checkpoint {path} is not whole: {damage}; load another checkpoint of this run, or the "
                "run folder, which takes the newest whole one"
            )
        return path
    if (path / "run.yaml").is_file():
        newest, passed_over = checkpoint.latest(path / "checkpoints")
        if newest is None:
            why = "".join(f"\n  {reason}" for reason in passed_over)
            raise ValueError(
                f"the run in {path} has no whole checkpoint in {path / 'checkpoints'}, and so nothing to "
                f"load: train it until it has saved once (run.checkpoint_every), or give another run{why}"
            )
        for reason in passed_over:
            warnings.warn(f"passed over the checkpoint {reason}", stacklevel=2)
        return newest
    if not path.is_dir():
        what = "is no folder" if path.exists() else f"does not exist (looked from {Path.cwd()})"
    elif (path / WEIGHTS).exists() or (path / f"{WEIGHTS}.tmp").exists():
        what = f"has weights and no {CARD}: writing it was not finished"
    else:
        what = f"has neither {CARD} nor run.yaml nor {manifest.NAME}"
    raise ValueError(
        f"{path} {what}: give a run folder, a folder NNNNNNNNNN in its checkpoints, or a folder that a "
        f"{task} was saved to"
    )


def _card(folder: Path, task: Kind) -> dict[str, Any]:
    try:
        card = json.loads(card_file(folder).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CARD} cannot be read ({error}): save the {task} again") from None
    kind = card.get("format") if isinstance(card, dict) else type(card).__name__
    if kind != FORMATS[task]:
        raise ValueError(
            f"{folder / CARD} is the card of {kind!r} and not of a {FORMATS[task]!r}: give a folder that a "
            f"{task} was saved to, or the folder of a run that trained one"
        )
    if card.get("version") != VERSION:
        raise ValueError(
            f"{folder / CARD} has version {card.get('version')}, and this code reads version {VERSION}: "
            f"use the vqscale that wrote it, or save the {task} again with this one"
        )
    lacks = [key for key in ("config", "weights", "fingerprint") if key not in card]
    if lacks:
        raise ValueError(f"{folder / CARD} lacks {', '.join(lacks)}: save the {task} again")
    return card


def _check_weights(folder: Path, card: Mapping[str, Any], task: Kind) -> None:
    file, entry = folder / WEIGHTS, card["weights"]
    if not file.is_file():
        raise ValueError(
            f"{file}, the weights that {CARD} speaks of, does not exist: put it back, or save the {task} again"
        )
    here = manifest.seal(file)
    for key, unit in (("bytes", "bytes"), ("sha256", "as sha256")):
        if here[key] != entry.get(key):
            raise ValueError(
                f"{file} has {here[key]} {unit}, and {folder / CARD} says {entry.get(key)}: the file was cut "
                "off or exchanged after it was written; copy the folder again"
            )


def _exported(folder: Path, task: Kind, schema: Any) -> Saved:
    card = _card(folder, task)
    config = configuration.parse(schema, card["config"], source=f"{folder / CARD}: config", written=True)

    def read(wanted: Mapping[str, Wanted]) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open  # here: who only computes needs no files

        try:
            with safe_open(folder / WEIGHTS, framework="pt") as file:
                given = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
                check_shapes(_shapes(wanted), {n: x.get_shape() for n, x in given.items()}, what=str(folder))
                return {
                    name: given[name][:] if each.rows is None else given[name][slice(*each.rows)]
                    for name, each in wanted.items()
                    if each.read
                }
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / WEIGHTS} cannot be read ({error}): copy the folder again") from None

    facts = {key: value for key, value in card.items() if key not in NOT_FACTS}
    return Saved(folder, config, facts, read)


def _trained(folder: Path, weights: Weights, task: Kind, schema: Any) -> Saved:
    """A checkpoint: its run.yaml is two folders up."""
    run = folder.absolute().parent.parent
    asked = run_config(run / "run.yaml", folder, task)
    config = configuration.parse(schema, asked[task], source=f"{run / 'run.yaml'}: {task}", written=True)
    order = ("average/", "parameter/", "buffer/", "") if weights == "average" else ("parameter/", "buffer/", "")

    def read(wanted: Mapping[str, Wanted]) -> dict[str, Tensor]:
        contents = checkpoint.read(folder)
        rows = {name: each.rows for name, each in wanted.items() if each.rows is not None}
        kinds = {name: contents.rows if name in rows else contents.ranges for name in wanted}
        in_file = {name: _first(name, order, kinds[name]) for name in wanted}
        for name in filter(in_file.get, rows):
            contents.check_rows(in_file[name], wanted[name].shape[0])
        given = {name: kinds[name][key]["shape"] for name, key in in_file.items() if key}
        for key in [*contents.ranges, *contents.rows]:  # parameters of another network must not go unnoticed
            if key.startswith("parameter/"):
                given.setdefault(key.removeprefix("parameter/"), ())
        check_shapes(_shapes(wanted), given, what=str(folder))
        return {
            name: contents.some_rows(key, *rows[name], wanted[name].shape[0]) if name in rows else contents.whole(key)
            for name, key in in_file.items()
            if wanted[name].read
        }

    return Saved(folder, config, facts_of_run(run, folder, asked, weights), read)


def _first(name: str, order: tuple[str, ...], there: Mapping[str, Any]) -> str:
    return next((prefix + name for prefix in order if prefix + name in there), "")


def _shapes(wanted: Mapping[str, Wanted]) -> dict[str, tuple[int, ...]]:
    return {name: each.shape for name, each in wanted.items()}


def _range(entry: Entry) -> tuple[int, int] | None:
    """The rows of a table that are this rank's."""
    return None if entry.table is None else (entry.table.layout.start, entry.table.layout.stop)


def _attempt(work: Callable[[], T]) -> tuple[T | None, str]:
    try:
        return work(), ""
    except (ValueError, OSError) as error:
        return None, str(error) or type(error).__name__


def _result(outcome: tuple[T | None, str]) -> T | None:
    if outcome[1]:
        raise ValueError(outcome[1])
    return outcome[0]


def _together(work: Callable[[], T], mesh: Mesh) -> T:
    """work() of this rank; ValueError on all ranks if it failed on any of them, or the others would wait for it."""
    result, failure = _attempt(work)
    for other in ops.gather_objects(failure, mesh.world):
        if other:
            raise ValueError(other)
    assert result is not None
    return result
