"""How many ids are masked: the share gamma(r) in training, r uniform, and the counts of a sampler in T steps.

gamma falls from 1 at r = 0 to 0 at r = 1. Cosine and arccos are inverse functions of each other: both mask 2 / pi of
the ids on average, cosine reveals few ids first and many last, arccos is nearly even but for its last steps. Not here:
which ids (masked.py, masked_draw.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vqscale.priors.config.masked import MaskLaw


class Law(NamedTuple):
    """gamma and its inverse, on tensors of numbers in [0, 1]."""

    share: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


def _cosine(r: Tensor) -> Tensor:
    return torch.cos(r * (math.pi / 2))


def _arccos(r: Tensor) -> Tensor:
    return torch.acos(r) * (2 / math.pi)


def _power(exponent: float) -> Law:
    return Law(lambda r: 1 - r**exponent, lambda share: (1 - share) ** (1 / exponent))


LAWS: dict[MaskLaw, Law] = {
    "cosine": Law(_cosine, _arccos),
    "arccos": Law(_arccos, _cosine),
    "linear": _power(1.0),
    "square": _power(2.0),
    "cubic": _power(3.0),
    "root": _power(0.5),
}


def training_counts(law: MaskLaw, least: float, uniform_B: Tensor, num_tokens: int) -> Tensor:
    """How many of N ids are masked, N gamma(r) rounded and at least one, r = uniform x the r of the share `least`."""
    # a number of the host: a copy to a GPU would wait for it
    last = float(LAWS[law].inverse(torch.tensor(least, dtype=torch.float64, device="cpu")))
    share_B = LAWS[law].share(uniform_B * last)
    return (share_B * num_tokens).round().clamp_(1, num_tokens).to(torch.int64)


def left_masked(law: MaskLaw, unknown: int, steps: int) -> list[int]:
    """How many ids are masked before the first step and after each: floor(unknown gamma(t / T)), and so few less or
    more that every step reveals one while there are any, and the last reveals the rest.
    """
    shares = LAWS[law].share(torch.arange(steps + 1, dtype=torch.float64) / steps)
    counts = [unknown]
    for step in range(1, steps + 1):
        wanted = math.floor(unknown * float(shares[step]) + 1e-9) if step < steps else 0
        counts.append(max(0, min(counts[-1] - 1, max(wanted, steps - step))))
    return counts
