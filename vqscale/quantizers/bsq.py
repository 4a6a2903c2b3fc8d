"""BSQ: binary spherical quantization (Zhao et al. 2024). LFQ on the unit sphere; K = 2^D.

u = x / |x|, u_q = sign(u) / sqrt(D), 0 counting as -1; z = sg(u_q) + u - sg(u). Ids as in LFQ. With fit: whiten x is
first whitened (whitening.py). Losses:

    commitment_weight |u - u_q|^2 = 2 - 2 |u|_1 / sqrt(D), mean over tokens, below 2
    the entropy loss of binary.py (the released code multiplies it by T)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.codes import bits, products
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers import binary
from vqscale.quantizers.base import Quantized
from vqscale.quantizers.config.implicit import BSQConfig
from vqscale.quantizers.gradients import straight_through
from vqscale.quantizers.implicit import ImplicitQuantizer


class BSQ(ImplicitQuantizer):
    def __init__(self, config: BSQConfig, mesh: Mesh | None = None, *, seed: int = 0) -> None:
        super().__init__(config, config.bits(), 2 ** config.bits(), mesh)
        self.config, self.digits = config, (2,) * self.dim
        self.scale = self.dim**-0.5
        self.unit: Tensor  # in the type that codes have
        self.register_buffer("unit", torch.ones((), device=self.mesh.device), persistent=False)

    @property
    def breaks_graph(self) -> str | None:
        return super().breaks_graph or (products.rounded() if self.config.entropy_weight else None)

    def forward(self, x_ND: Tensor) -> Quantized:
        x_ND = self.taken(x_ND)
        u_ND = F.normalize(self.framed(x_ND), dim=1, eps=1e-6)
        bits_ND = u_ND > 0
        ids_N, c_ND = bits.to_ids(bits_ND), binary.codes(bits_ND, self.scale, self.unit)
        slope = 4 * self.scale / self.config.entropy_temperature
        losses, stats = binary.entropies(slope * u_ND, self.config, self.mesh)
        losses["commitment"] = self.config.commitment_weight * (u_ND - c_ND).square().sum(1).mean()
        stats |= self.watch(x_ND, ids_N, 1.0)
        return Quantized(straight_through(u_ND, c_ND), ids_N, losses, stats)

    @torch.no_grad()
    def encode(self, x_ND: Tensor) -> Tensor:
        return bits.to_ids(F.normalize(self.framed(self.findable(x_ND)), dim=1, eps=1e-6) > 0)

    @torch.no_grad()
    def decode(self, ids_N: Tensor) -> Tensor:
        return binary.codes(bits.to_bits(self.known(ids_N), self.dim), self.scale, self.unit)
