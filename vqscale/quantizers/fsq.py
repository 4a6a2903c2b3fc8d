"""FSQ: finite scalar quantization (Mentzer et al. 2023). Every channel is bounded and rounded to one of its L levels.

    h = (L - 1) (1 - eps) / 2,  o = 1/2 for even L, else 0,  s = atanh(o / h)          r = floor(L / 2)
    digit k = round(h tanh(x + s) - o) + r in 0 .. L - 1,      code (k - r) / r

`symmetric` (arXiv 2411.19842) has r = (L - 1) / 2 and k = floor(r tanh x + r + 1/2), so that even L has both ends.
Backward the rounding is the identity. Ids are mixed radix with the first channel least significant, in int64. There is
nothing to learn, no loss and no table: codes are computed from ids. Do not quantize codes again: that changes them.

With fit: whiten a training sees x whitened, times s_L - the scale at which the digits of a Gaussian have the largest
entropy - and less the shift of even L, so that latents fill the levels evenly (whitening.py).
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import Quantized, full
from vqscale.quantizers.config.implicit import FSQConfig
from vqscale.quantizers.gradients import straight_through
from vqscale.quantizers.implicit import ImplicitQuantizer


class FSQ(ImplicitQuantizer):
    def __init__(self, config: FSQConfig, mesh: Mesh | None = None, *, seed: int = 0) -> None:
        levels = config.channels()
        super().__init__(config, len(levels), math.prod(levels), mesh)
        self.config, self.digits, mesh = config, tuple(reversed(levels)), self.mesh
        self.levels_D: Tensor
        self.basis_D: Tensor
        self.unit: Tensor  # in the type that codes have
        basis = [math.prod(levels[:place]) for place in range(len(levels))]
        self.register_buffer("levels_D", torch.tensor(levels, device=mesh.device), persistent=False)
        self.register_buffer("basis_D", torch.tensor(basis, device=mesh.device), persistent=False)
        self.register_buffer("unit", torch.ones((), device=mesh.device), persistent=False)
        self.code_norm = mean_norm(levels, config.symmetric)
        self.spread_D: Tensor
        scales = [] if self.whitening is None else [evenest_scale(number, config) for number in levels]
        spread_D = torch.tensor(scales, dtype=torch.float64, device=mesh.device)
        self.register_buffer("spread_D", spread_D, persistent=False)

    def forward(self, x_ND: Tensor) -> Quantized:
        x_ND = self.taken(x_ND)
        y_ND, digits_ND = self._round(self._placed(x_ND))
        ids_N = (digits_ND * self.basis_D).sum(1)
        stats = self.watch(x_ND, ids_N, self.code_norm)
        stats["saturation"] = x_ND.new_ones(())
        return Quantized(straight_through(y_ND, self._codes(digits_ND)), ids_N, {}, stats)

    def _placed(self, x_ND: Tensor) -> Tensor:
        """Where x fills the levels of every channel evenly: whitened, scaled, and centred among them."""
        if self.whitening is None or not self.whitening.acts:
            return x_ND
        y_ND = self.whitening(x_ND) * self.spread_D.to(x_ND.dtype)
        return y_ND if self.config.symmetric else y_ND - self._shift(self.levels_D.to(x_ND.dtype))[0]

    def _shift(self, levels_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(shift, half, offset) of every channel, see the top."""
        half_D = (levels_D - 1) * (1 - self.config.eps) / 2
        offset_D = torch.where(levels_D % 2 == 0, 0.5, 0.0).to(levels_D.dtype)
        shift = torch.atanh if self.config.shift == "atanh" else torch.tan
        return shift(offset_D / half_D), half_D, offset_D

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
            shift_D, half_D, offset_D = self._shift(levels_D)
            f_ND = half_D * torch.tanh(x_ND + shift_D) - offset_D
            digits_ND = torch.round(f_ND) + radius_D
        digits_ND = digits_ND.nan_to_num(0.0).to(torch.int64)
        return f_ND / radius_D, torch.minimum(digits_ND, self.levels_D - 1).clamp_min(0)

    def _codes(self, digits_ND: Tensor) -> Tensor:
        kind = full(self.unit).dtype
        radius_D = self._radius(self.levels_D.to(kind))
        return (digits_ND.to(kind) - radius_D) / radius_D

    @torch.no_grad()
    def encode(self, x_ND: Tensor) -> Tensor:
        return (self._round(self._placed(self.findable(x_ND)))[1] * self.basis_D).sum(1)

    @torch.no_grad()
    def decode(self, ids_N: Tensor) -> Tensor:
        return self._codes(self.known(ids_N)[:, None] // self.basis_D % self.levels_D)


def evenest_scale(levels: int, config: FSQConfig) -> float:
    """s_L: the standard deviation of a Gaussian, centred among the levels, whose digits have the largest entropy."""
    half = (levels - 1) / 2 if config.symmetric else (levels - 1) * (1 - config.eps) / 2
    inner = [place - (levels - 2) / 2 for place in range(levels - 1)]  # boundaries between digits, about the middle
    edges = [math.atanh(edge / half) for edge in inner]

    def entropy(scale: float) -> float:
        below = [0.0, *(0.5 * (1 + math.erf(edge / (scale * math.sqrt(2)))) for edge in edges), 1.0]
        shares = [high - low for low, high in pairwise(below)]
        return -sum(share * math.log(share) for share in shares if share > 0)

    if levels == 2:
        return 1.0  # one boundary, in the middle: every scale is as good
    low, high = 0.2, 5.0
    for _ in range(80):  # ternary search: the entropy has one maximum
        third = (high - low) / 3
        low, high = (low + third, high) if entropy(low + third) < entropy(high - third) else (low, high - third)
    return (low + high) / 2


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
