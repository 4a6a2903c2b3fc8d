"""Which codes this rank owns, and what their first values are. Pure arithmetic: nothing here talks.

The K rows lie in M contiguous slices, balanced to one row; K need not divide by M and a rank may own none. First values
are drawn in fixed blocks keyed by (seed, block number), so they do not depend on M and no rank ever holds all K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vqscale.seed import derive

DRAW_BLOCK = 1024
DECODED = 4096  # codes whose vectors are asked for at a time

Init = Literal["normal", "uniform"]


@dataclass(frozen=True)
class Rows:
    """The slice [start, stop) of the K rows that rank `rank` of the `size` ranks of a code group owns."""

    num_codes: int
    size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        if self.num_codes < 1:
            raise ValueError(f"num_codes is {self.num_codes}: a table has at least one code, change num_codes")

    @property
    def start(self) -> int:
        return self.num_codes * self.rank // self.size

    @property
    def stop(self) -> int:
        return self.num_codes * (self.rank + 1) // self.size

    @property
    def count(self) -> int:
        return self.stop - self.start

    @property
    def most(self) -> int:
        """Rows of the rank that has the most."""
        return -(-self.num_codes // self.size)

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(which ids are of rows here, their local row numbers; 0 where they are not)."""
        mine = (ids >= self.start) & (ids < self.stop)
        return mine, torch.where(mine, ids - self.start, 0)

    def take(self, rows_kD: Tensor, ids_B: Tensor) -> Tensor:
        """The rows of ids, of those here; zeros for the others."""
        mine_B, local_B = self.find(ids_B)
        if not len(rows_kD):
            return rows_kD.new_zeros(len(ids_B), rows_kD.shape[1])
        return torch.where(mine_B[:, None], rows_kD[local_B], 0.0)

    def add_(self, out_k: Tensor, ids_B: Tensor, values_B: Tensor) -> Tensor:
        """out[row of id] += value for every id whose row is here, in place; dim 0 of `out` is this rank's rows."""
        mine_B, local_B = self.find(ids_B)
        if not len(out_k):
            return out_k
        # A value that is not a number stays with the rank of its row: it is not multiplied by zero, but left out.
        return out_k.index_add_(0, local_B, torch.where(mine_B.view(-1, *[1] * (values_B.dim() - 1)), values_B, 0))


def decoded(decode: Callable[[Tensor], Tensor], layout: Rows, device: torch.device) -> Iterator[Tensor]:
    """The vectors of this rank's codes by ids_N -> z_NF, a quantizer's `decode`; some at a time, in their order.

    All ranks ask for as many as the rank with the most codes, so that a decode that talks has equal shapes.
    """
    for first in range(0, layout.most, DECODED):
        ids_N = torch.arange(first, first + DECODED, device=device) + layout.start
        yield decode(ids_N.clamp_(max=layout.num_codes - 1))[: max(0, layout.count - first)]


def draw(layout: Rows, dim: int, init: Init, scale: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The first values of the rows of this layout, k x dim on the CPU: N(0, scale^2) or U(-scale, scale).

    Row j is the same number for every layout: blocks of DRAW_BLOCK rows have a generator of their own.
    """
    out = torch.empty((layout.count, dim), dtype=dtype)
    for block in range(layout.start // DRAW_BLOCK, -(-layout.stop // DRAW_BLOCK)):
        generator = torch.Generator().manual_seed(derive(seed, "rows", block))
        values = torch.empty((DRAW_BLOCK, dim), dtype=torch.float32)
        if init == "normal":
            values.normal_(0.0, scale, generator=generator)
        else:
            values.uniform_(-scale, scale, generator=generator)
        first, last = max(layout.start, block * DRAW_BLOCK), min(layout.stop, (block + 1) * DRAW_BLOCK)
        if first < last:
            out[first - layout.start : last - layout.start] = values[first - block * DRAW_BLOCK :][: last - first]
    return out


class Table(nn.Module):
    """A module all of whose parameters and buffers are rows over the code axis: dim 0 is this rank's slice."""

    def __init__(self, layout: Rows) -> None:
        super().__init__()
        self.layout = layout


def set_aside(module: nn.Module) -> dict[str, Table]:
    """Move every Table inside `module` out of reach of parameters(), state_dict() and DeepSpeed; return them by name.

    A table stays usable as the attribute it was. What is left in the module is the same on every rank; the tables are
    not: an engine that broadcast or averaged them would destroy them.
    """
    tables: dict[str, Table] = {}
    for prefix, parent in list(module.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Table):
                del parent._modules[name]
                parent.__dict__[name] = child
                tables[f"{prefix}.{name}" if prefix else name] = child
    return tables
