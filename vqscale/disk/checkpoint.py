"""Checkpoints that any number of processes can read, and that are either whole or not there.

    FOLDER/0000001000/
      manifest.json      size and sha256 of every other file, and who wrote what; written last
      facts.json         plain facts (step, configuration, samples seen, ...)
      ranges/00003.safetensors   what rank 3 wrote of the tensors that are no rows: of each one range of its elements
      rows/NAME/START/   zarr v3: rows START.. of the K-row tensor NAME, one array per writer

No two ranks write one file; the manifest lists ranges and arrays, a reader takes any part of any tensor. A checkpoint
is written as NNNNNNNNNN.XXXXXXXX.tmp, made durable (fsync) and renamed: a killed process leaves a .tmp, which the next
save removes. Older ones have replicated.pt, all that is no rows whole, in place of ranges/. Here: reading. Writing is
in writer.py; what belongs into a checkpoint, held.py and the loops say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqscale.disk import manifest
from vqscale.disk.arrays import open_array
from vqscale.disk.held import Held
from vqscale.disk.tensors import Ranges, blocks
from vqscale.errors import ExplainedError
from vqscale.parallel.background import explain, on_first
from vqscale.parallel.mesh import Mesh


class CheckpointError(ExplainedError):
    """A checkpoint could not be written or read; raised on all ranks, the checkpoints before it stand."""


def latest(folder: Path | str, mesh: Mesh | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are all what the manifest says, and why newer ones were passed over.

    With a mesh it is collective: rank 0 reads the files, all ranks get its answer.
    """

    def search() -> tuple[Path | None, list[str]]:
        passed_over: list[str] = []
        for path in reversed(finished(Path(folder))):
            damage = manifest.damage(path)
            if damage is None:
                return path, passed_over
            passed_over.append(f"{path}: {damage}")
        return None, passed_over

    if mesh is None:
        return search()
    try:
        return on_first(search, mesh)
    except Exception as error:
        failure = explain(error)
        raise CheckpointError(f"rank 0: {failure}" if mesh.world.size > 1 else failure) from None


