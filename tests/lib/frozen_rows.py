"""A quantizer in one file, as somebody would add it: the nearest of rows that were taken from data and never learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F

from vqscale.codes.config import TableConfig
from vqscale.quantizers.base import Quantized, TableQuantizer, full
from vqscale.quantizers.config import QuantizerSettings
from vqscale.quantizers.gradients import straight_through


@dataclass(frozen=True)
class FrozenConfig(TableConfig, QuantizerSettings):
    """Nearest of frozen rows."""

    module: ClassVar[str] = f"{__name__}:Frozen"
    name: Literal["frozen"] = "frozen"
    """nearest code, rows stay what they are"""
    commitment_weight: float = 0.5
    """weight of |x - c|^2"""


class Frozen(TableQuantizer):
    def __init__(self, config, mesh=None, *, seed=0):
        super().__init__(config, "euclid", mesh, seed=seed, learned=False)
        self.config = config

    def forward(self, x_ND):
        x_ND = full(x_ND)
        ids_N, _ = self.codebook.nearest(x_ND)
        stats = self.watch(x_ND, ids_N)
        stats["saturation"] = x_ND.new_ones(())
        if self.passing:
            return Quantized(x_ND, ids_N, {}, stats)
        c_ND = self.codebook.lookup(ids_N)
        losses = {"commitment": self.config.commitment_weight * F.mse_loss(x_ND, c_ND)}
        return Quantized(straight_through(x_ND, c_ND), ids_N, losses, stats)
