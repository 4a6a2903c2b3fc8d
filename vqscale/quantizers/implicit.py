"""What quantizers without a table share: usage, and the whitening that brings latents to where their codes are."""

from __future__ import annotations

from torch import Tensor

from vqscale.codes.usage import Usage
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import Quantizer, Renewed
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

    def begin(self) -> None:
        self.usage.begin()
        if self.whitening is not None:
            self.whitening.driven = True

    def update(self, stepped: bool = True) -> list[Renewed]:
        self.usage.update(stepped)
        if self.whitening is not None:
            self.whitening.update(stepped)
        return []
