"""The settings of heads, as frozen dataclasses that mirror the YAML, and which heads there are. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from vqscale.codes.config import Products
from vqscale.config import Before, Free, OneOf, load_class
from vqscale.nets.config.transformer import TransformerConfig

Embedding = Literal["rows", "tied", "codebook"]

# One line for each head: its name in a config, and where its settings are.
HEADS = {
    "flat": "vqscale.codes.heads.config:FlatConfig",
    "factorised": "vqscale.codes.heads.config:FactorisedConfig",
    "bits": "vqscale.codes.heads.config:BitsConfig",
}


@dataclass(frozen=True)
class HeadSettings:
    """What the settings of every head have."""

    module: ClassVar[str]
    """the head's class, as `module:Class`"""
    several_ids: ClassVar[bool] = False
    """whether a token may have several ids (residual and grouped tokenizers)"""
    scan_mib: Free[int] = 64
    """memory of the blocks in which tokens meet rows, MiB per process"""

    @property
    def wants_features(self) -> bool:
        """Whether the head takes the frozen vectors of the tokenizer's codes."""
        return False

    @property
    def wants_digits(self) -> bool:
        """Whether the digits of an id are still to be looked up."""
        return False

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.scan_mib < 1:
            yield "scan_mib", f"scan_mib is {self.scan_mib}: use at least 1"

    def misfits(self, num_codes: int, num_ids: int) -> Iterable[tuple[str, str]]:
        """(key, message) of all for which this is no head of `num_ids` ids per token, of `num_codes` each."""
        if num_ids > 1 and not self.several_ids:
            yield (
                "name",
                f"num_ids is {num_ids}, and this head has one id per token: use head.name: "
                f"{' or '.join(name for name, path in HEADS.items() if load_class(path).several_ids)}",
            )


@dataclass(frozen=True)
class FlatConfig(HeadSettings):
    """One logit for every id: a row of a table."""

    module: ClassVar[str] = "vqscale.codes.heads.flat:Head"
    name: Literal["flat"] = "flat"
    """which head"""
    embedding: Embedding = "rows"
    """rows: a learned vector per id; tied: the output rows; codebook: the code's frozen vector, through a linear map"""
    init_scale: float = 0.02
    """first embeddings are N(0, init_scale^2); output rows begin at zero, unless they are the embeddings (tied)"""
    output_scale: float = 0.0
    """embedding codebook: output rows begin as the codes' vectors in a random frame, times this; 0: at zero"""
    neighbours: Annotated[int | None, Before(0)] = None
    """embedding codebook: in training a target is shared by so many codes, itself and those nearest to it (SNCE); 0:
    it is alone; null: 8 in a run of an autoregressive prior with at least 65,536 codes, which gains by it
    (configs/study), else 0"""
    neighbour_temperature: float = 1.0
    """how far: at this many mean squared distances between nearest codes a weight has fallen to 1 / e"""
    products: Products = "fp32"
    """precision of the products of tokens with rows in training; sums and gradients of rows are float32 in both"""

    @property
    def wants_features(self) -> bool:
        return self.embedding == "codebook"

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        if self.init_scale < 0:
            yield "init_scale", f"init_scale is {self.init_scale}, the scale of the first rows: use 0 or more"
        if self.output_scale < 0 or (self.output_scale and self.embedding != "codebook"):
            yield (
                "output_scale",
                f"output_scale is {self.output_scale} with embedding: {self.embedding}, and scales the codes' vectors, "
                "which only embedding: codebook has: use 0, or a positive scale with embedding: codebook",
            )
        neighbours = self.neighbours or 0
        if neighbours < 0 or (neighbours and self.embedding != "codebook"):
            yield (
                "neighbours",
                f"neighbours is {self.neighbours} with embedding: {self.embedding}, and they are of the codes' "
                "vectors, which only embedding: codebook has: use 0, or a number of codes with embedding: codebook",
            )
        if self.neighbour_temperature <= 0:
            yield (
                "neighbour_temperature",
                f"neighbour_temperature is {self.neighbour_temperature}, and weights fall with it: use more than 0",
            )


