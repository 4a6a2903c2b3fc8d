"""Mean and covariance of the latents of all ranks, and roots of a covariance: where `fit` learns where latents are.

Sums are float64 and travel once: D^2 + D + 1 numbers, whatever the tokens are. Gradients pass through `moments` and
`inverse_root`, so that latents feel that they move the frame in which they are seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqscale.parallel import ops
from vqscale.parallel.mesh import Axis

RIDGE = 1e-4  # of the mean variance, added to every variance
BLOCK = 2**16  # tokens that are float64 at a time
ROUNDING = 1e-12  # of the squared mean: a variance below is that of float32 numbers which are the same
TINY = 1e-24  # below this a variance is rounding: constant latents stay where they are


def moments(x_ND: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """(mean_D, covariance_DD), float64, of the tokens of all ranks of the axis, the same on each.

    One all-reduce forward, one backward. The covariance is divided by the number of tokens.
    """
    dim = x_ND.shape[1]
    sums = torch.stack([_sums(block_ND.double()) for block_ND in x_ND.split(BLOCK)]).sum(0)
    sums = ops.sum_over(sums, axis)
    mean_D = sums[1 : dim + 1] / sums[0]
    return mean_D, sums[dim + 1 :].view(dim, dim) / sums[0] - torch.outer(mean_D, mean_D)


def _sums(x_ND: Tensor) -> Tensor:
    """(number of tokens, their sum, the sum of their outer products) in one vector."""
    return torch.cat([x_ND.new_full((1,), len(x_ND)), x_ND.sum(0), (x_ND.t() @ x_ND).flatten()])


def spread(mean_D: Tensor, covariance_DD: Tensor) -> tuple[int, float]:
    """(rank, condition): directions whose variance is above RIDGE of the largest, 0 where all variance is rounding of
    the mean; and the largest variance by the smallest, as far as float64 tells."""
    values_D = torch.linalg.eigvalsh(covariance_DD)
    largest = values_D[-1]
    if not largest > ROUNDING * mean_D.square().sum() + TINY:
        return 0, 1.0
    smallest = values_D[0].clamp_min(largest * torch.finfo(torch.float64).eps)
    return int((values_D > RIDGE * largest).sum()), float(largest / smallest)


def with_ridge(covariance_DD: Tensor) -> Tensor:
    """The covariance with RIDGE times the mean variance more on its diagonal: as good as full rank."""
    dim = len(covariance_DD)
    return covariance_DD + (RIDGE / dim * covariance_DD.trace() + TINY) * _eye(covariance_DD)


def _eye(like_DD: Tensor) -> Tensor:
    """The unit matrix, made where it is wanted: a copy to a GPU would wait for it."""
    return torch.eye(len(like_DD), dtype=like_DD.dtype, device=like_DD.device)


def inverse_root(covariance_DD: Tensor) -> Tensor:
    """C^(-1/2), symmetric, of a covariance of full rank; the frame that it whitens to is the nearest to the channels.

    Its gradient is that of the whole matrix, without the differences of eigenvalues that a gradient of eigenvectors
    divides by: with r the roots of the eigenvalues, dC = U (F o U^T sym(g) U) U^T, F_ij = -1 / (r_i r_j (r_i + r_j)).
    """
    root_DD: Tensor = _InverseRoot.apply(covariance_DD)
    return root_DD


class _InverseRoot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, covariance_DD: Tensor) -> Tensor:
        root_D, vectors_DD = _decomposed(covariance_DD, TINY)
        ctx.save_for_backward(root_D, vectors_DD)
        return (vectors_DD / root_D) @ vectors_DD.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        root_D, vectors_DD = ctx.saved_tensors
        inner_DD = vectors_DD.t() @ (0.5 * (grads[0] + grads[0].t())) @ vectors_DD
        inner_DD = inner_DD / (-torch.outer(root_D, root_D) * (root_D[:, None] + root_D))
        return vectors_DD @ inner_DD @ vectors_DD.t()


def roots(covariance_DD: Tensor) -> tuple[Tensor, Tensor]:
    """(C^(1/2), C^(-1/2)), variances below RIDGE of the largest raised to that. No gradient."""
    with torch.no_grad():
        root_D, vectors_DD = _decomposed(covariance_DD, RIDGE)
        return (vectors_DD * root_D) @ vectors_DD.t(), (vectors_DD / root_D) @ vectors_DD.t()


def _decomposed(covariance_DD: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """(roots of the eigenvalues, at least `least` of the largest; eigenvectors). Not a number in, not a number out."""
    whole = covariance_DD.isfinite().all()
    values_D, vectors_DD = torch.linalg.eigh(torch.where(whole, covariance_DD, _eye(covariance_DD)))
    least_D = (least * values_D[-1]).clamp_min(TINY)
    return torch.where(whole, torch.maximum(values_D, least_D).sqrt(), torch.nan), vectors_DD
