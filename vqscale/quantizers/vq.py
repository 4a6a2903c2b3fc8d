"""VQ: the nearest code, a straight-through gradient (van den Oord et al. 2017).

z = sg(c) + x - sg(x),   losses  codebook_weight |sg(x) - c|^2 + commitment_weight |x - sg(c)|^2,   means over N D

The weights are where the paper has them; the old VQGAN code had them swapped.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vqscale.codes import backend
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import Quantized, TableQuantizer
from vqscale.quantizers.config.tables import VQConfig
from vqscale.quantizers.gradients import ESTIMATORS


class VQ(TableQuantizer):
    def __init__(self, config: VQConfig, mesh: Mesh | None = None, *, seed: int = 0) -> None:
        super().__init__(config, config.similarity, mesh, seed=seed)
        self.config = config

    @property
    def breaks_graph(self) -> str | None:
        return backend.in_blocks(self.codebook.rows)

    def forward(self, x_ND: Tensor) -> Quantized:
        x_ND = self.taken(x_ND)
        ids_N, _ = self.codebook.nearest(x_ND)
        stats = self.watch(x_ND, ids_N)
        stats["saturation"] = x_ND.new_ones(())
        if self.passing:
            return Quantized(x_ND, ids_N, {}, stats)
        c_ND = self.codebook.lookup(ids_N)
        losses = {
            "codebook": self.config.codebook_weight * F.mse_loss(c_ND, x_ND.detach()),
            "commitment": self.config.commitment_weight * F.mse_loss(x_ND, c_ND.detach()),
        }
        z_ND = self.landed(x_ND, ESTIMATORS[self.config.gradient](x_ND, c_ND))
        return Quantized(z_ND, ids_N, losses, stats)
