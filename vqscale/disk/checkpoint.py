"""Checkpoints that any number of processes can read, and that are either whole or not there.

    FOLDER/0000001000/
      manifest.json      size and sha256 of every other file, and who wrote which rows; written last
      facts.json         plain facts (step, configuration, samples seen, ...)
      replicated.pt      tensors that are equal on all ranks, by name
      rows/NAME/START/   zarr v3: rows START.. of the K-row tensor NAME, one array per writer, so that no two ranks
                         ever write one file; the manifest lists the arrays, a reader takes any range of global rows

A checkpoint is written as NNNNNNNNNN.tmp, made durable (fsync) and renamed: a killed process leaves a .tmp, which the
next save removes. What fails on one rank is raised on all. Not here: what belongs into a checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import zarr
from torch import Tensor

from vqscale.disk import files, manifest
from vqscale.disk.arrays import open_array
from vqscale.errors import ExplainedError
from vqscale.parallel import ops
from vqscale.parallel.mesh import Axis, Mesh

T = TypeVar("T")
CHUNK_BYTES = 32 << 20


class CheckpointError(ExplainedError):
    """A checkpoint could not be written or read; raised on all ranks, the checkpoints before it stand."""


@dataclass(frozen=True)
class State:
    """What `load` gives: tensors equal on all ranks, this rank's rows, and facts."""

    replicated: dict[str, Tensor]
    rows: dict[str, Tensor]
    facts: dict[str, Any]


def save(
    folder: Path | str,
    step: int,
    *,
    replicated: Mapping[str, Tensor],
    rows: Mapping[str, tuple[Tensor, int, int]],
    facts: Mapping[str, Any],
    mesh: Mesh,
    keep: int,
) -> Path:
    """Write FOLDER/<step> and return it; collective, every rank gives its own rows as (rows_k..., start, K).

    Rank 0 writes `replicated` and `facts` (those of other ranks are not looked at); rows are written by the ranks of
    the first replica. Afterwards the newest `keep` checkpoints up to this step are there, older ones are removed.
    CheckpointError on all ranks if any of them failed; then FOLDER is as before.
    """
    assert keep >= 1, f"keep {keep} would remove the checkpoint just written"
    folder = Path(folder)
    final = folder / f"{step:010d}"
    new = folder / f"{final.name}.tmp"
    first = mesh.world.rank == 0
    try:
        _agree(lambda: _clear(folder, new) if first else None, mesh.world)
        mine = rows if mesh.data.rank == 0 else {}
        written = _agree(lambda: _write(new, replicated, mine, facts, first), mesh.world)
        _agree(lambda: _finish(new, final, written, step, keep) if first else None, mesh.world)
    except CheckpointError as error:
        if first:
            shutil.rmtree(new, ignore_errors=True)
        standing = [path for path in _finished(folder) if path != final]
        raise CheckpointError(
            f"the checkpoint of step {step} was not written: {error}. The last good one stands: "
            f"{standing[-1] if standing else 'there is none yet'}. Make room under {folder}, or keep fewer checkpoints"
        ) from None
    return final