@dataclass(frozen=True)
class WithinConfig:
    """The transformer over the digits of a token, of Open-MAGVIT2: causal, heads of about 64 numbers."""

    num_layers: int = 2
    """blocks; published: 2, 3, 4 for B, L, XL"""
    width: int | None = None
    """numbers per digit; null: those of the trunk, as published; another is mapped to and from"""
    ffn_multiple: int = 256
    """hidden numbers of the feed-forward part are a multiple of this"""
    prefix_rotary: Literal["identity", "zero"] = "identity"
    """rotation of the trunk's vector, the first position: none, or times zero as published"""
    dropout: float = 0.1
    """of what an attention and a feed-forward part add"""
    init_scale: float = 0.02
    """first matrices are N(0, init_scale^2)"""

    def net(self, dim: int) -> TransformerConfig:
        """The transformer for a trunk of width `dim`."""
        width = self.width or dim
        return TransformerConfig(
            width=width,
            num_layers=self.num_layers,
            num_heads=next((n for n in range(width // 64, 1, -1) if width % (2 * n) == 0), 1),
            ffn_multiple=self.ffn_multiple,
            prefix_rotary=self.prefix_rotary,
            init_scale=self.init_scale,
            dropout_token=0.0,
            dropout_residual=self.dropout,
            dropout_ffn=self.dropout,
        )

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.width is not None and (self.width < 2 or self.width % 2):
            yield "width", f"width is {self.width}: use an even number, or null for that of the trunk"
            return
        keys = {"dropout_residual": "dropout"}
        for key, message in self.net(2).problems():
            if key != "dropout_ffn":
                yield keys.get(key, key), message.replace(key, keys.get(key, key))


@dataclass(frozen=True)
class FactorisedConfig(HeadSettings):
    """Ids as digits with a table for each; the digits of a token in order, or independent of each other."""

    module: ClassVar[str] = "vqscale.codes.heads.factorised:Factorised"
    several_ids: ClassVar[bool] = True
    name: Literal["factorised"] = "factorised"
    """which head"""
    factors: tuple[int, ...] | Literal["own"] | None = None
    """values of each digit of an id, the most significant first, their product num_codes; own: those that the
    tokenizer's ids have (fsq, lfq, bsq), as the token cache says; null: one digit per id"""
    within: WithinConfig | None = field(default_factory=WithinConfig)
    """a transformer over the digits of a token; null: they are independent given the trunk's vector"""
    embedding: Literal["rows", "tied"] = "rows"
    """the vector of an id is the sum over its digits of: rows: a learned vector each; tied: the output rows"""
    init_scale: float = 0.02
    """first embeddings are N(0, init_scale^2); output rows begin at zero, unless they are the embeddings (tied)"""
    products: Products = "fp32"
    """precision of the products of tokens with rows in training; sums and gradients of rows are float32 in both"""

    @property
    def wants_digits(self) -> bool:
        return self.factors == "own"

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        if isinstance(self.factors, tuple) and min(self.factors, default=0) < 1:
            yield "factors", f"factors is {list(self.factors)}: give at least one factor, each at least 1"
        if self.init_scale < 0:
            yield "init_scale", f"init_scale is {self.init_scale}, the scale of the first rows: use 0 or more"

    def misfits(self, num_codes: int, num_ids: int) -> Iterable[tuple[str, str]]:
        if isinstance(self.factors, tuple) and math.prod(self.factors) != num_codes:
            yield (
                "factors",
                f"factors {list(self.factors)} multiply to {math.prod(self.factors)}, and an id has num_codes "
                f"{num_codes} values: give factors of {num_codes}, the most significant first, or null",
            )


@dataclass(frozen=True)
class BitsConfig(HeadSettings):
    """Ids as bits that a small network unmasks in a few steps: the masked-bit head of BAR, in its sizes."""

    module: ClassVar[str] = "vqscale.codes.heads.bits:Bits"
    several_ids: ClassVar[bool] = True
    name: Literal["bits"] = "bits"
    """which head"""
    width: int = 2048
    """numbers of the network"""
    num_layers: int = 3
    """residual blocks of the network"""
    reveal: tuple[int, ...] | None = None
    """bits that each step of decoding reveals, of all bits of a token (BAR: 2, 2, 5, 7 of 16); null: four like steps"""
    order: Literal["fixed", "confidence"] = "fixed"
    """which bits a step reveals: the next ones, whose held-out nats are exact, or the likeliest, as published"""
    order_noise: float = 4.5
    """order confidence: Gumbel noise of this scale on log p, annealed to zero over the steps"""
    mask_spread: float = 0.8
    """training: the share of masked bits is the sigmoid of a normal number times this"""
    unmasked_weight: float = 0.1
    """training: weight of the bits that are seen, beside 1 of the masked ones"""
    init_scale: float = 0.02
    """the linear map from bits to vectors begins as N(0, init_scale^2)"""

    def steps(self, num_bits: int) -> tuple[int, ...]:
        """Bits of each step; the later steps have the larger part of what does not divide."""
        num = min(4, num_bits)
        each, more = divmod(num_bits, num)
        return self.reveal or tuple(each + (step >= num - more) for step in range(num))

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        for key in ("width", "num_layers"):
            if getattr(self, key) < 1:
                yield key, f"{key} is {getattr(self, key)}: use at least 1"
        for key in ("order_noise", "mask_spread", "init_scale"):
            if getattr(self, key) < 0:
                yield key, f"{key} is {getattr(self, key)}, a scale: use 0 or more"
        if not 0 <= self.unmasked_weight <= 1:
            yield "unmasked_weight", f"unmasked_weight is {self.unmasked_weight}: use a weight from 0 to 1"
        if self.reveal is not None and min(self.reveal, default=0) < 1:
            yield "reveal", f"reveal is {list(self.reveal)}: every step reveals at least one bit"

    def misfits(self, num_codes: int, num_ids: int) -> Iterable[tuple[str, str]]:
        num_bits = (num_codes - 1).bit_length()
        if num_codes != 2**num_bits or num_codes < 2:
            yield "name", f"num_codes is {num_codes}, and only 2, 4, 8, ... codes are bits: use head.name: factorised"
        elif self.reveal is not None and sum(self.reveal) != num_bits * num_ids:
            yield (
                "reveal",
                f"reveal {list(self.reveal)} has {sum(self.reveal)} bits, and a token has {num_bits * num_ids} "
                f"({num_ids} ids of {num_codes} codes): give steps that add up to these, or null",
            )


if TYPE_CHECKING:
    HeadConfig = HeadSettings
else:
    HeadConfig = OneOf(HEADS)
