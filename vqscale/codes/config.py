"""The settings of learned tables, as frozen dataclasses that mirror the YAML. No torch here: --help stays instant."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from vqscale.config import Before, Free

SimilarityName = Literal["dot", "euclid", "cosine"]  # the keys of similarity.SIMILARITIES
Init = Literal["normal", "uniform", "data"]
Products = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class UpkeepConfig:
    """First values of a learned table, the window in which usage is counted, and the revival of dead codes."""

    init: Init = "data"
    """first rows: normal N(0, init_scale^2), uniform +-init_scale, or data: encoder outputs after warmup_steps"""
    init_scale: float = 1.0
    """scale of the first rows (with init: data they are replaced when the warm-up ends)"""
    warmup_steps: int = 100
    """steps without quantization before the rows are drawn from encoder outputs (init: data only)"""
    landing_steps: Annotated[int, Before(0)] = 0
    """steps after the warm-up over which the decoder is given ever more of the code: x + a (z - x), a from 0 to 1"""
    window_decay: float | None = None
    """decay per step of the exponential window of counts; null: a code used at its fair share has 5 hits in it"""
    revive_every: Annotated[int, Before(10)] = 1
    """every so many steps, dead codes are set to tokens of the current batch; 0 never"""
    revive_from: Annotated[Literal["use", "tokens"], Before("tokens")] = "use"
    """which tokens: in proportion to how much their codes are used, which splits crowded cells, or all alike"""
    revive_below: float = 0.1
    """a code is dead when it has less than this share of its fair share of hits"""
    revive_after: int | None = None
    """steps that a code is given before it can be called dead; null: as many as bring revive_patience hits"""
    revive_patience: Annotated[float, Before(10.0)] = 3.0
    """with revive_after null: hits that a code at its fair share has before it can be called dead; 5 are a window"""
    revive_most: int | None = None
    """at most so many codes are revived at a time; null: a quarter of the tokens of the batch"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.init_scale <= 0:
            yield "init_scale", f"init_scale is {self.init_scale}, the scale of the first rows: make it positive"
        if self.warmup_steps < 0:
            yield "warmup_steps", f"warmup_steps is {self.warmup_steps}: use 0 or more"
        if self.landing_steps < 0:
            yield "landing_steps", f"landing_steps is {self.landing_steps}: use 0 or more"
        if self.init == "data" and self.warmup_steps < 1:
            yield "warmup_steps", "init: data draws the rows from a warm-up of 0 steps: use at least 1, or another init"
        if self.window_decay is not None and not 0 <= self.window_decay < 1:
            yield "window_decay", f"window_decay is {self.window_decay}: use a number from 0 to below 1"
        if self.revive_every < 0:
            yield "revive_every", f"revive_every is {self.revive_every}: use 0 (never) or more"
        if self.revive_patience <= 0:
            yield "revive_patience", f"revive_patience is {self.revive_patience} hits: use a positive number"
        if self.revive_most is not None and self.revive_most < 1:
            yield "revive_most", f"revive_most is {self.revive_most}: use at least 1, or revive_every: 0"


@dataclass(frozen=True)
class TableConfig(UpkeepConfig):
    """What every quantizer with a learned table has."""

    num_codes: int = 4096
    """K, the number of codes"""
    dim: int = 16
    """D, the dimension of a code"""
    scan_mib: Free[int] = 64
    """memory of the blocks in which tokens meet rows, MiB per process"""

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        for key in ("num_codes", "dim", "scan_mib"):
            if getattr(self, key) < 1:
                yield key, f"{key} is {getattr(self, key)}: use at least 1"