def latest(folder: Path | str, mesh: Mesh | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all what the manifest says, and why newer ones were passed over.

    With a mesh it is collective: rank 0 reads the files, all ranks get its answer.
    """

    def search() -> tuple[Path | None, list[str]]:
        passed_over: list[str] = []
        for path in reversed(_finished(Path(folder))):
            damage = manifest.damage(path)
            if damage is None:
                return path, passed_over
            passed_over.append(f"{path}: {damage}")
        return None, passed_over

    if mesh is None:
        return search()
    return _agree(lambda: search() if mesh.world.rank == 0 else (None, []), mesh.world)[0]


def load(path: Path | str, *, rows: Mapping[str, tuple[int, int, int]], mapped: bool = False) -> State:
    """Read a checkpoint: all that is replicated, and of every named K-row tensor the rows [start, stop).

    `rows` maps names to (start, stop, K); any number of ranks reads what any other number wrote. Not collective.
    With `mapped` what is replicated is read from the file when it is looked at, so that moments nobody wants take no
    memory: copy what is wanted, at once. ValueError where the checkpoint has no such tensor, or one of another K.
    """
    path = Path(path)
    try:
        layout = manifest.read(path)["rows"]
    except ValueError as error:
        raise ValueError(f"{path} is not a whole checkpoint: {error}; start from another one") from None
    read = {name: _read_rows(path, name, layout, *wanted) for name, wanted in rows.items()}
    replicated = torch.load(path / "replicated.pt", map_location="cpu", weights_only=True, mmap=mapped)
    return State(replicated, read, json.loads((path / "facts.json").read_text()))


def _agree(work: Callable[[], T], axis: Axis) -> list[T]:
    """work() of every rank, in rank order; where it failed on any rank, CheckpointError on all that names the first."""
    try:
        outcome: tuple[T | None, str] = (work(), "")
    except Exception as error:
        cause: BaseException = error
        while cause.__context__ is not None:  # torch.save buries "no space left" under an error of its own
            cause = cause.__context__
        outcome = (None, f"{type(cause).__name__}: {cause}")
    outcomes = ops.gather_objects(outcome, axis)
    for rank, (_, failure) in enumerate(outcomes):
        if failure:
            raise CheckpointError(f"rank {rank}: {failure}" if axis.size > 1 else failure)
    return [result for result, _ in outcomes]


def _finished(folder: Path) -> list[Path]:
    """Checkpoints that were renamed into place, oldest first; whether they are undamaged is another question."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if len(path.name) == 10 and path.name.isdigit())


def _clear(folder: Path, new: Path) -> None:
    """Make the folder of a new checkpoint, and remove what killed runs left."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.tmp"):
        shutil.rmtree(left)
    new.mkdir()


def _write(
    new: Path,
    replicated: Mapping[str, Tensor],
    rows: Mapping[str, tuple[Tensor, int, int]],
    facts: Mapping[str, Any],
    first: bool,
) -> dict[str, Any]:
    """Write this rank's files; returns its share of the manifest. Only this rank's files are touched."""
    written: list[Path] = []
    if first:
        # A view would drag the whole storage behind it into the file.
        whole = {name: x.detach().cpu() for name, x in replicated.items()}
        whole = {name: x.clone() if x.untyped_storage().nbytes() > x.nbytes else x for name, x in whole.items()}
        with files.writing(new / "replicated.pt") as file:
            torch.save(whole, file)
        files.write(new / "facts.json", json.dumps(dict(facts), indent=1))
        written += [new / "replicated.pt", new / "facts.json"]
    layout = {}
    for name, (rows_k, start, num_rows) in rows.items():
        assert 0 <= start <= start + len(rows_k) <= num_rows, f"{name}: rows {start}+{len(rows_k)} of {num_rows}"
        layout[name] = {
            "shape": [num_rows, *rows_k.shape[1:]],
            "dtype": str(rows_k.dtype).removeprefix("torch."),
            "parts": [[start, start + len(rows_k)]] if len(rows_k) else [],
        }
        if len(rows_k):
            part = new / _part(name, start)
            _write_rows(part, rows_k)
            written += [file for file in part.rglob("*") if file.is_file()]
    return {"files": {file.relative_to(new).as_posix(): manifest.seal(file) for file in written}, "rows": layout}


def _part(name: str, start: int) -> Path:
    return Path("rows") / name / f"{start:012d}"


def _write_rows(part: Path, rows_k: Tensor) -> None:
    # Uncompressed: weights are noise to a compressor. All-zero chunks (moments of unused codes) take no space anyway.
    array = zarr.create_array(
        store=str(part),
        shape=tuple(rows_k.shape),
        dtype=str(rows_k.dtype).removeprefix("torch."),
        chunks=(max(1, min(len(rows_k), CHUNK_BYTES * len(rows_k) // max(1, rows_k.nbytes))), *rows_k.shape[1:]),
        chunk_key_encoding={"name": "default", "separator": "."},
        compressors=None,
        fill_value=0,
    )
    array[...] = rows_k.detach().cpu().numpy()


def _finish(new: Path, final: Path, written: list[dict[str, Any]], step: int, keep: int) -> None:
    """Write the manifest, make all durable, move it into place, then remove what is older than the newest `keep`."""
    layout: dict[str, Any] = {}
    for share in written:
        for name, entry in share["rows"].items():
            known = layout.setdefault(name, {**entry, "parts": []})
            assert known["shape"] == entry["shape"], f"{name}: ranks differ about its shape"
            known["parts"] += entry["parts"]
    for name, entry in layout.items():
        ends = [0, *(stop for _, stop in sorted(entry["parts"]))]
        assert [start for start, _ in sorted(entry["parts"])] + entry["shape"][:1] == ends, f"{name}: rows are missing"
    sealed = {name: entry for share in written for name, entry in share["files"].items()}
    manifest.write(new, {"step": step, "rows": layout, "files": sealed})
    if final.exists():  # a damaged one of the same step
        files.set_aside(final)
    files.place(new, final)
    past = [path for path in _finished(final.parent) if path.name <= final.name]
    for path in past[:-keep]:
        files.set_aside(path)
    for left in final.parent.glob("*.old.tmp"):
        shutil.rmtree(left)


def _read_rows(path: Path, name: str, layout: Mapping[str, Any], start: int, stop: int, num_rows: int) -> Tensor:
    """Rows [start, stop) of the K-row tensor `name`, put together from the arrays of its writers."""
    if name not in layout:
        raise ValueError(f"{path} has no rows named {name}, only {sorted(layout)}: it was saved by another model")
    shape, dtype = layout[name]["shape"], getattr(torch, layout[name]["dtype"])
    if shape[0] != num_rows:
        raise ValueError(
            f"{name} has {num_rows} rows in this configuration, but {shape[0]} in {path}: "
            "change the number of codes, or start from another checkpoint"
        )
    out = torch.empty((stop - start, *shape[1:]), dtype=dtype)
    for low, high in layout[name]["parts"]:
        a, b = max(low, start), min(high, stop)
        if a < b:
            array = open_array(path / _part(name, low), (high - low, *shape[1:]))
            out[a - start : b - start] = torch.from_numpy(array[a - low : b - low])
    return out
