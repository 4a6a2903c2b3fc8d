"""Begin a run from a model that is there (init of a run).

First weights are taken once: a run that has a checkpoint goes on from that, and never looks at the folder again. What
is taken is the same to the bit; what the folder has in another size is brought to this one where that means something:
rows of codes are kept, and more of them drawn; positions are resized; the maps between latents and codes begin anew for
codes of another dim. Everything else that differs is refused, before any process group is made (`check`).

Not here: which settings may differ (config/first_weights.py), how a folder is read (tokenizer/saved.py), a
discriminator (adversarial.py), and what of the model is trained (frozen.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqscale import priors
from vqscale.codes.codebook import Codebook
from vqscale.disk import manifest
from vqscale.parallel.mesh import Mesh
from vqscale.priors.base import Prior
from vqscale.priors.config import PriorConfig
from vqscale.quantizers.beginning import draw_beyond
from vqscale.seed import derive
from vqscale.tokenizer import run_files, saved
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.export import CARD, Entry, entries
from vqscale.tokenizer.matching import ids_of
from vqscale.tokenizer.model import Tokenizer
from vqscale.tokenizer.saved import Saved, Wanted
from vqscale.train import loop
from vqscale.train.adversarial import check_taken
from vqscale.train.config import Run, TokenizerRun
from vqscale.train.config.first_weights import Init, misfits
from vqscale.train.frozen import Model, check_learns, freeze, frozen_parts, part_of

NOTE = run_files.INIT
_SCHEMAS: dict[str, Any] = {"tokenizer": TokenizerConfig, "prior": PriorConfig}
_MAPS = ("quant_conv", "post_quant_conv")  # between latents and codes, of the dim of codes


@dataclass
class Taken:
    """What a run began with: what to say of it, and what its folder keeps; nothing where a run goes on."""

    source: Path | None = None
    """the checkpoint or folder, every byte of it checked"""
    lines: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fits:
    """How the tensors of a model get first values, by name: theirs, theirs in another size, or those drawn anew."""

    there: dict[str, Entry]
    """theirs, as shapes"""
    same: list[str] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    positions: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    @property
    def taken(self) -> list[str]:
        return [*self.same, *self.rows, *self.positions]


def check(config: Run) -> None:
    """ValueError for first weights and frozen parts that cannot be, before any process group is made; nothing where
    the run goes on. Looks at configs and shapes, not at the weights."""
    alone = Mesh()
    mine = _on_meta(getattr(config, config.task), alone)
    if config.init is not None and not loop.finished_steps(config.run.folder):
        _check_frozen(config, mine, _fits(config.init, mine, _config_of(config.init), alone))
        if isinstance(config, TokenizerRun) and "discriminator" in config.init.parts:
            check_taken(config)
    freeze(config, mine)
    check_learns(config, mine)


def take(config: Run, model: Model, mesh: Mesh) -> Taken:
    """Put what init names into a model that was just built, unless the run has a checkpoint to go on from. Collective;
    ValueError on all ranks for what cannot be taken. Before an engine holds the model."""
    init = config.init
    if init is None:
        return Taken()
    found = _take(init, model, mesh) if loop.begins(config.run.folder, mesh) else Taken()
    if isinstance(model, Tokenizer) and "codes" in init.parts:
        model.quantizer.settle()
    if found.facts and isinstance(model, Tokenizer) and {"encoder", "codes"} <= set(frozen_parts(config)):
        theirs = Tokenizer.load(init.from_, mesh=mesh, weights=init.weights)
        found.facts["ids_of"] = list(ids_of(theirs))
    return found


def _on_meta(config: Any, mesh: Mesh) -> Model:
    """The model of a config as shapes, of which this rank has the rows that it has on `mesh`."""
    shapes = copy(mesh)
    shapes.device = torch.device("meta")
    with torch.random.fork_rng(devices=[]), shapes.device:
        if isinstance(config, TokenizerConfig):
            return Tokenizer.from_config(config, shapes)
        return priors.build(config, shapes)


def _config_of(init: Init) -> Any:
    """The config of the model that init names, of a folder that has weights too."""
    path = Path(init.from_)
    found = saved.config_of(path, init.model, _SCHEMAS[init.model])
    if not any((path / name).is_file() for name in (CARD, manifest.NAME)) and not loop.finished_steps(path):
        raise ValueError(
            f"init.from is {path}, a run that has not saved a checkpoint yet: train it until it has "
            "(run.checkpoint_every), or name another one"
        )
    return found


def _fits(init: Init, model: Model, theirs: Any, mesh: Mesh) -> Fits:
    """How a model begins from one of the config `theirs`. ValueError for all in which they differ and must not."""
    different = misfits(init, theirs, model.config)
    if different:
        raise ValueError(
            f"init takes {', '.join(init.parts)} of {init.from_}, whose weights mean something else with the settings "
            f"here; {init.model}.KEY: there -> here\n  "
            + "\n  ".join(different)
            + "\nuse the settings there, or leave the parts that they are about out of init.parts"
        )
    there = entries(_on_meta(theirs, mesh))
    places, fits, wrong, own = _positions(model), Fits(there), list[str](), entries(model)
    turned = getattr(theirs, "grid", None) != getattr(model.config, "grid", None)  # though it may have as many places
    for name, entry in _taken_entries(init, model).items():
        other = there.get(name)
        if other is None:
            (wrong if isinstance(entry.tensor, nn.Parameter) else fits.new).append(name)
        elif other.shape == entry.shape and not (name in places and turned):
            fits.same.append(name)
        elif entry.table is not None and other.shape[1:] == entry.shape[1:]:
            fits.rows.append(name)
        elif name in places and other.shape[1:] == entry.shape[1:]:
            fits.positions.append(name)
        elif name.partition(".")[0] in _MAPS and "codes" not in init.parts:
            fits.new.append(name)
        else:
            wrong.append(f"{name} is {other.shape} there and {entry.shape} here")
    wrong += [f"{name} is not here" for name in there if part_of(model, name) in init.parts and name not in own]
    if wrong:
        raise ValueError(
            f"init takes {', '.join(init.parts)} of {init.from_}, and {len(wrong)} tensors do not fit: "
            f"{'; '.join(wrong[:4])}: use the sizes there, or leave the part out of init.parts"
        )
    return fits


def _taken_entries(init: Init, model: Model) -> dict[str, Entry]:
    """What init names of a model, by name; the vectors and clusters of codes, a prior has from its tokenizer."""
    elsewhere = ["clusters.cluster_k"]
    if isinstance(model, Prior) and model.config.head.wants_features:
        elsewhere.append("head.inputs.rows")
    return {
        name: entry
        for name, entry in entries(model).items()
        if part_of(model, name) in init.parts and not name.endswith(tuple(elsewhere))
    }


def _positions(model: nn.Module) -> set[str]:
    """The names of parameters that have a row for each place of a grid."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in model.named_modules()
        for name in getattr(part, "grid_parameters", ())
    }


