"""The settings of quantizers that are made of others. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from vqscale.quantizers.config import QuantizerSettings, SingleConfig
from vqscale.quantizers.config.tables import VQConfig


@dataclass(frozen=True)
class ResidualConfig(QuantizerSettings):
    """Levels of any other quantizer, each on what the ones before left."""

    module: ClassVar[str] = "vqscale.quantizers.residual:Residual"
    composes: ClassVar[bool] = False
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
class GroupedConfig(QuantizerSettings):
    """Parts of a token, each with another quantizer."""

    module: ClassVar[str] = "vqscale.quantizers.grouped:Grouped"
    composes: ClassVar[bool] = False
    name: Literal["grouped"] = "grouped"
    """a token is cut into parts, each has a quantizer of its own"""
    inner: SingleConfig = field(default_factory=VQConfig)
    """the quantizer of every part; its dim is the dimension of a part"""
    groups: int = 2
    """number of parts, and of ids per token"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.groups < 1:
            yield "groups", f"groups is {self.groups}: use at least 1"
