"""What compositions share: several quantizers, one answer. Not a quantizer itself; see residual.py and grouped.py.

ids of a composition are (N, L): column i is the id of level (or part) i, each below num_codes, the K of one column. A
loss is the sum over columns, a statistic the mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vqscale import quantizers
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import Quantized, Quantizer, Renewed
from vqscale.quantizers.beginning import Fit
from vqscale.quantizers.config import SingleConfig
from vqscale.seed import derive


class Columns(Quantizer):
    """Abstract: holds the columns, passes on what is the same for all of them."""

    def __init__(self, configs: Sequence[SingleConfig], mesh: Mesh | None, seed: int) -> None:
        super().__init__()
        made = [quantizers.build(config, mesh, seed=derive(seed, "column", i)) for i, config in enumerate(configs)]
        self.mesh = mesh or Mesh()
        self.columns = nn.ModuleList(made)
        self.num_ids, self.num_codes, self.digits = len(made), made[0].num_codes, made[0].digits

    def quantizers(self) -> list[Quantizer]:
        return [column for column in self.columns if isinstance(column, Quantizer)]

    def begin(self) -> None:
        for column in self.quantizers():
            column.begin()

    def settle(self) -> None:
        for column in self.quantizers():
            column.settle()

    def freeze(self) -> None:
        for column in self.quantizers():
            column.freeze()

    def freeze_frame(self) -> None:
        for column in self.quantizers():
            column.freeze_frame()

    def update(self, stepped: bool = True) -> list[Renewed]:
        return [renewed for column in self.quantizers() for renewed in column.update(stepped)]

    @property
    def beginning(self) -> tuple[int, int]:
        begin, landed = zip(*(column.beginning for column in self.quantizers()), strict=True)
        return max(begin), max(landed)

    def shortages(self, tokens: int) -> list[str]:
        return list(dict.fromkeys(told for column in self.quantizers() for told in column.shortages(tokens)))

    def fits(self) -> dict[str, Fit]:
        every = [(i, column.fits()) for i, column in enumerate(self.quantizers())]
        return {f"{name}/{i}": fit for i, fits in every for name, fit in fits.items()}


def join(answers: Sequence[Quantized], z_ND: Tensor) -> Quantized:
    """One answer of many. A column that is still warming up has no losses yet."""
    names = sorted({name for answer in answers for name in answer.losses})
    losses = {n: torch.stack([a.losses[n] for a in answers if n in a.losses]).sum() for n in names}
    stats = {n: torch.stack([a.stats[n].detach().double() for a in answers]).mean() for n in answers[0].stats}
    return Quantized(z_ND, torch.stack([answer.ids for answer in answers], dim=1), losses, stats)
