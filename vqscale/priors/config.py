"""The settings of priors, as frozen dataclasses that mirror the YAML. No torch here: --help stays instant."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from vqscale.codes.config import HeadConfig
from vqscale.nets.config_transformer import TransformerConfig


@dataclass(frozen=True)
class IdsConfig:
    """What every prior over a grid of ids has."""

    num_codes: int = 16384
    """K, the number of codes of the tokenizer"""
    grid: tuple[int, ...] = (16, 16)
    """ids along each side: rows and columns of an image; one number for what has one side"""
    num_classes: int = 1000
    """classes of images: labels 0 .. num_classes - 1; 0 looks at no labels"""
    class_dropout: float = 0.1
    """share of images that are trained with the null class, which guidance needs; unknown labels have it too"""
    label_smoothing: float = 0.0
    """share of the uniform distribution in the targets, in training only"""
    z_loss: float = 0.0
    """weight of the squared log-normaliser, in training only; keeps logits near zero"""
    feature_dim: int | None = None
    """dimension of the tokenizer's codes; with head.embedding: codebook, and with no other"""
    head: HeadConfig = field(default_factory=HeadConfig)
    """embedding of the ids and logits over all of them; split over mesh.codes"""

    @property
    def num_tokens(self) -> int:
        """Ids of an image."""
        return math.prod(self.grid)

    def problems(self) -> Iterable[tuple[str, str]]:
        for key, least in (("num_codes", 1), ("num_classes", 0)):
            if getattr(self, key) < least:
                yield key, f"{key} is {getattr(self, key)}: use at least {least}"
        if min(self.grid, default=0) < 1:
            yield "grid", f"grid is {list(self.grid)}: give at least one side, and at least one id along each"
        if not 0 <= self.class_dropout < 1:
            yield "class_dropout", f"class_dropout is {self.class_dropout}: use a share from 0 to below 1"
        if not 0 <= self.label_smoothing < 1:
            yield "label_smoothing", f"label_smoothing is {self.label_smoothing}: use a share from 0 to below 1"
        if self.z_loss < 0:
            yield "z_loss", f"z_loss is {self.z_loss}, a weight: use 0 or more"
        if (self.feature_dim is None) == (self.head.embedding == "codebook"):
            yield (
                "feature_dim",
                f"feature_dim is {self.feature_dim} with head.embedding: {self.head.embedding}; give the dimension of "
                "the tokenizer's codes with embedding: codebook, and null with the others",
            )


@dataclass(frozen=True)
class AutoregressiveConfig(IdsConfig):
    """One id after the other, row by row, as LlamaGen and IBQ do."""

    name: Literal["autoregressive"] = "autoregressive"
    """which prior"""
    net: TransformerConfig = field(default_factory=TransformerConfig)
    """the transformer"""

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        pairs, sides = self.net.head_dim // 2, len(self.grid)
        if sides and pairs % sides:
            yield (
                "net.num_heads",
                f"a head of {self.net.head_dim} numbers (width / num_heads) has {pairs} pairs to turn, which do not "
                f"divide by the {sides} sides of grid {list(self.grid)}: change net.width or net.num_heads",
            )


# The prior of a run is one of these.
PriorConfig = AutoregressiveConfig
