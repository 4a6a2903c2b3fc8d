"""What quantizers without a table share: usage, and the whitening that brings latents to where their codes are."""

from __future__ import annotations

from torch import Tensor

from vqscale.codes.usage import Usage
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import Quantizer, Renewed
from vqscale.quantizers.beginning import Fit
from vqscale.quantizers.config.implicit import ImplicitConfig
from vqscale.quantizers.whitening import Whitening


class ImplicitQuantizer(Quantizer):
    """Abstract: codes are computed from ids, and stand still."""

    def __init__(self, config: ImplicitConfig, dim: int, num_codes: int, mesh: Mesh | None) -> None:
        super().__init__()
        self.mesh, self.dim, self.num_codes = mesh or Mesh(), dim, num_codes
        self.usage = Usage(num_codes, self.mesh, config.window_decay)
        whitens = config.fit == "whiten"
        decay, gradient = config.whiten_decay, config.whiten_gradient
        self.whitening = Whitening(dim, self.mesh, decay, gradient) if whitens else None

    def framed(self, x_ND: Tensor) -> Tensor:
        """x in the frame of the codes: whitened once a training loop drives, x itself before and with fit: none."""
        return x_ND if self.whitening is None else self.whitening(x_ND)

    def watch(self, x_ND: Tensor, ids_N: Tensor, code_norm: float) -> dict[str, Tensor]:
        """Count in training; the statistics that every quantizer has, but for saturation. x is not framed yet."""
        stats = self.usage.observe(ids_N)
        stats["code_norm"] = x_ND.new_full((), code_norm)
        stats["latent_norm"] = x_ND.detach().norm(dim=1).mean()
        stats["landing"] = x_ND.new_ones(())
        return stats

    def begin(self) -> None:
        self.usage.begin()
        if self.whitening is not None:
            self.whitening.driven = True

    @property
    def breaks_graph(self) -> str | None:
        if self.whitening is not None:
            return "of eigenvalues (fit: whiten) the host reads whether they converged"
        if self.usage.window is None:
            return f"of {self.num_codes:,} codes those that were taken are counted, however many they are"
        return None

    def note(self) -> None:
        self.usage.note()

    def freeze(self) -> None:
        super().freeze()
        self.freeze_frame()

    def freeze_frame(self) -> None:
        if self.whitening is not None:
            self.whitening.frozen = True

    def update(self, stepped: bool = True) -> list[Renewed]:
        self.usage.update(stepped)
        if self.whitening is not None:
            self.whitening.update(stepped)
        return []

    def shortages(self, tokens: int) -> list[str]:
        if self.whitening is None or tokens > self.dim:
            return []
        return [
            f"warning: a pass has {tokens} tokens of all ranks and latents have {self.dim} dimensions: no covariance "
            "of so few has full rank, so all steps but the first are whitened by the running mean and covariance, "
            "without a gradient; use a larger data.batch, or less engine.accumulation"
        ]

    def fits(self) -> dict[str, Fit]:
        begun = None if self.whitening is None else self.whitening.begun
        return {} if begun is None else {"fit": begun}
