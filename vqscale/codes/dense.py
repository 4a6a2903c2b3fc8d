"""The same operations in plain torch on one process, with the whole codebook and tensors of tokens x codes.

This is the definition: the tests compare everything fast with it, values and gradients. `published_ibq` is the
released form of the IBQ quantizer, one-hot products and all, which the benchmark times. Not for training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOGITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dot": lambda x_ND, rows_KD: x_ND @ rows_KD.t(),
    "euclid": lambda x_ND, rows_KD: x_ND @ rows_KD.t() - 0.5 * rows_KD.square().sum(1),
    "cosine": lambda x_ND, rows_KD: F.normalize(x_ND, dim=1) @ F.normalize(rows_KD, dim=1).t(),
}


def logits(x_ND: Tensor, rows_KD: Tensor, similarity: str = "dot") -> Tensor:
    """The similarity of every token to every code."""
    return LOGITS[similarity](x_ND, rows_KD)


def nearest(x_ND: Tensor, rows_KD: Tensor, similarity: str = "dot") -> tuple[Tensor, Tensor]:
    """(ids, scores): arg max of the similarity, the lowest id among equals."""
    l_NK = logits(x_ND, rows_KD, similarity)
    return l_NK.argmax(1), l_NK.amax(1)


class DenseMixture(NamedTuple):
    lse_N: Tensor
    mean_ND: Tensor
    entropy_N: Tensor
    columns_K: Tensor


def mix(
    x_ND: Tensor, rows_KD: Tensor, similarity: str = "dot", temperature: float = 1.0, entropy_temperature: float = 1.0
) -> DenseMixture:
    """Log-normaliser and mean row at one temperature (values detached), entropies and column sums at another."""
    l_NK = logits(x_ND, rows_KD, similarity)
    logq_NK = F.log_softmax(l_NK / entropy_temperature, dim=1)
    return DenseMixture(
        torch.logsumexp(l_NK / temperature, dim=1),
        F.softmax(l_NK / temperature, dim=1) @ rows_KD.detach(),
        -(logq_NK.exp() * logq_NK).sum(1),
        logq_NK.exp().sum(0),
    )


def straight_through(l_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(u, h): the one-hot arg max h, and u = h - sg(p) + p, whose gradient is the softmax's."""
    p_NK = F.softmax(l_NK, dim=1)
    h_NK = torch.zeros_like(p_NK).scatter_(1, p_NK.argmax(1, keepdim=True), 1.0)
    return h_NK - p_NK.detach() + p_NK, h_NK


def counts(ids_N: Tensor, num_codes: int) -> Tensor:
    return torch.bincount(ids_N, minlength=num_codes)


def sums(ids_N: Tensor, x_ND: Tensor, num_codes: int) -> Tensor:
    return F.one_hot(ids_N, num_codes).to(x_ND.dtype).t() @ x_ND


class Published(NamedTuple):
    z_ND: Tensor
    ids_N: Tensor
    quantization: Tensor
    entropy: Tensor | None


def published_ibq(
    x_ND: Tensor, rows_KD: Tensor, beta: float = 0.25, entropy_temperature: float | None = None
) -> Published:
    """The released IBQ step: 8 products with its backward pass, about 20 bytes per token and code, 34 with entropy.

    On tokens in rows; `released_ibq` is the same in the layout of the released code.

    `quantization` is the three-term loss; `entropy` is the sample entropy minus the entropy of the mean probability,
    with the two offsets of 1e-5 that the released code has.
    """
    l_NK = x_ND @ rows_KD.t()
    u_NK, h_NK = straight_through(l_NK)
    z_ND = u_NK @ rows_KD
    hard_ND = h_NK @ rows_KD
    loss = F.mse_loss(z_ND, x_ND) + F.mse_loss(hard_ND.detach(), x_ND) + beta * F.mse_loss(hard_ND, x_ND.detach())
    entropy = None
    if entropy_temperature is not None:
        q_NK = F.softmax(l_NK / entropy_temperature, dim=1)
        logq_NK = F.log_softmax(l_NK / entropy_temperature + 1e-5, dim=1)
        mean_K = q_NK.mean(0)
        entropy = -(q_NK * logq_NK).sum(1).mean() + (mean_K * (mean_K + 1e-5).log()).sum()
    return Published(z_ND, h_NK.argmax(1), loss, entropy)


def released_ibq(
    x_BDhw: Tensor, rows_KD: Tensor, beta: float = 0.25, entropy_temperature: float | None = None
) -> Published:
    """`published_ibq` as the released code lays it out: images, codes in dimension 1, three copies into another layout.

    Up to 24 bytes per token and code, 36 with entropy. z and ids are in the order of tokens, row after row.
    """
    l_BKhw = torch.einsum("bdhw,kd->bkhw", x_BDhw, rows_KD)
    p_BKhw = F.softmax(l_BKhw, dim=1)
    h_BKhw = torch.zeros_like(p_BKhw).scatter_(1, p_BKhw.argmax(1, keepdim=True), 1.0)
    u_BKhw = h_BKhw - p_BKhw.detach() + p_BKhw
    z_BDhw = torch.einsum("bkhw,kd->bdhw", u_BKhw, rows_KD)
    hard_BDhw = torch.einsum("bkhw,kd->bdhw", h_BKhw, rows_KD)
    loss = F.mse_loss(z_BDhw, x_BDhw) + F.mse_loss(hard_BDhw.detach(), x_BDhw)
    loss = loss + beta * F.mse_loss(hard_BDhw, x_BDhw.detach())
    entropy = None
    if entropy_temperature is not None:
        l_NK = l_BKhw.permute(0, 2, 3, 1).flatten(0, 2)
        q_NK = F.softmax(l_NK / entropy_temperature, dim=1)
        logq_NK = F.log_softmax(l_NK / entropy_temperature + 1e-5, dim=1)
        mean_K = q_NK.mean(0)
        entropy = -(q_NK * logq_NK).sum(1).mean() + (mean_K * (mean_K + 1e-5).log()).sum()
    return Published(z_BDhw.permute(0, 2, 3, 1).flatten(0, 2), h_BKhw.argmax(1).flatten(), loss, entropy)