def finished(folder: Path) -> list[Path]:
    """Checkpoints that were renamed into place, oldest first; whether they are undamaged is another question."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if len(path.name) == 10 and path.name.isdigit())


def range_file(path: Path, rank: int) -> Path:
    return path / "ranges" / f"{rank:05d}.safetensors"


def array_folder(path: Path, name: str, start: int) -> Path:
    return path / "rows" / name / f"{start:012d}"


def read(path: Path | str) -> Contents:
    """What is in a checkpoint, by name; its tensors are read when they are asked for. ValueError: it is not whole."""
    path = Path(path)
    try:
        layout = manifest.read(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a whole checkpoint: {error}; start from another one") from None
    try:
        facts = dict(json.loads((path / "facts.json").read_text()))
        _check_layout({kind: layout[kind] for kind in ("ranges", "rows") if kind != "ranges" or kind in layout})
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no checkpoint that was written here ({type(error).__name__}: {error}); start from another one"
        ) from None
    if "ranges" in layout:
        return Contents(path, facts, layout["ranges"], layout["rows"], {})
    old = torch.load(path / "replicated.pt", map_location="cpu", weights_only=True, mmap=True)
    shapes = {name: layout_of(tuple(x.shape), x.dtype) for name, x in old.items()}
    return Contents(path, facts, shapes, layout["rows"], old)


def _check_layout(layout: Mapping[str, Mapping[str, Any]]) -> None:
    """ValueError unless types are torch's and every element of every tensor is in one part: else memory would be taken
    for weights as it is."""
    for kind, entries in layout.items():
        for name, entry in entries.items():
            if not isinstance(getattr(torch, entry["dtype"], None), torch.dtype):
                raise ValueError(f"{name} has the type {entry['dtype']}")
            if not covered(kind, entry):
                raise ValueError(f"{name}: {kind} are missing, or there twice")


def covered(kind: str, entry: Mapping[str, Any]) -> bool:
    """Whether the parts of a tensor, rows or ranges of elements, are all of it, and none of it twice."""
    last = entry["shape"][0] if kind == "rows" else torch.Size(entry["shape"]).numel()
    parts = sorted(entry["parts"])
    return [part[0] for part in parts] + [last] == [0, *(part[1] for part in parts)]


def layout_of(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """What a manifest says of a tensor, without the parts that were written of it."""
    return {"shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "parts": []}


@dataclass(frozen=True)
class Contents:
    """A checkpoint to read from, on any number of ranks, whatever number wrote it. Nothing of it is collective."""

    path: Path
    facts: dict[str, Any]
    ranges: dict[str, Any]
    """of what is no rows: shape, dtype, and (first element, last + 1, rank that wrote them) of every part"""
    rows: dict[str, Any]
    """of rows the same, with (first row, last + 1)"""
    _old: dict[str, Tensor]

    def fill(self, held: Mapping[str, Held], rows: Mapping[str, tuple[Tensor, int, int]]) -> None:
        """Put everything that the checkpoint has where this rank holds it; rows by name as (rows_k..., start, K).

        ValueError, and nothing is touched, unless names and shapes are the same on both sides.
        """
        _check({name: each.shape for name, each in held.items()}, self.ranges, "replicated tensors")
        for name, (x, _, num_rows) in rows.items():
            self.check_rows(name, num_rows)
            _check({name: (num_rows, *x.shape[1:])}, {name: self.rows[name]}, "rows")
        reader = Ranges()
        for name, each in held.items():
            self._fill(name, each, reader)
        for name, (x, start, _) in rows.items():
            self._fill_rows(name, x.detach(), start)

    def whole(self, name: str) -> Tensor:
        """A tensor that is no rows."""
        shape = tuple(self.ranges[name]["shape"])
        out = torch.empty(shape, dtype=getattr(torch, self.ranges[name]["dtype"]))
        self._fill(name, Held(out.view(-1), 0, shape), Ranges())
        return out

    def some_rows(self, name: str, start: int, stop: int, num_rows: int) -> Tensor:
        """Rows [start, stop) of a K-row tensor. ValueError where there is none, or one of another K."""
        self.check_rows(name, num_rows)
        shape = (stop - start, *self.rows[name]["shape"][1:])
        out = torch.empty(shape, dtype=getattr(torch, self.rows[name]["dtype"]))
        self._fill_rows(name, out, start)
        return out

    @torch.no_grad()
    def _fill(self, name: str, held: Held, reader: Ranges) -> None:
        start, stop = held.start, held.start + held.flat.numel()
        if name in self._old:
            for out, block in zip(blocks(held.flat), blocks(self._old[name].view(-1)[start:stop]), strict=True):
                out.copy_(block)
        for low, high, rank in self.ranges[name]["parts"]:
            a, b = max(low, start), min(high, stop)
            if a < b:
                reader.fill(held.flat[a - start : b - start], range_file(self.path, rank), name, a - low)

    def check_rows(self, name: str, num_rows: int) -> None:
        """ValueError unless there are so many rows of this name."""
        if name not in self.rows:
            raise ValueError(
                f"{self.path} has no rows named {name}, only {sorted(self.rows)}: it was saved by another model"
            )
        found = self.rows[name]["shape"][0]
        if found != num_rows:
            raise ValueError(
                f"{name} has {num_rows} rows in this configuration, but {found} in {self.path}: "
                "change the number of codes, or start from another checkpoint"
            )

    @torch.no_grad()
    def _fill_rows(self, name: str, out: Tensor, start: int) -> None:
        stop = start + len(out)
        for low, high in self.rows[name]["parts"]:
            a, b = max(low, start), min(high, stop)
            if a < b:
                array = open_array(array_folder(self.path, name, low), (high - low, *out.shape[1:]))
                for first, last in _chunks(a - low, b - low, array.chunks[0]):
                    block = torch.from_numpy(array[first:last])
                    out[low + first - start : low + last - start].copy_(block)


def _chunks(low: int, high: int, size: int) -> Iterator[tuple[int, int]]:
    """[low, high) cut where chunks end: zarr reads whole ones."""
    for first in range(low // size * size, high, size):
        yield max(first, low), min(first + size, high)


def _check(mine: Mapping[str, tuple[int, ...]], there: Mapping[str, Any], what: str) -> None:
    """ValueError unless both have the same names and shapes."""
    missing, unknown = sorted(mine.keys() - there.keys()), sorted(there.keys() - mine.keys())
    shapes = [name for name in mine if name in there and list(mine[name]) != there[name]["shape"]]
    if missing or unknown or shapes:
        raise ValueError(
            f"the {what} of the checkpoint are not those of this model: missing {missing[:3]}, unknown {unknown[:3]}, "
            f"of another shape {shapes[:3]} ({len(missing)}, {len(unknown)} and {len(shapes)} in all): "
            "load it with the configuration it was saved with"
        )
