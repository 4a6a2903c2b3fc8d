"""What LFQ and BSQ share: codes of +-scale by bits, the first bit the most significant, and their entropy loss.

    entropy_weight (mean_n H(p_n) - diversity_weight H(mean over all tokens of all ranks of p_n))

with p_n the softmax over all 2^D codes of 2 v_n.c / T. Its bits are independent, of log-odds 4 scale v_ni / T; how the
entropies are taken without 2^D, and how far that is exact, is said in vqscale/codes/bits.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqscale.codes import bits
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import full
from vqscale.quantizers.config.implicit import BSQConfig, LFQConfig


def codes(bits_ND: Tensor, scale: float, unit: Tensor) -> Tensor:
    """+scale where a bit is one, -scale where it is zero, in the type of `unit`, float32 at least."""
    size = scale * full(unit)
    return torch.where(bits_ND, size, -size)


def entropies(
    logits_ND: Tensor, config: LFQConfig | BSQConfig, mesh: Mesh
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(losses, stats) of the log-odds of the bits; empty losses where the weight is 0. Collective where it is not."""
    stats = {"saturation": bits.largest(logits_ND).mean()}
    if not config.entropy_weight:
        return {}, stats
    token, spread = bits.entropy(logits_ND).mean(), bits.entropy_of_mean(logits_ND, config.group_bits, mesh)
    stats |= {"entropy_token": token.detach(), "entropy_mean": spread.detach()}
    return {"entropy": config.entropy_weight * (token - config.diversity_weight * spread)}, stats
