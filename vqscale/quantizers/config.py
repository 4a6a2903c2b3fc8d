"""The settings of every quantizer, as frozen dataclasses that mirror the YAML. No torch here: --help stays instant."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from vqscale.codes.config import Similarity, TableConfig

Estimator = Literal["straight_through", "rotation"]


@dataclass(frozen=True)
class VQConfig(TableConfig):
    """Vector quantization with a straight-through gradient: |sg(x) - c|^2 and commitment |x - sg(c)|^2."""

    name: Literal["vq"] = "vq"
    """nearest code, learned by gradient"""
    similarity: Similarity = "euclid"
    """what nearest means: euclid, dot or cosine"""
    gradient: Estimator = "straight_through"
    """how the gradient passes the choice: straight_through, or rotation (the rotation trick)"""
    commitment_weight: float = 0.25
    """weight of |x - sg(c)|^2"""
    codebook_weight: float = 1.0
    """weight of |sg(x) - c|^2"""


@dataclass(frozen=True)
class EMAConfig(TableConfig):
    """Vector quantization whose rows are moving averages of the tokens that took them."""

    name: Literal["ema"] = "ema"
    """nearest code, rows as moving averages"""
    similarity: Similarity = "euclid"
    """what nearest means: euclid, dot or cosine"""
    gradient: Estimator = "straight_through"
    """how the gradient passes the choice: straight_through, or rotation (the rotation trick)"""
    commitment_weight: float = 0.25
    """weight of |x - sg(c)|^2"""
    decay: float = 0.99
    """decay per step of the averages of counts and sums"""
    eps: float = 1e-5
    """smoothing of the counts that sums are divided by"""

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        if not 0 <= self.decay < 1:
            yield "decay", f"decay is {self.decay}: use a number from 0 to below 1"


@dataclass(frozen=True)
class IBQConfig(TableConfig):
    """Index backpropagation: the straight-through one-hot sends gradients to all codes through the softmax."""

    name: Literal["ibq"] = "ibq"
    """arg max code, gradients to all codes"""
    similarity: Similarity = "dot"
    """logits: dot x.c, euclid x.c - |c|^2/2 (nearest code), cosine"""
    temperature: float = 1.0
    """temperature of the softmax that carries the gradient"""
    commitment_weight: float = 1.0
    """weight of |x - sg(c)|^2 (released form 1.0; the paper's equation 0.25)"""
    codebook_weight: float = 0.25
    """weight of |sg(x) - c|^2 (released form 0.25; the paper's equation 1.0)"""
    entropy_weight: float = 0.0
    """weight of mean entropy per token minus entropy of the mean probability of all ranks; 0 is off"""
    entropy_temperature: float = 0.01
    """temperature of the softmax of the entropies"""

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        for key in ("temperature", "entropy_temperature"):
            if getattr(self, key) <= 0:
                yield key, f"{key} is {getattr(self, key)}: use a positive number"


QuantizerConfig = VQConfig | EMAConfig | IBQConfig
