"""Ids that are given when images are drawn, and which are drawn anew: a region of rows and columns. Imports no torch.

Not here: where they come from (known_ids.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIDES = ("rows", "columns")
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Region:
    """The ids that are drawn: those in these rows and in these columns; None is all of them."""

    rows: tuple[int, ...] | None = None
    columns: tuple[int, ...] | None = None

    def of(self, grid: Sequence[int]) -> NDArray[np.bool_]:
        """Which ids of a grid are in it. ValueError where it reaches over the grid, or says nothing."""
        chosen = {side: getattr(self, side) for side in SIDES if getattr(self, side) is not None}
        if not chosen:
            raise ValueError(
                "--known gives ids, and nothing says which are to be drawn: give --draw-rows, --draw-columns or both, "
                "numbers and ranges such as 4-11 that begin at 0"
            )
        inside = np.ones(tuple(grid), dtype=np.bool_)
        for side, numbers in chosen.items():
            axis = SIDES.index(side)
            length = grid[axis] if axis < len(grid) else 0
            if max(numbers) >= length:
                raise ValueError(
                    f"--draw-{side} has {max(numbers)}, and the grid of the prior, {' x '.join(map(str, grid))} ids, "
                    f"has {length} {side}, which begin at 0: use numbers up to {length - 1}"
                    if length
                    else f"--draw-{side} is for a grid with {side}, and the prior's has one side: leave it out"
                )
            inside &= np.isin(np.arange(length), numbers).reshape([-1 if n == axis else 1 for n in range(len(grid))])
        return inside


@dataclass(frozen=True, eq=False)
class Known:
    """Ids (n, *grid), or (n, *grid, num_ids), -1 where they are to be drawn, and the classes of their images (-1: not
    known). Image i of what is drawn has those of number i mod n."""

    ids: Ids
    labels: Ids

    def __len__(self) -> int:
        return len(self.ids)

    def turn(self, first: int, count: int) -> NDArray[np.int64]:
        """Numbers of those of the images first, first + 1, ..."""
        return np.arange(first, first + count) % len(self)

    def facts(self) -> dict[str, Any]:
        """What they are, by content: wherever their files lie, the same ids go on with the same samples."""
        mark = hashlib.blake2b(self.ids.tobytes() + self.labels.tobytes(), digest_size=16).hexdigest()
        return {"images": len(self), "drawn": int((self.ids[0] < 0).sum()), "fingerprint": mark}
