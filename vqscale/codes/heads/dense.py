"""What `Head` computes, in plain torch on one process, with all rows and tensors of tokens x codes: the definition.

The tests compare values, gradients and frequencies with it. Not for training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def loss(
    h_ND: Tensor,
    rows_KD: Tensor,
    targets_N: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore: int = -1,
    shares_KK: Tensor | None = None,
) -> Tensor:
    """Cross entropy of each token plus z_loss times the square of its log-normaliser; 0 where the target is ignored.

    A target i that is shared has the distribution shares_KK[i] in place of the one-hot.
    """
    l_NK = h_ND @ rows_KD.t()
    if shares_KK is not None:
        wanted_NK = (1 - label_smoothing) * shares_KK[targets_N.clamp(min=0)] + label_smoothing / len(rows_KD)
        lse_N = torch.logsumexp(l_NK, dim=1)
        return (lse_N - (wanted_NK * l_NK).sum(1) + z_loss * lse_N.square()) * (targets_N != ignore)
    entropy_N = F.cross_entropy(l_NK, targets_N, ignore_index=ignore, label_smoothing=label_smoothing, reduction="none")
    return entropy_N + z_loss * torch.logsumexp(l_NK, dim=1).square() * (targets_N != ignore)


def shares(features_KF: Tensor, count: int, temperature: float) -> Tensor:
    """The distribution of every target over all codes, K x K, where `count` neighbours share it; see neighbours.py."""
    d_KK = torch.cdist(features_KF.double(), features_KF.double()).square()
    near_KK = d_KK.clone().fill_diagonal_(-1.0).argsort(dim=1, stable=True)[:, :count]
    scale = d_KK.gather(1, near_KK)[:, 1].mean()
    kept_KK = torch.full_like(d_KK, torch.inf).scatter(1, near_KK, d_KK.gather(1, near_KK))
    return torch.softmax(-kept_KK / (temperature * scale), dim=1)


def distribution(
    h_ND: Tensor,
    rows_KD: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    unguided_ND: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """The probability of every id: guidance, temperature, top-k, top-p, by sorting; equal logits are ordered by id."""
    l_NK = h_ND @ rows_KD.t()
    if unguided_ND is not None:
        null_NK = unguided_ND @ rows_KD.t()
        l_NK = null_NK + guidance * (l_NK - null_NK)
    if temperature == 0:
        return F.one_hot(l_NK.argmax(1), l_NK.shape[1]).to(l_NK.dtype)
    order_NK = (l_NK / temperature).argsort(dim=1, descending=True, stable=True)
    sorted_NK = (l_NK / temperature).gather(1, order_NK)
    if top_k:
        sorted_NK[:, top_k:] = float("-inf")
    if top_p < 1:
        p_NK = sorted_NK.double().softmax(1)
        sorted_NK[p_NK.cumsum(1) - p_NK >= top_p] = float("-inf")
    return torch.zeros_like(l_NK).scatter_(1, order_NK, sorted_NK.softmax(1))
