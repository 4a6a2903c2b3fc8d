"""The board of a run: numbers to metrics.jsonl and TensorBoard, pictures to samples/ and TensorBoard.

Only rank 0 writes; on all others every method returns at once, so the loop need not ask which rank it is. Nothing is
communicated and nothing is averaged here: what rank 0 passes is what is written.

    FOLDER/metrics.jsonl                one JSON object per call of scalars: {"step": 100, "time": ..., "loss": 0.12}
    FOLDER/tb/                          TensorBoard
    FOLDER/samples/NAME/0000000100.png  pictures by name and step

A run that goes on from a checkpoint of step s cuts off what was logged after s (the steps that will be done again) and
the half line of a process that was killed while writing, so every step stands there once.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
import numpy.typing as npt
from torch import Tensor

from vqscale.disk import files
from vqscale.show import pictures

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Number = float | int | Tensor

_BINS = 64


class Board:
    """The board of the run in `folder`, opened by every rank. resume_step: the step that the run goes on from."""

    def __init__(self, folder: str | os.PathLike[str], rank: int = 0, resume_step: int = 0) -> None:
        self.folder = Path(folder)
        self._rows: TextIO | None = None
        self._writer: SummaryWriter | None = None
        if rank != 0:
            return
        from torch.utils.tensorboard import SummaryWriter  # lazily: it costs more than a second

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        _cut(path, resume_step)
        self._rows = path.open("a", encoding="utf-8")
        # TensorBoard hides what was logged at purge_step and later by the processes before this one
        self._writer = SummaryWriter(str(self.folder / "tb"), purge_step=resume_step + 1, flush_secs=30)

    def scalars(self, step: int, values: Mapping[str, Number]) -> None:
        """Write one row of named numbers and flush it. What is not finite becomes null in the row: JSON has no nan."""
        if self._rows is None or self._writer is None:
            return
        assert not {"step", "time"} & set(values), "a row has its own step and time"
        numbers = {name: _number(value) for name, value in values.items()}
        row: dict[str, float | int | None] = {"step": step, "time": round(time.time(), 3)}
        row.update({name: value if math.isfinite(value) else None for name, value in numbers.items()})
        self._rows.write(json.dumps(row, allow_nan=False) + "\n")
        self._rows.flush()
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def images(
        self, step: int, name: str, picture: pictures.Picture | Tensor | Callable[[], pictures.Picture | Tensor]
    ) -> None:
        """Show and save a uint8 picture of height x width x 3, as show.pictures makes them.

        A function that draws one is called on rank 0 only; it may not communicate.
        """
        if self._writer is None:
            return
        if callable(picture) and not isinstance(picture, Tensor):
            picture = picture()
        pictures.save(self.folder / "samples" / name / f"{step:010d}.png", picture)
        self._writer.add_image(name, picture, step, dataformats="HWC")

    def histogram(self, step: int, name: str, values: npt.ArrayLike | Tensor) -> None:
        """Show the distribution of any number of values. Values that are not finite are left out."""
        if self._writer is None:
            return
        array = values.detach().float().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        array = array[np.isfinite(array)]
        if array.size:
            self._writer.add_histogram(name, array, step, bins=_BINS)

    def text(self, step: int, name: str, text: str) -> None:
        """Show a text (Markdown) such as the config of the run."""
        if self._writer is not None:
            self._writer.add_text(name, text, step)

    def close(self) -> None:
        """Bring everything to disk; the board takes nothing afterwards."""
        if self._rows is not None and self._writer is not None:
            self._rows.close()
            self._writer.close()
        self._rows = self._writer = None


def _number(value: Number) -> float | int:
    return value.item() if isinstance(value, Tensor) else value


def _cut(path: Path, resume_step: int) -> None:
    """Keep the whole rows up to resume_step."""
    if not path.exists():
        return
    kept = [
        line for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if _step_of(line) <= resume_step
    ]
    files.write(path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    """The step of a row; infinity for the torn line of a killed process, which is cut off like a later step."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
