"""LFQ: lookup-free quantization (MAGVIT-v2, Yu et al. 2023). A code is the signs of the channels; K = 2^D.

q = sign(x) in {-1, 1}^D, 0 counting as -1; z = sg(q) + x - sg(x). The first channel is the most significant bit of an
id; with fit: whiten x is first whitened (whitening.py). Losses: commitment_weight |x - q|^2 (mean over N D) and the
entropy loss of binary.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.codes import bits, products
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers import binary
from vqscale.quantizers.base import Quantized
from vqscale.quantizers.config.implicit import LFQConfig
from vqscale.quantizers.gradients import straight_through
from vqscale.quantizers.implicit import ImplicitQuantizer


class LFQ(ImplicitQuantizer):
    def __init__(self, config: LFQConfig, mesh: Mesh | None = None, *, seed: int = 0) -> None:
        super().__init__(config, config.bits(), 2 ** config.bits(), mesh)
        self.config, self.digits = config, (2,) * self.dim
        self.unit: Tensor  # in the type that codes have
        self.register_buffer("unit", torch.ones((), device=self.mesh.device), persistent=False)

    @property
    def breaks_graph(self) -> str | None:
        return super().breaks_graph or (products.rounded() if self.config.entropy_weight else None)

    def forward(self, x_ND: Tensor) -> Quantized:
        latent_ND = self.taken(x_ND)
        x_ND = self.framed(latent_ND)
        bits_ND = x_ND > 0
        ids_N, c_ND = bits.to_ids(bits_ND), binary.codes(bits_ND, 1.0, self.unit)
        losses, stats = binary.entropies(4 / self.config.entropy_temperature * x_ND, self.config, self.mesh)
        losses["commitment"] = self.config.commitment_weight * F.mse_loss(x_ND, c_ND.to(x_ND.dtype))
        stats |= self.watch(latent_ND, ids_N, self.dim**0.5)
        return Quantized(straight_through(x_ND, c_ND), ids_N, losses, stats)

    @torch.no_grad()
    def encode(self, x_ND: Tensor) -> Tensor:
        return bits.to_ids(self.framed(self.findable(x_ND)) > 0)

    @torch.no_grad()
    def decode(self, ids_N: Tensor) -> Tensor:
        return binary.codes(bits.to_bits(self.known(ids_N), self.dim), 1.0, self.unit)
