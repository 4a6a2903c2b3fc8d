"""The settings of quantizers whose codes are rows of a table. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from vqscale.codes.config import Init, SimilarityName, TableConfig
from vqscale.config import Before
from vqscale.quantizers.config import QuantizerSettings

Estimator = Literal["straight_through", "rotation"]


@dataclass(frozen=True)
class VQConfig(TableConfig, QuantizerSettings):
    """Vector quantization with a straight-through gradient: |sg(x) - c|^2 and commitment |x - sg(c)|^2."""

    module: ClassVar[str] = "vqscale.quantizers.vq:VQ"
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
class EMAConfig(TableConfig, QuantizerSettings):
    """Vector quantization whose rows are moving averages of the tokens that took them."""

    module: ClassVar[str] = "vqscale.quantizers.ema:EMA"
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
    unit_norm: bool = False
    """codes are the averages divided by their norm, as UViM's are; for latents of one norm (latent_norm: layer)"""
    split_below: float = 0.0
    """a code that has less than this of its fading hits (each step's, times decay for every step since) takes half of
    the one with the most, as UViM's (0.1) do in place of revival; 0 never"""

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        if not 0 <= self.decay < 1:
            yield "decay", f"decay is {self.decay}: use a number from 0 to below 1"
        if self.split_below < 0:
            yield "split_below", f"split_below is {self.split_below}, a number of hits: use 0 (never) or more"
        if self.split_below and self.revive_every:
            yield (
                "revive_every",
                f"split_below is {self.split_below} and revive_every {self.revive_every}, and a rare code is either "
                "split off from another or revived with a token: use revive_every: 0, or split_below: 0.0",
            )


@dataclass(frozen=True)
class IBQConfig(TableConfig, QuantizerSettings):
    """Index backpropagation: the straight-through one-hot sends gradients to all codes through the softmax."""

    module: ClassVar[str] = "vqscale.quantizers.ibq:IBQ"
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
class SimVQConfig(TableConfig, QuantizerSettings):
    """A frozen basis under a learned linear map. init: normal with revive_every: 0 is the published form."""

    module: ClassVar[str] = "vqscale.quantizers.simvq:SimVQ"
    name: Literal["simvq"] = "simvq"
    """nearest code of a frozen basis under one learned linear map"""
    learn_basis: bool = False
    """the basis learns too, each row by the tokens that chose it; the paper freezes it"""
    init: Annotated[Init, Before("normal")] = "data"
    """first basis: data: encoder outputs after warmup_steps, whitened, with the map as the way back; normal: as
    published, N(0, 1/dim)"""
    revive_every: Annotated[int, Before(0)] = 1
    """every so many steps, dead codes are set to where the map meets tokens of the current batch; 0 never"""
    bias: bool = True
    """the map has a bias, as in the official code"""
    gradient: Estimator = "straight_through"
    """how the gradient passes the choice: straight_through, or rotation (the rotation trick)"""
    commitment_weight: float = 0.25
    """weight of |x - sg(z)|^2 beside |sg(x) - z|^2"""
    quantizer_weight: float = 1.0
    """weight of both together: 1 for images, 1000 for audio in the paper"""

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        if self.init == "uniform" or self.init_scale != 1.0:
            yield (
                "init",
                f"init {self.init} of scale {self.init_scale} is no start of a basis, which is N(0, 1/dim) or latents: "
                "use init: data or normal, and leave init_scale out",
            )


@dataclass(frozen=True)
class SCQConfig(TableConfig, QuantizerSettings):
    """Soft convex quantization: a sparse convex combination of codes. Continuous: ids say less than its output."""

    module: ClassVar[str] = "vqscale.quantizers.scq:SCQ"
    composes: ClassVar[bool] = False  # its ids do not say its output
    name: Literal["scq"] = "scq"
    """convex combination of codes near the nearest one; its output is continuous, decode(ids) is not it"""
    solver: Literal["exact", "relaxed"] = "exact"
    """exact: the constrained minimum; relaxed: unconstrained, then projected, which is another point for small lam"""
    lam: float = 0.1
    """weight of |P - onehot|^2 beside |x - C P|^2: small is the convex hull, large is the nearest code"""
    quantization_weight: float = 1.0
    """weight of |x - z|^2, whose gradient goes to the encoder and the rows"""

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        if self.lam <= 0:
            yield (
                "lam",
                f"lam is {self.lam}, and without |P - onehot|^2 many combinations are equally good: use a positive "
                "number (0.001 is nearly the projection on the convex hull)",
            )
