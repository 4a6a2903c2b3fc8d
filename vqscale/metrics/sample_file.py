"""Images in an npz as ADM's evaluator takes them: one array arr_0, uint8, N x H x W x 3, read a batch at a time, and
their classes under arr_1 where it has them.

50,000 images of 256 x 256 are 10 GB, which no rank holds: each reads its own part of the file.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MEMBER = "arr_0.npy"
WHERE = "give an npz with uint8 images of N x height x width x 3 under arr_0, as ADM's evaluator takes it"


class SampleFile:
    """The images of a file; its header is read at once. ValueError for what is no such file."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"the images {self.path} are no file: {WHERE}")
        try:
            with zipfile.ZipFile(self.path) as outer, outer.open(MEMBER) as file:
                self.shape, fortran, kind = _header(file)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"the images {self.path} cannot be read ({error}), cut off or no npz: {WHERE}") from None
        if kind != np.uint8 or fortran or len(self.shape) != 4 or self.shape[3] != 3 or not all(self.shape):
            raise ValueError(
                f"{self.path}: arr_0 is {kind} of shape {self.shape}{' in Fortran order' * fortran}: {WHERE}"
            )

    def __len__(self) -> int:
        return self.shape[0]

    def labels(self) -> NDArray[np.int64] | None:
        """The class of each image, under arr_1; None where the file has none. ValueError for what is no such array."""
        with np.load(self.path, allow_pickle=False) as file:
            found = file["arr_1"] if "arr_1" in file.files else None
        if found is None:
            return None
        if found.shape != (len(self),) or found.dtype.kind not in "iu":
            raise ValueError(
                f"{self.path}: arr_1 is {found.dtype} of shape {found.shape}, and {len(self)} images have as many "
                "whole numbers for classes: make the file again"
            )
        return found.astype(np.int64)

    def part(self, rank: int, world: int) -> tuple[int, int]:
        """(first image, one past the last) of a rank: contiguous parts that cover the file once."""
        return len(self) * rank // world, len(self) * (rank + 1) // world

    def batches(self, batch: int, rank: int = 0, world: int = 1) -> Iterator[tuple[int, Tensor]]:
        """(number of the first image, uint8 (b, 3, H, W)) over this rank's part, b = batch but for the last."""
        first, last = self.part(rank, world)
        size = int(np.prod(self.shape[1:]))
        with zipfile.ZipFile(self.path) as outer, outer.open(MEMBER) as file:
            _header(file)
            file.seek(first * size, 1)
            for number in range(first, last, batch):
                count = min(batch, last - number)
                data = file.read(count * size)
                if len(data) < count * size:
                    raise ValueError(f"{self.path} ends before image {number + count} of {len(self)}: {WHERE}")
                images = np.frombuffer(data, dtype=np.uint8).reshape(count, *self.shape[1:])
                yield number, torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order?, type) of a .npy, which is then read up to its first value."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"version {version} of the npy format")
