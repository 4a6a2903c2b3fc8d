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
) -> Tensor:
    """Cross entropy of each token plus z_loss times the square of its log-normaliser; 0 where the target is ignored."""
    l_NK = h_ND @ rows_KD.t()
    entropy_N = F.cross_entropy(l_NK, targets_N, ignore_index=ignore, label_smoothing=label_smoothing, reduction="none")
    return entropy_N + z_loss * torch.logsumexp(l_NK, dim=1).square() * (targets_N != ignore)


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
