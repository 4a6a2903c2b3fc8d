"""FSQ: finite scalar quantization (Mentzer et al. 2023). Every channel is bounded and rounded to one of its L levels.

    h = (L - 1) (1 - eps) / 2,  o = 1/2 for even L, else 0,  s = atanh(o / h)          r = floor(L / 2)
    digit k = round(h tanh(x + s) - o) + r in 0 .. L - 1,      code (k - r) / r

`symmetric` (arXiv 2411.19842) has r = (L - 1) / 2 and k = floor(r tanh x + r + 1/2), so that even L has both ends.
Backward the rounding is the identity. Ids are mixed radix with the first channel least significant, in int64. There is
nothing to learn, no loss and no table: codes are computed from ids. Do not quantize codes again: that changes them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vqscale.codes.usage import Usage
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import Quantized, Quantizer, Renewed, full
from vqscale.quantizers.config.implicit import FSQConfig
from vqscale.quantizers.gradients import straight_through


class FSQ(Quantizer):
    def __init__(self, config: FSQConfig, mesh: Mesh | None = None, *, seed: int = 0) -> None:
        super().__init__()
        mesh, levels = mesh or Mesh(), config.channels()
        self.config, self.dim, self.num_codes = config, len(levels), math.prod(levels)
        self.usage = Usage(self.num_codes, mesh, config.window_decay)
        self.levels_D: Tensor
        self.basis_D: Tensor
        self.unit: Tensor  # in the type that codes have
        basis = [math.prod(levels[:place]) for place in range(len(levels))]
        self.register_buffer("levels_D", torch.tensor(levels, device=mesh.device), persistent=False)
        self.register_buffer("basis_D", torch.tensor(basis, device=mesh.device), persistent=False)
        self.register_buffer("unit", torch.ones((), device=mesh.device), persistent=False)
        self.code_norm = mean_norm(levels, config.symmetric)

    def forward(self, x_ND: Tensor) -> Quantized:
        x_ND = full(x_ND)
        y_ND, digits_ND = self._round(x_ND)
        ids_N = (digits_ND * self.basis_D).sum(1)
        stats = self.usage.observe(ids_N)
        stats["code_norm"] = x_ND.new_full((), self.code_norm)
        stats["latent_norm"] = x_ND.detach().norm(dim=1).mean()
        stats["saturation"] = x_ND.new_ones(())
        return Quantized(straight_through(y_ND, self._codes(digits_ND)), ids_N, {}, stats)

    def _radius(self, levels_D: Tensor) -> Tensor:
        return (levels_D - 1) / 2 if self.config.symmetric else torch.floor(levels_D / 2)

    def _round(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(codes before rounding, digits int64). A token that is not a number has digits 0, and stays none."""
        levels_D = self.levels_D.to(x_ND.dtype)
        radius_D = self._radius(levels_D)
        if self.config.symmetric:
            f_ND = radius_D * torch.tanh(x_ND)
            digits_ND = torch.floor(f_ND + radius_D + 0.5)
        else:
            half_D = (levels_D - 1) * (1 - self.config.eps) / 2
            offset_D = torch.where(self.levels_D % 2 == 0, 0.5, 0.0).to(x_ND.dtype)
            shift = torch.atanh if self.config.shift == "atanh" else torch.tan
            f_ND = half_D * torch.tanh(x_ND + shift(offset_D / half_D)) - offset_D
            digits_ND = torch.round(f_ND) + radius_D
        digits_ND = digits_ND.nan_to_num(0.0).to(torch.int64)
        return f_ND / radius_D, torch.minimum(digits_ND, self.levels_D - 1).clamp_min(0)

    def _codes(self, digits_ND: Tensor) -> Tensor:
        kind = full(self.unit).dtype
        radius_D = self._radius(self.levels_D.to(kind))
        return (digits_ND.to(kind) - radius_D) / radius_D

    @torch.no_grad()
    def encode(self, x_ND: Tensor) -> Tensor:
        return (self._round(full(x_ND))[1] * self.basis_D).sum(1)

    @torch.no_grad()
    def decode(self, ids_N: Tensor) -> Tensor:
        return self._codes(ids_N[:, None] // self.basis_D % self.levels_D)

    def begin(self) -> None:
        self.usage.begin()

    def update(self, stepped: bool = True) -> list[Renewed]:
        self.usage.update(stepped)
        return []


def mean_norm(levels: tuple[int, ...], symmetric: bool) -> float:
    """The mean length of all codes, without enumerating them.

    sqrt(S) is an integral over exp(-t S), whose mean is a product over channels:
    E sqrt(S) = 1 / (2 sqrt(pi)) int_0^inf (1 - prod_i E exp(-t c_i^2)) t^(-3/2) dt, here with t = exp(u).
    """
    step, total = 0.25, 0.0
    radii = [(number - 1) / 2 if symmetric else number // 2 for number in levels]
    squares = [((np.arange(number) - r) / r) ** 2 for number, r in zip(levels, radii, strict=True)]
    for u in np.arange(-80.0, 80.0, step):
        means = [float(np.expm1(-math.exp(u) * values).mean()) for values in squares]
        log_mean = sum(math.log1p(max(mean, -1 + 1e-16)) for mean in means)
        total -= math.expm1(log_mean) * math.exp(-u / 2) * step
    return total / (2 * math.sqrt(math.pi))
