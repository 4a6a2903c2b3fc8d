"""SimVQ: a basis C, frozen, under one learned linear map; the codes are E = C W^T + b (Zhu et al. 2024).

    k = nearest row of E,   z = E[k],   losses  weight (|sg(x) - z|^2 + commitment_weight |x - sg(z)|^2)

E is never made: |x - W c - b|^2 = |x - b|^2 - 2 (W^T (x - b)) . c + c^T (W^T W) c, so tokens are projected once and
searched among the frozen rows with a bias per row. The rows of the chosen codes come back to the ranks whose tokens
chose them, and W acts there: its gradient is a data-parallel one like that of any other layer.

init: normal is the published start: a basis N(0, 1/d) and the first values of a linear layer, whose codes lie in a ball
of norm 1 far inside the latents. With init: data (the default of a training, see `begin`) the basis is drawn from
latents after a warm-up, and whitened with the mean m and the covariance S of the drawn rows; the way back is the start
of the map, so the first codes are those very latents:

    c = S^(-1/2) (x - m),   W = S^(1/2),   b = m

What is learned is W as before, by the same steps: the frame S^(1/2) - W'_0 and m - b'_0 lies in buffers beside the
parameters (W'_0, b'_0: their first values), so that no engine has to set them. A dead row is revived where the map
takes it to a token x, c = W^(-1) (x - b), or near it where the map has all but lost a direction that x needs.

learn_basis: true learns C beside W, each row by the tokens that chose it, as a table's rows are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqscale.codes import backend, products, scan
from vqscale.codes.codebook import Codebook
from vqscale.codes.merge import full_precision
from vqscale.codes.revival import Filled, Upkeep
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import Quantized, Renewed, UpheldQuantizer, table_stats
from vqscale.quantizers.beginning import Fit, fit_rows, undrawn
from vqscale.quantizers.config.tables import SimVQConfig
from vqscale.quantizers.gradients import ESTIMATORS
from vqscale.quantizers.moments import BLOCK, roots
from vqscale.seed import derive

LONGEST = 10.0  # of revived rows, as a multiple of |x - b| over the root mean square of the map's singular values


class SimVQ(UpheldQuantizer):
    def __init__(self, config: SimVQConfig, mesh: Mesh | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.config, self.dim, self.num_codes = config, config.dim, config.num_codes
        self.mesh = mesh = mesh or Mesh()
        self.codebook = Codebook(
            config.num_codes,
            config.dim,
            mesh=mesh,
            similarity="euclid",
            init_scale=config.dim**-0.5,
            seed=seed,
            learned=config.learn_basis,
            scan_mib=config.scan_mib,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "map"))
            self.map = nn.Linear(config.dim, config.dim, bias=config.bias).to(mesh.device)
        self.frame = Frame(self.map) if config.init == "data" else None
        self.upkeep = Upkeep(self.codebook, config, mesh, seed)
        self._seen: tuple[Tensor, Tensor] | None = None

    @property
    def breaks_graph(self) -> str | None:
        return backend.in_blocks(self.codebook.rows) or products.rounded()

    def forward(self, x_ND: Tensor) -> Quantized:
        x_ND = self.taken(x_ND)
        weight_DD, bias_D = self._affine()
        if self.training:
            self._seen = (weight_DD.detach().clone(), bias_D.detach().clone())
        ids_N, norm_k = self._search(x_ND)
        if self.training:
            self.upkeep.observe(x_ND, ids_N)
        stats = table_stats(self.codebook, self.upkeep, x_ND, ids_N, self.training, norm_k)
        stats["saturation"] = x_ND.new_ones(())
        if self.passing:
            return Quantized(x_ND, ids_N, {}, stats)
        z_ND = self._map(self.codebook.lookup(ids_N))
        weight = self.config.quantizer_weight
        losses = {
            "codebook": weight * F.mse_loss(z_ND, x_ND.detach()),
            "commitment": weight * self.config.commitment_weight * F.mse_loss(x_ND, z_ND.detach()),
        }
        z_ND = ESTIMATORS[self.config.gradient](x_ND, z_ND)
        return Quantized(self.landed(x_ND, z_ND), ids_N, losses, stats)

    def _affine(self) -> tuple[Tensor, Tensor]:
        """(W, b) as they act."""
        weight_DD = self.map.weight
        bias_D = weight_DD.new_zeros(self.dim) if self.map.bias is None else self.map.bias
        return (weight_DD, bias_D) if self.frame is None else self.frame.around(weight_DD, bias_D)

    def _map(self, c_ND: Tensor) -> Tensor:
        with full_precision(c_ND):
            if self.frame is None:
                z_ND: Tensor = self.map(c_ND)
                return z_ND
            return F.linear(c_ND, *self._affine())

    @torch.no_grad()
    def _search(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(ids_N, norm of each code of this rank): the nearest of the mapped rows."""
        rows = self.codebook.rows
        with full_precision(x_ND):
            weight, bias = self._affine()
            shift = 0 if self.frame is None and self.map.bias is None else bias
            square_k = scan.quadratic(rows, weight.t() @ weight, self.codebook.budget)
            ids_N, _ = self.codebook.nearest((x_ND - shift) @ weight, scan.Keys(rows, -0.5 * square_k))
            if torch.is_tensor(shift):  # |W c + b|^2
                square_k = square_k + 2 * rows @ (weight.t() @ bias) + bias.square().sum()
        return ids_N, square_k.clamp_min(0).sqrt()

    def encode(self, x_ND: Tensor) -> Tensor:
        return self._search(self.findable(x_ND))[0]

    @torch.no_grad()
    def decode(self, ids_N: Tensor) -> Tensor:
        return self._map(self.codebook.lookup(self.known(ids_N)))

    def update(self, stepped: bool = True) -> list[Renewed]:
        changed = self.upkeep.update(stepped, self._back)
        self._fits = {}
        if self.upkeep.filled is not None:
            self._fits["fit"] = self.fit(self.upkeep.filled)
            changed = torch.arange(len(self.codebook.rows), device=changed.device)
        return [(self.codebook.rows, changed)] if self.config.learn_basis else []

    def _back(self, x_PD: Tensor) -> Tensor:
        """Basis rows that the map of the last forward pass takes to x, or near it where they would be too long."""
        assert self._seen is not None, "codes are revived after a forward pass"
        weight_DD, bias_D = (part.double() for part in self._seen)
        return _back_through(weight_DD, x_PD.double() - bias_D)

    @torch.no_grad()
    def fit(self, filled: Filled) -> Fit:
        """The rows, which are latents now, become a whitened basis, and the frame the way back. Collective.

        Rows without a token are N(0, 1) on that basis. Constant latents have no scale: their basis is not whitened.
        """
        assert self.frame is not None, "only init: data fits"
        assert self._seen is not None, "a fit follows a forward pass"
        found, mean_D, covariance_DD = fit_rows(self.codebook, filled)
        if self.map.bias is None:  # there is no place for a mean: it counts as spread
            covariance_DD, mean_D = covariance_DD + torch.outer(mean_D, mean_D), torch.zeros_like(mean_D)
        elif found.rank == 0:
            covariance_DD = torch.eye(self.dim).to(covariance_DD)
        out_DD, in_DD = roots(covariance_DD)
        rest = undrawn(self.codebook, filled)
        self.codebook.rows[:rest] *= self.dim**0.5
        for rows_kD in self.codebook.rows[rest:].split(BLOCK):
            rows_kD.copy_((rows_kD.double() - mean_D) @ in_DD)
        weight_DD, bias_D = self._seen
        self.frame.root_DD.add_(out_DD - weight_DD)
        self.frame.mean_D.add_(mean_D - bias_D)
        return found


