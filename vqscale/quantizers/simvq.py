"""SimVQ: a frozen basis C under one learned linear map; the codes are E = C W^T + b (Zhu et al. 2024).

    k = nearest row of E,   z = E[k],   losses  weight (|sg(x) - z|^2 + commitment_weight |x - sg(z)|^2)

The basis is N(0, 1/d), drawn from the seed in blocks of rows: it is never gathered and never learned. E is never made:
|x - W c - b|^2 = |x - b|^2 - 2 (W^T (x - b)) . c + c^T (W^T W) c, so tokens are projected once and searched among the
frozen rows with a bias per row. The rows of the chosen codes come back to the ranks whose tokens chose them, and W acts
there: its gradient is a data-parallel one like that of any other layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqscale.codes import scan
from vqscale.codes.codebook import Codebook
from vqscale.codes.config import UpkeepConfig
from vqscale.codes.merge import full_precision
from vqscale.codes.revival import Upkeep
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import Quantized, Quantizer, Renewed, full, table_stats
from vqscale.quantizers.config.tables import SimVQConfig
from vqscale.quantizers.gradients import ESTIMATORS
from vqscale.seed import derive


class SimVQ(Quantizer):
    def __init__(self, config: SimVQConfig, mesh: Mesh | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.config, self.dim, self.num_codes = config, config.dim, config.num_codes
        mesh = mesh or Mesh()
        self.codebook = Codebook(
            config.num_codes,
            config.dim,
            mesh=mesh,
            similarity="euclid",
            init_scale=config.dim**-0.5,
            seed=seed,
            learned=False,
            scan_mib=config.scan_mib,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "map"))
            self.map = nn.Linear(config.dim, config.dim, bias=config.bias).to(mesh.device)
        watch = UpkeepConfig(init="normal", revive_every=0, window_decay=config.window_decay)
        self.upkeep = Upkeep(self.codebook, watch, mesh, seed)

    def forward(self, x_ND: Tensor) -> Quantized:
        x_ND = full(x_ND)
        ids_N, norm_k = self._search(x_ND)
        if self.training:
            self.upkeep.observe(x_ND, ids_N)
        stats = table_stats(self.codebook, self.upkeep, x_ND, ids_N, self.training, norm_k)
        stats["saturation"] = x_ND.new_ones(())
        z_ND = self._map(self.codebook.lookup(ids_N))
        weight = self.config.quantizer_weight
        losses = {
            "codebook": weight * F.mse_loss(z_ND, x_ND.detach()),
            "commitment": weight * self.config.commitment_weight * F.mse_loss(x_ND, z_ND.detach()),
        }
        return Quantized(ESTIMATORS[self.config.gradient](x_ND, z_ND), ids_N, losses, stats)

    def _map(self, c_ND: Tensor) -> Tensor:
        with full_precision(c_ND):
            z_ND: Tensor = self.map(c_ND)
            return z_ND

    @torch.no_grad()
    def _search(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(ids_N, norm of each code of this rank): the nearest of the mapped rows."""
        weight, rows = self.map.weight, self.codebook.rows
        with full_precision(x_ND):
            shift = 0 if self.map.bias is None else self.map.bias
            square_k = scan.quadratic(rows, weight.t() @ weight, self.codebook.budget)
            ids_N, _ = self.codebook.nearest((x_ND - shift) @ weight, scan.Keys(rows, -0.5 * square_k))
            if self.map.bias is not None:  # |W c + b|^2
                square_k = square_k + 2 * rows @ (weight.t() @ self.map.bias) + self.map.bias.square().sum()
        return ids_N, square_k.clamp_min(0).sqrt()

    def encode(self, x_ND: Tensor) -> Tensor:
        return self._search(full(x_ND))[0]

    @torch.no_grad()
    def decode(self, ids_N: Tensor) -> Tensor:
        return self._map(self.codebook.lookup(ids_N))

    def begin(self) -> None:
        self.upkeep.begin()

    def update(self, stepped: bool = True) -> list[Renewed]:
        self.upkeep.update(stepped)
        return []
