"""Writing checkpoints (checkpoint.py) beside the steps: a step waits for a copy to host memory, and for no disk.

    copy      every rank copies what it writes: all that it alone holds, a share of what all hold
    ranges    every rank writes its files, in a thread
    whole     when all ranks have, rank 0 writes the manifest, renames, and removes old ones, in a thread

The ranks tell each other in every step (`state`, `advance`) whether they still write and whether they failed, so nobody
waits in a collective for another's disk, and what fails on one rank is raised on all. A process that dies on the way
leaves the checkpoints before, and a .tmp.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
import zarr
from torch import Tensor

from vqscale.disk import files, held, manifest, tensors
from vqscale.disk.checkpoint import CheckpointError, array_folder, covered, finished, layout_of, range_file
from vqscale.disk.held import Held
from vqscale.parallel import ops
from vqscale.parallel.background import PAUSE_S, Task, explain
from vqscale.parallel.mesh import Mesh

log = logging.getLogger(__name__)

CHUNK_BYTES = 16 << 20
_LEFT = re.compile(r"(\d{10}(\.\w+)?|left-\w+)\.tmp")
Rows = Mapping[str, tuple[Tensor, int, int]]


class Writer:
    """Writes checkpoints to FOLDER/<step>, one at a time; afterwards the newest `keep` up to that step are there.

    As a context it waits, at its end or at an error that is raised on all ranks (`agreed`), for what is being written.
    """

    _new: Path
    """the folder that is being written"""

    def __init__(self, folder: Path | str, mesh: Mesh, keep: int, agreed: tuple[type[BaseException], ...] = ()) -> None:
        assert keep >= 1, f"keep {keep} would remove the checkpoint just written"
        self.folder, self._mesh, self._keep, self._agreed = Path(folder), mesh, keep, agreed
        self._first = mesh.world.rank == 0
        self._step = 0
        self._phase: Literal["ranges", "whole"] | None = None
        self._task: Task[None] | None = None

    def save(self, step: int, every: Mapping[str, Held], rows: Rows, facts: Mapping[str, Any]) -> None:
        """Begin to write; collective. It waits for the one before, and returns when tensors may change again.

        Every rank gives what it holds (held.py) and its own rows as (rows_k..., start, K); `facts` are rank 0's.
        CheckpointError on all ranks where any failed, here or in `advance`; then FOLDER is as before.
        """
        self.wait()
        self._step, mesh = step, self._mesh
        mine = {name: _copied(each) for name, each in held.share(every, mesh.world.rank, mesh.world.size).items()}
        layout = {name: layout_of(each.shape, each.flat.dtype) for name, each in every.items()}
        cut = {name: _cut(*each, mesh) for name, each in rows.items()}
        self._make()
        new, said = self._new, dict(facts) if self._first else None
        self._begin("ranges", lambda: _write(new, mesh.world.rank, mine, layout, cut, said))

    def state(self) -> tuple[float, float]:
        """(1 while this rank writes, 1 when it failed): their sums over all ranks are what `advance` takes."""
        return float(self._task is not None and self._task.running), float(bool(self._task and self._task.failure))

    def advance(self, writing: float, failed: float) -> None:
        """Go on to what comes next, if all ranks are done. The same on every rank."""
        if self._phase is None or writing:
            return
        if failed:
            self._give_up([self._task.failure if self._task else ""])
        if self._phase == "ranges":
            self._begin("whole", self._finish if self._first else None)
        else:
            self._phase = self._task = None

    def wait(self) -> None:
        """Until nothing is left to write; collective."""
        while self._phase is not None:
            state = torch.tensor(self.state(), device=self._mesh.device)
            self.advance(*ops.sum_over(state, self._mesh.world).tolist())
            time.sleep(PAUSE_S)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None or isinstance(error, self._agreed) or self._mesh.world.size == 1:
            self.wait()

    @property
    def _final(self) -> Path:
        return self.folder / f"{self._step:010d}"

    def _begin(self, phase: Literal["ranges", "whole"], work: Callable[[], None] | None) -> None:
        self._phase, self._task = phase, None if work is None else Task(work)

    def _finish(self) -> None:
        _seal(self._new, self._final, self._mesh.world.size, self._step, self._keep)

    def _make(self) -> None:
        """The folder of a new checkpoint, by rank 0; where it cannot, CheckpointError on all ranks.

        Its name was never there: under one that was, another machine of a network disk may go on to see, and write to,
        what a killed run left, wherever that has been moved.
        """
        name, failure = f"{self._step:010d}.{uuid.uuid4().hex[:8]}.tmp", ""
        try:
            if self._first:
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / name).mkdir()
        except OSError as error:
            failure = explain(error)
        (name, failure), *others = ops.gather_objects((name, failure), self._mesh.world)
        self._new = self.folder / name
        if failure:
            self._give_up([failure, *("" for _ in others)])

    def _give_up(self, failures: list[str]) -> None:
        self._phase = self._task = None
        if len(failures) < self._mesh.world.size:
            failures = ops.gather_objects(failures[0], self._mesh.world)
        if self._first:
            shutil.rmtree(self._new, ignore_errors=True)
        rank, failure = next((rank, failure) for rank, failure in enumerate(failures) if failure)
        who = f"rank {rank}: " if self._mesh.world.size > 1 else ""
        standing = [path for path in finished(self.folder) if path != self._final]
        raise CheckpointError(
            f"the checkpoint of step {self._step} was not written: {who}{failure}. The last good one stands: "
            f"{standing[-1] if standing else 'there is none yet'}. Make room under {self.folder}, or keep fewer "
            "checkpoints"
        )


def _copied(each: Held) -> Held:
    return Held(each.flat.detach().to("cpu", copy=True), each.start, each.shape)


def _cut(rows_k: Tensor, start: int, num_rows: int, mesh: Mesh) -> tuple[Tensor, int, int]:
    """A copy of the share of this rank's rows that this replica writes."""
    assert 0 <= start <= start + len(rows_k) <= num_rows, f"rows {start}+{len(rows_k)} of {num_rows}"
    low, high = (len(rows_k) * (mesh.data.rank + i) // mesh.data.size for i in (0, 1))
    return rows_k[low:high].detach().to("cpu", copy=True), start + low, num_rows


def _write(
    new: Path,
    rank: int,
    mine: Mapping[str, Held],
    layout: dict[str, Any],
    rows: Rows,
    facts: Mapping[str, Any] | None,
) -> None:
    """Write this rank's files, and its share of the manifest last. Only this rank's files are touched."""
    written: list[Path] = []
    if facts is not None:
        _tidy(new.parent, {new})
        files.write(new / "facts.json", json.dumps(facts, indent=1))
        written.append(new / "facts.json")
    if mine:
        file = range_file(new, rank)
        file.parent.mkdir(exist_ok=True)
        tensors.write(file, {name: each.flat for name, each in mine.items()})
        written.append(file)
    for name, each in mine.items():
        layout[name]["parts"] = [[each.start, each.start + each.flat.numel(), rank]]
    arrays = {}
    for name, (rows_k, start, num_rows) in rows.items():
        arrays[name] = layout_of((num_rows, *rows_k.shape[1:]), rows_k.dtype)
        if len(rows_k):
            arrays[name]["parts"] = [[start, start + len(rows_k)]]
            part = array_folder(new, name, start)
            _write_rows(part, rows_k)
            written += [file for file in part.rglob("*") if file.is_file()]
    sealed = {file.relative_to(new).as_posix(): manifest.seal(file) for file in written}
    files.write(_share_file(new, rank), json.dumps({"files": sealed, "ranges": layout, "rows": arrays}))


def _share_file(new: Path, rank: int) -> Path:
    return new / f"share-{rank:05d}.json"


def _write_rows(part: Path, rows_k: Tensor) -> None:
    # Uncompressed: weights are noise to a compressor. All-zero chunks (moments of unused codes) take no space anyway.
    step = max(1, min(len(rows_k), CHUNK_BYTES * len(rows_k) // max(1, rows_k.nbytes)))
    array = zarr.create_array(
        store=str(part),
        shape=tuple(rows_k.shape),
        dtype=str(rows_k.dtype).removeprefix("torch."),
        chunks=(step, *rows_k.shape[1:]),
        chunk_key_encoding={"name": "default", "separator": "."},
        compressors=None,
        fill_value=0,
    )
    for low in range(0, len(rows_k), step):  # zarr would have many chunks in memory at a time
        array[low : low + step] = rows_k[low : low + step].numpy()


def _seal(new: Path, final: Path, world: int, step: int, keep: int) -> None:
    """Write the manifest, make all durable, move it into place, then remove what is older than the newest `keep`."""
    shares = [json.loads(_share_file(new, rank).read_text()) for rank in range(world)]
    layouts = {kind: _joined(kind, [share[kind] for share in shares]) for kind in ("ranges", "rows")}
    for rank in range(world):
        _share_file(new, rank).unlink()
    sealed = {name: entry for share in shares for name, entry in share["files"].items()}
    manifest.write(new, {"step": step, **layouts, "files": sealed})
    if final.exists():  # a damaged one of the same step
        files.set_aside(final)
    files.place(new, final)
    past = [path for path in finished(final.parent) if path.name <= final.name]
    for path in past[:-keep]:
        try:
            files.set_aside(path)
        except OSError as error:
            log.warning("the checkpoint %s cannot be removed (%s): remove it by hand", path, error)
    _tidy(final.parent, set())


def _tidy(folder: Path, kept: Collection[Path]) -> None:
    """Remove what is left of saves that were killed, and of older checkpoints; what is called otherwise is not ours."""
    for left in folder.glob("*.tmp"):
        if left not in kept and _LEFT.fullmatch(left.name):
            try:
                files.remove(left)
            except OSError as error:  # what is written stands all the same
                log.warning("%s, of a checkpoint that is gone, cannot be removed (%s): remove it by hand", left, error)


def _joined(kind: str, layouts: list[dict[str, Any]]) -> dict[str, Any]:
    """What all ranks wrote of every tensor, of which no element may be missing or there twice."""
    out: dict[str, Any] = {}
    for layout in layouts:
        for name, entry in layout.items():
            known = out.setdefault(name, {**entry, "parts": []})
            assert known["shape"] == entry["shape"], f"{name}: ranks differ about its shape"
            known["parts"] += entry["parts"]
    for name, entry in out.items():
        entry["parts"].sort()
        assert covered(kind, entry), f"{name}: {kind} are missing"
    return out
