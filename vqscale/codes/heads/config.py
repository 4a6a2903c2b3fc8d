"""The settings of heads, as frozen dataclasses that mirror the YAML, and which heads there are. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vqscale.codes.config import Products
from vqscale.config import Free, OneOf

Embedding = Literal["rows", "tied", "codebook"]

# One line for each head: its name in a config, and where its settings are.
HEADS = {"flat": "vqscale.codes.heads.config:FlatConfig"}


@dataclass(frozen=True)
class HeadSettings:
    """What the settings of every head have."""

    module: ClassVar[str]
    """the head's class, as `module:Class`"""
    scan_mib: Free[int] = 64
    """memory of the blocks in which tokens meet rows, MiB per process"""

    @property
    def wants_features(self) -> bool:
        """Whether the head takes the frozen vectors of the tokenizer's codes."""
        return False

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.scan_mib < 1:
            yield "scan_mib", f"scan_mib is {self.scan_mib}: use at least 1"


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


if TYPE_CHECKING:
    HeadConfig = HeadSettings
else:
    HeadConfig = OneOf(HEADS)
