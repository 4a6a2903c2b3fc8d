"""IBQ: index backpropagation quantization (Shi et al. 2024), exact, without tokens x codes.

With A = softmax(l) sg(C) the straight-through one-hot of the paper is z = C[k] + (A - sg(A)): its forward value is the
row, its gradient goes to x and to all rows through the logits, and to the chosen row directly. Losses (means over N D):

    |z - x|^2  +  commitment_weight |sg(C[k]) - x|^2  +  codebook_weight |C[k] - sg(x)|^2
    entropy_weight (mean_n H(q_n) - H(mean over all tokens of all ranks of q_n)),   q = softmax at entropy_temperature

The released code has commitment 1.0 and codebook 0.25, the paper's equation 10 has them the other way round.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vqscale.codes import backend
from vqscale.codes.tally import entropy_of_mean
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import Quantized, TableQuantizer
from vqscale.quantizers.config.tables import IBQConfig


class IBQ(TableQuantizer):
    def __init__(self, config: IBQConfig, mesh: Mesh | None = None, *, seed: int = 0) -> None:
        super().__init__(config, config.similarity, mesh, seed=seed)
        self.config = config

    @property
    def breaks_graph(self) -> str | None:
        return backend.in_blocks(self.codebook.rows, mixes=True)

    def forward(self, x_ND: Tensor) -> Quantized:
        x_ND = self.taken(x_ND)
        mixture = self.codebook.mix(x_ND, self.config.temperature, self._entropy_temperature())
        ids_N = mixture.ids_N
        stats = self.watch(x_ND, ids_N)
        stats["saturation"] = mixture.saturation_N.mean()
        if self.passing:
            return Quantized(x_ND, ids_N, {}, stats)
        c_ND = mixture.code_ND
        z_ND = c_ND + (mixture.mean_ND - mixture.mean_ND.detach())
        losses = {
            "quantization": F.mse_loss(z_ND, x_ND),
            "commitment": self.config.commitment_weight * F.mse_loss(x_ND, c_ND.detach()),
            "codebook": self.config.codebook_weight * F.mse_loss(c_ND, x_ND.detach()),
        }
        if mixture.entropy_N is not None and mixture.columns_k is not None:
            spread = entropy_of_mean(mixture.columns_k, len(x_ND), self.mesh)
            losses["entropy"] = self.config.entropy_weight * (mixture.entropy_N.mean() - spread)
            stats["entropy_token"], stats["entropy_mean"] = mixture.entropy_N.detach().mean(), spread.detach()
        return Quantized(self.landed(x_ND, z_ND), ids_N, losses, stats)

    def _entropy_temperature(self) -> float | None:
        return self.config.entropy_temperature if self.config.entropy_weight else None