@torch.no_grad()
def _take(init: Init, model: Model, mesh: Mesh) -> Taken:
    source = saved.find(init.from_, mesh, init.weights, init.model, _SCHEMAS[init.model])
    fits, mine = _fits(init, model, source.config, mesh), _taken_entries(init, model)
    there = fits.there
    given = source.tensors({name: _wanted(x, mine.get(name)) for name, x in there.items()}, mesh)
    for name in fits.same:
        mine[name].tensor.copy_(given[name])
    for name in fits.rows:
        mine[name].tensor[: len(given[name])].copy_(given[name])
    for name in fits.positions:
        place = mine[name].tensor
        place.copy_(_resized(given[name], _grid(given[name], source.config), _grid(place, model.config)))
    more = {name: (there[name].shape[0], mine[name].shape[0]) for name in fits.rows}
    if isinstance(model, Tokenizer):
        for name, (known, count) in more.items():
            table = mine[name].table
            if known < count and isinstance(table, Codebook):
                draw_beyond(table, known, derive(0, "added codes", name))
    source.check_finite({name: mine[name].tensor for name in fits.taken}, mesh)
    return _told(init, source, model, fits, more)


def _wanted(theirs: Entry, mine: Entry | None) -> Wanted:
    """What is read of one of their tensors: of rows those that this rank has a place for."""
    read = mine is not None
    if theirs.table is None:
        return Wanted(tuple(theirs.shape), read=read)
    known = theirs.shape[0]
    layout = None if mine is None or mine.table is None else mine.table.layout
    rows = (0, 0) if layout is None else (min(layout.start, known), min(layout.stop, known))
    return Wanted(tuple(theirs.shape), rows, read)


def _grid(positions_TD: Tensor, config: Any) -> tuple[int, ...]:
    """The sides of the grid that positions are of: that of the ids, or else a square."""
    sides = tuple(getattr(config, "grid", None) or ())
    count = len(positions_TD)
    return sides if math.prod(sides) == count and sides else (math.isqrt(count),) * 2


def _resized(positions_TD: Tensor, sides: Sequence[int], to: Sequence[int]) -> Tensor:
    """Positions of a grid of other sides, linearly between those that there are."""
    x_1Dg = positions_TD.float().t().unflatten(1, tuple(sides))[None]
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(sides)]
    return F.interpolate(x_1Dg, size=tuple(to), mode=mode)[0].flatten(1).t()


def _told(init: Init, source: Saved, model: Model, fits: Fits, more: Mapping[str, tuple[int, int]]) -> Taken:
    """What was taken, in words and as facts."""
    numbers: dict[str, int] = {part: 0 for part in init.parts if part in model.parts}
    for name, entry in _taken_entries(init, model).items():
        numbers[part_of(model, name)] += math.prod(entry.shape) * (name in fits.taken)
    origin = source.card.get("origin", "")
    head = f"first weights from {source.path}" + (f" ({origin})" if origin else "")
    lines = [f"{head}: " + ", ".join(f"{part} {count:,} numbers" for part, count in numbers.items())]
    lines += ["first weights: those of its discriminator too"] if "discriminator" in init.parts else []
    lines += [f"first weights: {text}" for text in _changes(fits, more)]
    facts = {"from": str(source.path), "origin": origin, "weights": init.weights}
    facts |= {"parts": list(init.parts), "numbers": numbers}
    rows = {name: {"there": known, "here": count} for name, (known, count) in more.items()}
    return Taken(source.path, lines, facts | {"rows": rows, "positions": fits.positions, "new": fits.new})


def _changes(fits: Fits, more: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    for name, (known, count) in more.items():
        kept = f"{min(known, count):,} of the {known:,} rows of {name} are kept"
        yield kept + (f", and {count - known:,} are new" if count > known else "")
    if fits.positions:
        yield f"resized to another grid: {', '.join(fits.positions)}"
    if fits.new:
        yield f"made new: {', '.join(fits.new)}"


def _check_frozen(config: Run, model: Model, fits: Fits) -> None:
    """ValueError where what is frozen would be made new."""
    frozen, anew = frozen_parts(config), (*fits.new, *fits.rows, *fits.positions)
    changed = [name for name in anew if part_of(model, name) in frozen]
    if changed:
        raise ValueError(
            f"trained is {list(config.trained or ())}, and {', '.join(changed[:3])} would be of another size than "
            f"in {config.init.from_ if config.init else ''}, so that what is new in it never learns: train that part, "
            "or use the sizes there"
        )
