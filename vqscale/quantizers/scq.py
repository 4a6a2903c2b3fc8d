"""SCQ: soft convex quantization, a sparse convex combination of codes (Gautam et al. 2024).

    z = C P,    P = arg min |x - C P|^2 + lam |P - onehot|^2  over the simplex,    onehot the nearest code, a constant
    loss  quantization_weight |x - z|^2,  mean over N D

This is NOT a quantization: z is continuous, and inside the convex hull of the codes it comes as near to x as lam lets
it. The ids (the code of the largest weight, the lowest id among equals) say less than z; a prior can learn them, but
`decode(ids)` returns rows, not z. What z would cost to store is in the statistic `bits`: per token, log2 K for each
code whose weight is not zero at WEIGHT_BITS bits, and those bits for each weight but the last, which the others give.
Compare quantizers at equal bits.

Gradients are exact and pass through P, with no straight-through estimator: the decoder's gradient reaches the encoder
and the rows by the implicit derivative of the minimum (codes/convex/exact.py), or of the relaxation
(codes/convex/relaxed.py). Where P has one code, that is a zero gradient to the encoder, and only the loss trains it:
as lam grows, everywhere.

What the paper's loss is could not be established beyond |Z - Z_q|^2; its public re-implementations have it without
stop-gradients, and so has this one. Their relaxation ends in a projection that is not exact; here it is.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.codes import tally
from vqscale.codes.convex import exact, relaxed, simplex
from vqscale.codes.convex.simplex import Shape
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import Quantized, TableQuantizer
from vqscale.quantizers.config.tables import SCQConfig

WEIGHT_BITS = 16


class SCQ(TableQuantizer):
    """Statistics beside the usual: support (codes per token), bits, perplexity_soft (exp of the entropy of the mean of
    P over all tokens of all ranks) and, of the exact solver, residual: the largest violation of the optimality
    conditions of any token, as a share of the size of the slope. `saturation` is the largest weight, as a mean."""

    exact_decode = False

    def __init__(self, config: SCQConfig, mesh: Mesh | None = None, *, seed: int = 0) -> None:
        super().__init__(config, "euclid", mesh, seed=seed)
        self.config = config

    def forward(self, x_ND: Tensor) -> Quantized:
        x_ND = self.taken(x_ND)
        z_ND, shape, residual_N = self._combine(x_ND)
        z_ND = z_ND.masked_fill(~x_ND.isfinite().all(1, keepdim=True), torch.nan)
        stats = self.watch(x_ND, shape.ids_N) | (self._stats(shape, residual_N) if tally.statistics.on else {})
        if self.passing:
            return Quantized(x_ND, shape.ids_N, {}, stats)
        losses = {"quantization": self.config.quantization_weight * F.mse_loss(z_ND, x_ND)}
        return Quantized(self.landed(x_ND, z_ND), shape.ids_N, losses, stats)

    def _combine(self, x_ND: Tensor) -> tuple[Tensor, Shape, Tensor | None]:
        residual_N = None
        if self.config.solver == "relaxed":
            z_ND, entries = relaxed.combine(x_ND, self.codebook, self.config.lam)
        else:
            z_ND, entries, solution = exact.combine(x_ND, self.codebook, self.config.lam)
            residual_N = solution.residual_N
        return z_ND, simplex.describe(entries, len(x_ND), self.codebook, 0.5**WEIGHT_BITS / 2), residual_N

    @torch.no_grad()
    def _stats(self, shape: Shape, residual_N: Tensor | None) -> dict[str, Tensor]:
        bits_N = shape.stored_N * math.log2(self.num_codes) + (shape.stored_N - 1) * WEIGHT_BITS
        stats = {
            "saturation": shape.largest_N.mean(),
            "support": shape.count_N.mean(),
            "bits": bits_N.mean(),
            "perplexity_soft": tally.entropy_of_mean(shape.columns_k, len(shape.ids_N), self.mesh).exp(),
        }
        if residual_N is not None:
            stats["residual"] = ops.max_over(F.pad(residual_N, (0, 1)).amax(), self.mesh.world)
        return stats

    @torch.no_grad()
    def encode(self, x_ND: Tensor) -> Tensor:
        return self._combine(self.findable(x_ND))[1].ids_N

    @torch.no_grad()
    def decode(self, ids_N: Tensor) -> Tensor:
        """The rows of the codes with the largest weights: not what `forward` gave, which no id can say."""
        return self.codebook.lookup(self.known(ids_N))
