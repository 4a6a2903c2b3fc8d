"""LFQ: lookup-free quantization (MAGVIT-v2, Yu et al. 2023). A code is the signs of the channels; K = 2^D.

q = sign(x) in {-1, 1}^D, 0 counting as -1; z = sg(q) + x - sg(x). The first channel is the most significant bit of an
id. Losses: commitment_weight |x - q|^2 (mean over N D) and the entropy loss of binary.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.codes import bits
from vqscale.codes.usage import Usage
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers import binary
from vqscale.quantizers.base import Quantized, Quantizer, Renewed, full
from vqscale.quantizers.config.implicit import LFQConfig
from vqscale.quantizers.gradients import straight_through


class LFQ(Quantizer):
    def __init__(self, config: LFQConfig, mesh: Mesh | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.mesh = mesh or Mesh()
        self.config, self.dim, self.num_codes = config, config.bits(), 2 ** config.bits()
        self.usage = Usage(self.num_codes, self.mesh, config.window_decay)
        self.unit: Tensor  # in the type that codes have
        self.register_buffer("unit", torch.ones((), device=self.mesh.device), persistent=False)

    def forward(self, x_ND: Tensor) -> Quantized:
        x_ND = full(x_ND)
        bits_ND = x_ND > 0
        ids_N, c_ND = bits.to_ids(bits_ND), binary.codes(bits_ND, 1.0, self.unit)
        losses, stats = binary.entropies(4 / self.config.entropy_temperature * x_ND, self.config, self.mesh)
        losses["commitment"] = self.config.commitment_weight * F.mse_loss(x_ND, c_ND.to(x_ND.dtype))
        stats |= self.usage.observe(ids_N)
        stats["code_norm"] = x_ND.new_full((), self.dim**0.5)
        stats["latent_norm"] = x_ND.detach().norm(dim=1).mean()
        return Quantized(straight_through(x_ND, c_ND), ids_N, losses, stats)

    @torch.no_grad()
    def encode(self, x_ND: Tensor) -> Tensor:
        return bits.to_ids(x_ND > 0)

    @torch.no_grad()
    def decode(self, ids_N: Tensor) -> Tensor:
        return binary.codes(bits.to_bits(ids_N, self.dim), 1.0, self.unit)

    def begin(self) -> None:
        self.usage.begin()

    def update(self, stepped: bool = True) -> list[Renewed]:
        self.usage.update(stepped)
        return []
