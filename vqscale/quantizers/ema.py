"""EMA: the nearest code; rows are moving averages of the tokens that took them (van den Oord et al. 2017, appendix).

    N <- decay N + (1 - decay) n,   m <- decay m + (1 - decay) s,   c = m / ((N + eps) / (sum N + K eps) sum N)

n and s are counts and sums over all tokens of all ranks since the last optimiser step. z = sg(c) + x - sg(x), and the
only loss is commitment_weight |x - sg(c)|^2. UViM's form has c / |c| (unit_norm), and rare codes split off from the
most used (split_below; its counts are N / (1 - decay)).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.codes import backend, tally
from vqscale.codes.codebook import Codebook
from vqscale.codes.rows import Table
from vqscale.codes.splitting import split
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import Quantized, Renewed, TableQuantizer, table_stats
from vqscale.quantizers.config.tables import EMAConfig
from vqscale.quantizers.gradients import ESTIMATORS
from vqscale.seed import derive


class Averages(Table):
    """The moving counts N and sums m of the rows of this rank; they begin as one token at each row."""

    def __init__(self, codebook: Codebook) -> None:
        super().__init__(codebook.layout)
        self.counts_k: Tensor
        self.sums_kD: Tensor
        self.register_buffer("counts_k", torch.ones_like(codebook.rows[:, 0]))
        self.register_buffer("sums_kD", codebook.rows.detach().clone())


class EMA(TableQuantizer):
    def __init__(self, config: EMAConfig, mesh: Mesh | None = None, *, seed: int = 0) -> None:
        super().__init__(config, config.similarity, mesh, seed=seed, learned=False)
        self.config = config
        self._normalise()
        self.averages = Averages(self.codebook)
        self._new: tuple[Tensor, Tensor] | None = None

    @property
    def breaks_graph(self) -> str | None:
        return backend.in_blocks(self.codebook.rows)

    def forward(self, x_ND: Tensor) -> Quantized:
        x_ND = self.taken(x_ND)
        ids_N, _ = self.codebook.nearest(x_ND)
        seen_k = self.upkeep.observe(x_ND, ids_N) if self.training else None
        stats = table_stats(self.codebook, self.upkeep, x_ND, ids_N, self.training)
        stats["saturation"] = x_ND.new_ones(())
        if self.passing:
            return Quantized(x_ND, ids_N, {}, stats)
        if self.training and not self.upkeep.frozen:
            self._count(x_ND.detach(), ids_N, seen_k)
        c_ND = self.codebook.lookup(ids_N)
        losses = {"commitment": self.config.commitment_weight * F.mse_loss(x_ND, c_ND)}
        z_ND = self.landed(x_ND, ESTIMATORS[self.config.gradient](x_ND, c_ND))
        return Quantized(z_ND, ids_N, losses, stats)

    def _count(self, x_ND: Tensor, ids_N: Tensor, seen_k: Tensor | None) -> None:
        """Add these tokens to the counts and sums since the last step; `seen_k` are their counts, if known."""
        seen_k = tally.counts(ids_N, self.codebook.layout, self.mesh) if seen_k is None else seen_k
        counts_k = seen_k.to(x_ND.dtype)
        sums_kD = tally.sums(ids_N, x_ND, self.codebook.layout, self.mesh)
        old = self._new or (torch.zeros_like(counts_k), torch.zeros_like(sums_kD))
        self._new = (old[0] + counts_k, old[1] + sums_kD)

    @torch.no_grad()
    def settle(self) -> None:
        super().settle()
        self._normalise()
        self.averages.counts_k.fill_(1.0)
        self.averages.sums_kD.copy_(self.codebook.rows)

    @torch.no_grad()
    def update(self, stepped: bool = True) -> list[Renewed]:
        if self.upkeep.frozen:
            self.renew(stepped)
            return []
        counts_k, sums_kD, decay = self.averages.counts_k, self.averages.sums_kD, self.config.decay
        if self._new is not None and stepped:
            counts_k.lerp_(self._new[0].to(counts_k.dtype), 1.0 - decay)
            sums_kD.lerp_(self._new[1].to(sums_kD.dtype), 1.0 - decay)
            self._split()
            total = ops.sum_over(counts_k.sum(), self.codebook.axis)
            smooth_k = (counts_k + self.config.eps) / (total + self.num_codes * self.config.eps) * total
            self.codebook.rows.copy_(sums_kD / smooth_k[:, None])
        self._new = None
        changed = self.renew(stepped)
        # A renewed row begins again as one token at its new place, or the old average would pull it back.
        counts_k[changed] = 1.0
        sums_kD[changed] = self.codebook.rows[changed]
        self._normalise()
        return []

    def _split(self) -> None:
        """Halve the averages of the most used codes for rare ones, once codes are in use."""
        if not self.config.split_below or self.passing:
            return
        layout, axis = self.codebook.layout, self.codebook.axis
        below = self.config.split_below * (1.0 - self.config.decay)
        seed = derive(self.upkeep.seed, "split", int(self.upkeep.steps))
        self.upkeep.window.restart(split(self.averages.counts_k, self.averages.sums_kD, layout, axis, below, seed))

    @torch.no_grad()
    def _normalise(self) -> None:
        if self.config.unit_norm:
            self.codebook.rows.copy_(F.normalize(self.codebook.rows, dim=1))
