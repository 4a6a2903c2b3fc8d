"""Grouped: x is cut into equal parts, each with a quantizer of its own (product quantization, Jegou et al. 2011).

    z = [Q_1(x^1), ..., Q_G(x^G)],   x = [x^1, ..., x^G]

K^G combinations for the cost of K: num_codes is the K of one part, dim the whole dimension, G times the inner one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import Quantized
from vqscale.quantizers.columns import Columns, join
from vqscale.quantizers.config.compositions import GroupedConfig


class Grouped(Columns):
    def __init__(self, config: GroupedConfig, mesh: Mesh | None = None, *, seed: int = 0) -> None:
        super().__init__([config.inner] * config.groups, mesh, seed)
        self.config = config
        self.dim = sum(part.dim for part in self.quantizers())

    def forward(self, x_ND: Tensor) -> Quantized:
        answers = [part(x_Nd) for part, x_Nd in zip(self.quantizers(), self._cut(x_ND), strict=True)]
        return join(answers, torch.cat([answer.z for answer in answers], dim=1))

    def _cut(self, x_ND: Tensor) -> tuple[Tensor, ...]:
        return self.taken(x_ND).split(self.quantizers()[0].dim, dim=1)

    def encode(self, x_ND: Tensor) -> Tensor:
        parts = zip(self.quantizers(), self._cut(x_ND), strict=True)
        return torch.stack([part.encode(x_Nd) for part, x_Nd in parts], dim=1)

    def decode(self, ids_N: Tensor) -> Tensor:
        return torch.cat([part.decode(ids_N[:, i]) for i, part in enumerate(self.quantizers())], dim=1)
