"""The settings of every quantizer, as frozen dataclasses that mirror the YAML. No torch here: --help stays instant."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from vqscale.codes.config import SimilarityName, TableConfig
from vqscale.config import Free
from vqscale.quantizers.config_convex import SCQConfig
from vqscale.quantizers.config_implicit import BSQConfig, FSQConfig, LFQConfig

Estimator = Literal["straight_through", "rotation"]


@dataclass(frozen=True)
class VQConfig(TableConfig):
    """Vector quantization with a straight-through gradient: |sg(x) - c|^2 and commitment |x - sg(c)|^2."""

    name: Literal["vq"] = "vq"
    """nearest code, learned by gradient"""
    similarity: SimilarityName = "euclid"
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
    similarity: SimilarityName = "euclid"
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
    similarity: SimilarityName = "dot"
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


@dataclass(frozen=True)
class SimVQConfig:
    """A frozen normal basis under a learned linear map."""

    name: Literal["simvq"] = "simvq"
    """nearest code of a frozen basis under one learned linear map"""
    num_codes: int = 4096
    """K, the number of codes"""
    dim: int = 16
    """D, the dimension of a code"""
    bias: bool = True
    """the map has a bias, as in the official code"""
    gradient: Estimator = "straight_through"
    """how the gradient passes the choice: straight_through, or rotation (the rotation trick)"""
    commitment_weight: float = 0.25
    """weight of |x - sg(z)|^2 beside |sg(x) - z|^2"""
    quantizer_weight: float = 1.0
    """weight of both together: 1 for images, 1000 for audio in the paper"""
    window_decay: float | None = None
    """decay per step of the exponential window of counts; null: a code used at its fair share has 5 hits in it"""
    scan_mib: Free[int] = 64
    """memory of the blocks in which tokens meet rows, MiB per process"""

    def problems(self) -> Iterable[tuple[str, str]]:
        for key in ("num_codes", "dim", "scan_mib"):
            if getattr(self, key) < 1:
                yield key, f"{key} is {getattr(self, key)}: use at least 1"
        if self.window_decay is not None and not 0 <= self.window_decay < 1:
            yield "window_decay", f"window_decay is {self.window_decay}: use a number from 0 to below 1"


SingleConfig = VQConfig | EMAConfig | IBQConfig | SimVQConfig | FSQConfig | LFQConfig | BSQConfig


@dataclass(frozen=True)
class ResidualConfig:
    """Levels of any other quantizer, each on what the ones before left."""

    name: Literal["residual"] = "residual"
    """several levels, each quantizes what the ones before left"""
    inner: SingleConfig = field(default_factory=VQConfig)
    """the quantizer of every level"""
    levels: int = 4
    """number of levels, and of ids per token"""
    scale: float = 1.0
    """level i works at scale**i: below 1 lets a quantizer of fixed range (fsq, lfq, bsq) refine"""
    stagger: int = 10
    """with init: data, each level warms up so many steps longer than the one before"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.levels < 1:
            yield "levels", f"levels is {self.levels}: use at least 1"
        if self.scale <= 0:
            yield "scale", f"scale is {self.scale}: use a positive number"
        if self.stagger < 1:
            yield (
                "stagger",
                f"stagger is {self.stagger}: a level needs at least 1 step to see what is left, use 1 or more",
            )


@dataclass(frozen=True)
class GroupedConfig:
    """Parts of a token, each with another quantizer."""

    name: Literal["grouped"] = "grouped"
    """a token is cut into parts, each has a quantizer of its own"""
    inner: SingleConfig = field(default_factory=VQConfig)
    """the quantizer of every part; its dim is the dimension of a part"""
    groups: int = 2
    """number of parts, and of ids per token"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.groups < 1:
            yield "groups", f"groups is {self.groups}: use at least 1"


# scq is no level of another: its ids do not say its output.
QuantizerConfig = SingleConfig | SCQConfig | ResidualConfig | GroupedConfig
