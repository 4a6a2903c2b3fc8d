"""Residual: each level quantizes what the levels before it left (Zeghidour et al. 2021). Made of any quantizer.

    r_0 = x,   z_i = s^i Q_i(r_i / s^i),   r_{i+1} = r_i - sg(z_i),   z = sum_i z_i

Every level has a codebook of its own; s (scale) below 1 lets quantizers of a fixed range, such as fsq, refine. With
rows drawn from data, level i + 1 warms up `stagger` steps longer than level i: before that it has nothing to see.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vqscale.codes.config import UpkeepConfig
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import Quantized
from vqscale.quantizers.columns import Columns, join
from vqscale.quantizers.config import SingleConfig
from vqscale.quantizers.config.compositions import ResidualConfig


class Residual(Columns):
    def __init__(self, config: ResidualConfig, mesh: Mesh | None = None, *, seed: int = 0) -> None:
        super().__init__([_level(config, i) for i in range(config.levels)], mesh, seed)
        self.config, self.dim = config, self.quantizers()[0].dim

    def forward(self, x_ND: Tensor) -> Quantized:
        x_ND = self.taken(x_ND)
        answers, rest_ND, z_ND = [], x_ND, torch.zeros_like(x_ND)
        for i, level in enumerate(self.quantizers()):
            scale = self.config.scale**i
            answers.append(level(rest_ND / scale))
            part_ND = answers[-1].z * scale
            z_ND, rest_ND = z_ND + part_ND, rest_ND - part_ND.detach()
        return join(answers, z_ND)

    @torch.no_grad()
    def encode(self, x_ND: Tensor) -> Tensor:
        ids, rest_ND = [], self.taken(x_ND)
        for i, level in enumerate(self.quantizers()):
            scale = self.config.scale**i
            ids.append(level.encode(rest_ND / scale))
            rest_ND = rest_ND - level.decode(ids[-1]) * scale
        return torch.stack(ids, dim=1)

    @torch.no_grad()
    def decode(self, ids_N: Tensor) -> Tensor:
        parts = [level.decode(ids_N[:, i]) * self.config.scale**i for i, level in enumerate(self.quantizers())]
        z_ND = torch.zeros_like(parts[0])
        for part_ND in parts:  # in the order of `forward`, so that the sum is the same to the bit
            z_ND = z_ND + part_ND
        return z_ND


def _level(config: ResidualConfig, level: int) -> SingleConfig:
    inner = config.inner
    if isinstance(inner, UpkeepConfig) and inner.init == "data":
        return replace(inner, warmup_steps=inner.warmup_steps + level * config.stagger)
    return inner