class Frame(nn.Module):
    """What stands beside the learned map, so that the map began at S^(1/2) and m; zeros before the fit."""

    saved_buffers = ("root_DD", "mean_D")  # part of what the tokenizer computes

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.root_DD: Tensor
        self.mean_D: Tensor
        self.register_buffer("root_DD", torch.zeros_like(layer.weight))
        self.register_buffer("mean_D", layer.weight.new_zeros(len(layer.weight)))

    def around(self, weight_DD: Tensor, bias_D: Tensor) -> tuple[Tensor, Tensor]:
        return self.root_DD + weight_DD, self.mean_D + bias_D


def _back_through(weight_DD: Tensor, x_PD: Tensor) -> Tensor:
    """c_PD with W c = x; where a row would be LONGEST times as long as a map that treats all directions alike makes it,
    the c that minimises |W c - x|^2 + damping |c|^2.

    A map loses directions that latents do not need. Rows that are to reach a latent there grow without bound, a step of
    the map throws their codes as far, and the losses follow.
    """
    gain = weight_DD.square().mean().mul(len(weight_DD)).sqrt()  # the root mean square of singular values
    c_PD = torch.linalg.solve_ex(weight_DD, x_PD.t()).result.t()
    damping = (gain / (2 * LONGEST)).square() * torch.eye(len(weight_DD), dtype=x_PD.dtype, device=x_PD.device)
    damped_PD = torch.linalg.solve_ex(weight_DD.t() @ weight_DD + damping, weight_DD.t() @ x_PD.t()).result.t()
    usual = gain * c_PD.norm(dim=1, keepdim=True) <= LONGEST * x_PD.norm(dim=1, keepdim=True)
    near_PD = torch.where(usual, c_PD, damped_PD)
    return torch.where(near_PD.isfinite().all(1, keepdim=True), near_PD, x_PD)  # a map that is lost
