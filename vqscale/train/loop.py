"""What training loops share, as functions and small records: resume, agree, log, save, close.

The loops are tokenizer.py and prior.py, each to be read from top to bottom: when which of these is called is said
there, and nothing here calls a loop back.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from vqscale.codes.rows import Table
from vqscale.disk import checkpoint
from vqscale.disk.held import Held
from vqscale.disk.writer import Writer
from vqscale.engine.engine import Engine
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.beginning import Fit
from vqscale.run.folder import RunError, StopRequest, read_json
from vqscale.run.profile import Trace
from vqscale.seed import derive
from vqscale.show.board import Board
from vqscale.show.progress import Progress

T = TypeVar("T")


def seed_step(seed: int, step: int, mesh: Mesh) -> None:
    """Make torch's own randomness (dropout) a function of the step, so that there is no state of it to save."""
    torch.manual_seed(derive(seed, "step", step, mesh.world.rank))


def agree(mesh: Mesh, stop: bool, broken: int, writing: Writer | None = None) -> tuple[bool, int]:
    """(does any rank want to stop, how many broken samples did all ranks meet), the same answer on every rank; and
    what is being written goes on, or raises."""
    state = (0.0, 0.0) if writing is None else writing.state()
    here = torch.tensor([float(stop), float(broken), *state], device=mesh.device)
    stops, every, *states = ops.sum_over(here, mesh.world).tolist()
    if writing is not None:
        writing.advance(*states)
    return stops > 0, int(every)


def check_broken(total: int, here: Iterable[str], limit: int) -> None:
    """RunError on all ranks when more samples were broken than the config allows."""
    if total > limit:
        some = "".join(f"\n  {line}" for line in list(here)[-5:])
        raise RunError(
            f"{total} samples were broken, data.train.max_broken is {limit}: repair or leave out the shards named, "
            f"or raise data.train.max_broken; the last good checkpoint stands. Met here:{some or ' none'}"
        )


def add_share(sums: dict[str, Tensor], values: Mapping[str, Tensor], share: float) -> None:
    """Add share * value to each named sum: the mean over the micro-batches of a step."""
    for name, value in values.items():
        sums[name] = share * value.detach() + sums.get(name, 0.0)


def under(prefix: str, values: Mapping[str, T]) -> dict[str, T]:
    """The values under PREFIX/NAME."""
    return {f"{prefix}/{name}": value for name, value in values.items()}


def mean_over_ranks(values: Mapping[str, Tensor], mesh: Mesh) -> dict[str, float]:
    """The mean of each named number over all ranks. One all-reduce; every rank has the same names."""
    names = sorted(values)
    stacked = torch.stack([values[name].detach().double().to(mesh.device) for name in names])
    return dict(zip(names, (ops.sum_over(stacked, mesh.world) / mesh.world.size).tolist(), strict=True))


def table_rows(tables: Mapping[str, Table], learned: bool) -> dict[str, Tensor]:
    """Rows of all tables by dotted name: the parameters that an optimiser steps, or everything else."""
    found = {}
    for prefix, table in tables.items():
        every = [*table.named_parameters(), *table.named_buffers()]
        found.update({f"{prefix}.{name}": x for name, x in every if x.requires_grad == learned})
    return found


def learned_rows(tables: Mapping[str, Table]) -> dict[str, nn.Parameter]:
    return {name: x for name, x in table_rows(tables, learned=True).items() if isinstance(x, nn.Parameter)}


@dataclass(frozen=True)
class Done:
    """How far a run is: all that the position in the data and the schedule follow from."""

    step: int = 0
    consumed: int = 0
    broken: int = 0
    data: str = ""

    def after(self, step: int, images: int, broken: int) -> Done:
        return replace(self, step=step, consumed=self.consumed + images, broken=self.broken + broken)


class Kept(Protocol):
    """State beside the engine's that belongs into the checkpoints of a run, all of it under NAME/."""

    name: str

    def held(self) -> tuple[dict[str, Held], dict[str, Tensor], dict[str, Any]]: ...
    def loaded(self, facts: Mapping[str, Any]) -> None: ...


def finished_steps(place: str | Path) -> list[Path]:
    """The checkpoints in a run folder, damaged ones too."""
    return checkpoint.finished(Path(place) / "checkpoints")


def is_done(place: str | Path, steps: int) -> bool:
    """Whether a start will find nothing left to do (`finished`), as far as names and the summary tell beforehand."""
    newest = [int(path.name) for path in finished_steps(place)][-1:]
    return newest >= [steps] and read_json(Path(place) / "summary.json").get("steps") == newest[0]


def begins(place: str | Path, mesh: Mesh) -> bool:
    """Whether there is no checkpoint that a run would go on from. What rank 0 finds is what all get; collective."""
    found: bool = ops.gather_objects(not finished_steps(place), mesh.world)[0]
    return found


def writer(place: Path, mesh: Mesh, keep: int) -> Writer:
    """Of the checkpoints of a run; what all ranks raise together, in the order of a loop, does not cut one short."""
    return Writer(place / "checkpoints", mesh, keep, agreed=(RunError, FloatingPointError))


