"""VQ: the nearest code, a straight-through gradient (van den Oord et al. 2017).

z = sg(c) + x - sg(x),   losses  codebook_weight |sg(x) - c|^2 + commitment_weight |x - sg(c)|^2,   means over N D

The weights are where the paper has them; the old VQGAN code had them swapped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.codes.codebook import Codebook
from vqscale.codes.upkeep import Upkeep
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import Quantized, Quantizer, Renewed, full, table_stats
from vqscale.quantizers.config import VQConfig
from vqscale.quantizers.gradients import ESTIMATORS


class VQ(Quantizer):
    def __init__(self, config: VQConfig, mesh: Mesh | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.config, self.dim, self.num_codes = config, config.dim, config.num_codes
        mesh = mesh or Mesh()
        self.codebook = Codebook.from_config(config, config.similarity, mesh, seed=seed)
        self.upkeep = Upkeep(self.codebook, config, mesh, seed)

    def forward(self, x_ND: Tensor) -> Quantized:
        x_ND = full(x_ND)
        ids_N, _ = self.codebook.nearest(x_ND)
        if self.training:
            self.upkeep.observe(x_ND, ids_N)
        stats = table_stats(self.codebook, self.upkeep, x_ND, ids_N, self.training)
        stats["saturation"] = x_ND.new_ones(())
        if self.training and self.upkeep.warming:
            return Quantized(x_ND, ids_N, {}, stats)
        c_ND = self.codebook.lookup(ids_N)
        losses = {
            "codebook": self.config.codebook_weight * F.mse_loss(c_ND, x_ND.detach()),
            "commitment": self.config.commitment_weight * F.mse_loss(x_ND, c_ND.detach()),
        }
        return Quantized(ESTIMATORS[self.config.gradient](x_ND, c_ND), ids_N, losses, stats)

    def encode(self, x_ND: Tensor) -> Tensor:
        return self.codebook.nearest(full(x_ND))[0]

    @torch.no_grad()
    def decode(self, ids_N: Tensor) -> Tensor:
        return self.codebook.lookup(ids_N)

    def begin(self) -> None:
        self.upkeep.begin()

    def update(self, stepped: bool = True) -> list[Renewed]:
        return [(self.codebook.rows, self.upkeep.update(stepped))]
