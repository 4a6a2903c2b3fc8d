"""Whitening: latents with mean 0 and covariance 1 in every step, for quantizers whose codes stand still.

    y = (x - m) C^(-1/2)        m, C: mean and covariance, with a small ridge (moments.py)

A frame that is fitted once is soon worse than none, because nothing holds the scale and the correlation of latents. In
training m and C are those of the step's tokens of all ranks (of a micro-batch with accumulation), with a gradient; in
evaluation they are running averages, which are part of the saved tokenizer, so that `encode` is a fixed function.

Frozen, it whitens by the running moments in training too, and these stay as they are.

As with rows from data, it begins when a training loop calls `begin`: until then, and where it has seen no step,
latents pass as they are, the published form.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.beginning import Fit, of_moments
from vqscale.quantizers.moments import inverse_root, moments, with_ridge


class Whitening(nn.Module):
    # Not the state of a training but part of what the tokenizer computes: saved with the parameters.
    saved_buffers = ("mean_D", "covariance_DD", "steps")

    def __init__(self, dim: int, mesh: Mesh, decay: float, gradient: bool) -> None:
        super().__init__()
        self.mesh, self.decay, self.gradient = mesh, decay, gradient
        self.driven = self.frozen = False
        self._begun = False  # running moments are there, as an update has found: no other asks the device
        self.mean_D: Tensor
        self.covariance_DD: Tensor
        self.steps: Tensor
        self.register_buffer("mean_D", torch.zeros(dim, dtype=torch.float64, device=mesh.device))
        self.register_buffer("covariance_DD", torch.eye(dim, dtype=torch.float64, device=mesh.device))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.float64, device=mesh.device))
        self._seen: tuple[Tensor, Tensor] | None = None
        self._tokens = 0  # of all ranks, in the last pass
        self.begun: Fit | None = None  # by the last update, if it was the first

    @property
    def fitted(self) -> bool:
        """Running moments are there: a wait for the device, for evaluation."""
        return bool(self.steps[0] > 0)

    @property
    def _follows(self) -> bool:
        """Whether latents are whitened by the moments of the step."""
        return self.training and self.driven and not self.frozen

    @property
    def acts(self) -> bool:
        return self._follows or self.fitted

    def forward(self, x_ND: Tensor) -> Tensor:
        """y_ND in the type of x; x itself where `acts` is false. Collective in a driven training."""
        if not self._follows:
            return self._framed(x_ND, self.mean_D, self.covariance_DD) if self.fitted else x_ND
        with torch.set_grad_enabled(self.gradient and torch.is_grad_enabled()):
            mean_D, covariance_DD = moments(x_ND, self.mesh.world)
        self._seen = (mean_D.detach(), covariance_DD.detach())
        self._tokens = len(x_ND) * self.mesh.world.size
        if self._tokens <= x_ND.shape[1] and self.fitted:  # too few to have a covariance
            mean_D, covariance_DD = self.mean_D, self.covariance_DD
        return self._framed(x_ND, mean_D, covariance_DD)

    def _framed(self, x_ND: Tensor, mean_D: Tensor, covariance_DD: Tensor) -> Tensor:
        y_ND: Tensor = (x_ND.double() - mean_D.double()) @ inverse_root(with_ridge(covariance_DD.double()))
        return y_ND.to(x_ND.dtype)

    @torch.no_grad()
    def update(self, stepped: bool) -> None:
        """After an optimiser step: its moments join the running ones; those of a step that was skipped do not."""
        self.begun = None
        if self._seen is not None and stepped:
            if not self._begun and not self.fitted:
                self.begun = of_moments(*self._seen, self._tokens)
            self._begun = True
            weight = torch.where(self.steps > 0, 1.0 - self.decay, 1.0)
            for running, seen in zip((self.mean_D, self.covariance_DD), self._seen, strict=True):
                running.copy_(running + weight * (seen - running))
            self.steps += 1
        self._seen = None