def save(writing: Writer, done: Done, engine: Engine, tables: Mapping[str, Table], more: Sequence[Kept] = ()) -> None:
    """Begin to write a checkpoint of everything; collective."""
    held, rows, facts = _everything(engine, tables, more)
    writing.save(done.step, held, rows, {"done": asdict(done), **facts})


def _everything(
    engine: Engine, tables: Mapping[str, Table], more: Sequence[Kept]
) -> tuple[dict[str, Held], dict[str, tuple[Tensor, int, int]], dict[str, Any]]:
    """(held, rows, facts) of a training, as a checkpoint has them by name."""
    held, rows, engine_facts = engine.held()
    rows, facts = {**rows, **table_rows(tables, learned=False)}, {"engine": engine_facts}
    for kept in more:
        its_held, its_rows, its_facts = kept.held()
        held |= under(kept.name, its_held)
        rows |= under(kept.name, its_rows)
        facts |= {kept.name: its_facts} if its_facts else {}
    return held, {name: (x, *_place(name, tables)) for name, x in rows.items()}, facts


def resume(
    place: Path,
    engine: Engine,
    tables: Mapping[str, Table],
    data: str,
    mesh: Mesh,
    more: Sequence[Kept] = (),
    source: tuple[str, str] = ("data.train.shards", "shards"),
) -> tuple[Done, list[str]]:
    """Go on from the newest whole checkpoint, if there is one; (how far the run is, what to say). Collective.
    `data` is the fingerprint of the training data; `source` the key that names them, and what they are.

    ValueError on all ranks when the data is not what the run was trained on, or when there are checkpoints and none of
    them is whole: to begin again would throw away what the run has logged.
    """
    newest, passed_over = checkpoint.latest(place / "checkpoints", mesh)
    notes = [f"warning: passed over the checkpoint {reason}" for reason in passed_over]
    if newest is None and passed_over:
        raise ValueError(
            f"none of the {len(passed_over)} checkpoints in {place / 'checkpoints'} is whole:\n  "
            + "\n  ".join(passed_over)
            + "\nput one back, or remove them to begin the run again, or change run.folder"
        )
    if newest is None:
        return Done(data=data), [f"a new run in {place} on {mesh.world.size} processes"]
    done = Done(**load(newest, engine, tables, more)["done"])
    if done.data != data:
        raise ValueError(
            f"the run in {place} was trained on data with fingerprint {done.data}, {source[0]} now has {data}: "
            f"the order of samples would be another; give the same {source[1]}, or a new run.folder"
        )
    return done, [*notes, f"going on after step {done.step} of {newest} on {mesh.world.size} processes"]


def finished(place: Path, done: Done, steps: int, mesh: Mesh, progress: Progress) -> dict[str, Any]:
    """The summary of a run that has nothing left to do, and a line that says so; empty if steps are left, or the
    summary of its last step is missing (killed before it was written). What rank 0 finds is what all get; collective.
    """
    found = read_json(place / "summary.json") if mesh.world.rank == 0 else {}
    found = ops.gather_objects(found, mesh.world)[0]
    if done.step < steps or found.get("steps") != done.step:
        return {}
    progress.say(f"the run in {place} is done: {done.step} steps. Raise run.steps to go on, or change run.folder")
    return found


def tell_scores(step: int, scores: Mapping[str, float], board: Board, progress: Progress) -> None:
    """The held-out scores after a step, as curves and as a line."""
    board.scalars(step, under("val", scores))
    progress.say(f"step {step}, held out: " + ", ".join(f"{name} {x:.4g}" for name, x in scores.items()))


def tell_fits(step: int, fits: Mapping[str, Fit], progress: Progress) -> dict[str, float]:
    """Say what was fitted to the latents after a step; its numbers, for the row of the step."""
    for name, fit in fits.items():
        progress.say(f"step {step}, {name}: {fit}")
    return {f"{name}/{key}": x for name, fit in fits.items() for key, x in fit.numbers().items()}


def tell_stop(step: int, request: StopRequest, progress: Progress) -> None:
    """Say why the run leaves after a step that it has saved; the next start is not stopped by the same request."""
    progress.say(f"asked to stop ({request.reason or 'by another rank'}): saved step {step}; run it again to go on")
    request.clear()


def close(batches: Generator[Any, None, None], trace: Trace, board: Board, progress: Progress, summary: T) -> T:
    """End the reading processes too: left to the collector they live on, because parsers keep tracebacks in caches."""
    for note in trace.close():
        progress.say(note)
    batches.close()
    progress.close()
    board.close()
    return summary


def _place(name: str, tables: Mapping[str, Table]) -> tuple[int, int]:
    """(first row here, K) of a row tensor, by the table in its name: KIND/TABLE.TENSOR, or TABLE.TENSOR."""
    layout = tables[name.rpartition("/")[2].rpartition(".")[0]].layout
    return layout.start, layout.num_codes


def load(path: Path, engine: Engine, tables: Mapping[str, Table], more: Sequence[Kept] = ()) -> dict[str, Any]:
    """Bring everything back from a checkpoint of any number of ranks, each its own part; returns its facts.
    Collective."""
    held, rows, _ = _everything(engine, tables, more)
    contents = checkpoint.read(path)
    contents.fill(held, rows)
    for kept in more:
        kept.loaded(contents.facts.get(kept.name, {}))
    engine.loaded(contents.facts["engine"])
    return contents.facts
