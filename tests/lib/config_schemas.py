"""For the tests of config: dataclasses such as the rooms of vqscale have, and what loads or refuses a text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import pytest

from vqscale import config


@dataclass(frozen=True)
class Flat:
    """A quantizer with a table."""

    name: Literal["flat"] = "flat"
    """nearest code"""
    num_codes: int = 16
    """number of codes"""
    temperature: float = 1.0
    """of the softmax"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.num_codes < 1:
            yield "num_codes", f"num_codes is {self.num_codes}: use at least 1"


@dataclass(frozen=True)
class Levels:
    name: Literal["levels"] = "levels"
    """a grid of levels"""
    levels: tuple[int, ...] = (8, 5)
    """levels of each dimension"""


@dataclass(frozen=True)
class Residual:
    """Quantizers one after another."""

    inner: Quantizer
    """the quantizer of each depth"""
    name: Literal["residual"] = "residual"
    """rounds of the same quantizer"""
    depth: int = 2
    """rounds"""


Quantizer = Flat | Levels | Residual


@dataclass(frozen=True)
class Stage:
    width: int
    """channels"""
    attend: bool = False
    """whether attention follows"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.width % 2:
            yield "width", f"width is {self.width}: make it even"


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    """peak learning rate"""
    betas: tuple[float, float] = (0.9, 0.95)
    """of both moments"""
    warmup_steps: int | None = None
    """steps of growth;
    null: none"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.lr <= 0:
            yield "lr", f"lr is {self.lr}: make it positive"
        if self.betas[1] >= 1:
            yield "betas.1", f"the second beta is {self.betas[1]}: keep it below 1"


@dataclass(frozen=True)
class NamedOptim(Optim):
    name: Literal["named"] = "named"
    """with a name below what it inherits"""


@dataclass(frozen=True)
class Run:
    """All of a run."""

    steps: int
    """optimiser steps"""
    quantizer: Quantizer = Flat(num_codes=99)
    """how latents become ids"""
    optim: Optim = Optim(lr=0.5)
    """the optimiser"""
    stages: tuple[Stage, ...] = (Stage(4), Stage(8, True))
    """of the net"""
    schedule: Literal["constant", "cosine"] = "cosine"
    """of the learning rate"""
    label: str = "run"
    """for plots"""
    shards: str | tuple[str, ...] = ()
    """where images are"""
    teacher: Optim | None = None
    """another optimiser"""
    flag: bool = False
    """on or off"""
    tags: tuple[str, ...] = field(default_factory=lambda: ("a",))
    """words"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.optim.warmup_steps is not None and self.optim.warmup_steps > self.steps:
            yield "optim.warmup_steps", f"{self.optim.warmup_steps} steps of {self.steps}: use fewer"


@dataclass(frozen=True)
class TrainTask:
    task: Literal["train"] = "train"
    steps: int = 1


@dataclass(frozen=True)
class ProbeTask:
    task: Literal["probe"] = "probe"
    folder: str = "."


@dataclass(frozen=True)
class Derived:
    """Has a field that no config gives."""

    dim: int = 4
    heads: int = 2
    width: int = field(init=False)

    def __post_init__(self) -> None:
        if self.dim < 0:
            raise ValueError(f"dim is {self.dim}: make it positive")
        object.__setattr__(self, "width", self.dim // self.heads)


@dataclass(frozen=True)
class Divided:
    """Whose check stumbles over the size that it has just refused."""

    size: int = 0

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.size <= 0:
            yield "size", f"size is {self.size}: use at least 1"
        yield "", f"{12 // self.size} is in the way"


@dataclass(frozen=True)
class Nameless:
    steps: int = 1


@dataclass(frozen=True)
class Odd:
    sizes: list[int]


@dataclass(frozen=True)
class Buggy:
    def problems(self) -> Iterable[tuple[str, str]]:
        raise KeyError("a mistake in a check")


def load(folder, text, *overrides, schema=Run):
    """The config in the text, by way of a file run.yaml in the folder."""
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return config.load(schema, path, overrides)


def problems_of(call, *args, **kwargs):
    """The problems of a config, which must be refused, without the folders of files."""
    with pytest.raises(config.ConfigError) as caught:
        call(*args, **kwargs)
    assert isinstance(caught.value, ValueError)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return [re.sub(r"/\S*/", "", problem) for problem in caught.value.problems]


def refused(folder, text, *overrides, schema=Run):
    return problems_of(load, folder, text, *overrides, schema=schema)
