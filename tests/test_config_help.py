"""What --help says of a schema: every key, in lines of a bounded width, each thing once; and of one part."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

import pytest
from lib.config_schemas import ProbeTask, Run, TrainTask

from vqscale import config
from vqscale.config import Free
from vqscale.config.schema import dotted_keys
from vqscale.train import config as runs


def rows_of(text):
    """Key, type and default -> doc line, which may begin below them."""
    rows, last = {}, ""
    for line in text.splitlines():
        left, doc = line[:50].strip(), line[50:].strip()
        if line.startswith(" " * 50):
            rows[last] = f"{rows[last]} {doc}".strip()
        elif len(line) > 50 and line[48:50] != "  ":
            rows[last := line.strip()] = ""
        else:
            rows[last := left] = doc
    return rows


def test_every_key_is_shown_with_its_doc():
    text = config.describe(Run)
    rows = rows_of(text)
    assert rows["steps: int (required)"] == "optimiser steps"
    assert rows["optim.lr: float = 0.5"] == "peak learning rate"
    assert rows["optim.warmup_steps: int or null = null"] == "steps of growth; null: none"
    assert rows["teacher: {...} or null = null"] == "another optimiser"
    assert rows["teacher.lr: float = 0.001"] == "peak learning rate"  # another default than that of optim
    assert rows["quantizer: {name: flat | levels | residual, ...} = {name: flat, ...}"] == "how latents become ids"
    assert rows["quantizer.name=flat"] == "A quantizer with a table."
    assert rows["quantizer.name=levels"] == "a grid of levels"
    assert rows["quantizer.num_codes: int = 99"] == "number of codes"
    assert rows["quantizer.inner.*"] == "the same keys as above"
    assert rows["stages.N.width: int (required)"] == "channels"
    assert rows["schedule: constant | cosine = cosine"] == "of the learning rate"
    assert rows["shards: str or [str, ...] = []"] == "where images are"
    order = [line.split(":")[0] for line in text.splitlines() if re.match(r"\w+:", line)]
    assert order == list(config.to_dict(Run(1)))
    tasks = config.describe(TrainTask | ProbeTask).splitlines()
    assert [line.rstrip() for line in tasks] == ["task=train", "  steps: int = 1", "task=probe", "  folder: str = ."]


@dataclass(frozen=True)
class Source:
    path: Free[str]
    """where it lies"""
    size: int = 8
    """of a side"""


@dataclass(frozen=True)
class Small:
    """The small one."""

    name: Literal["small"] = "small"
    width: int = 4
    """of all"""
    depth: int = 1
    """layers"""


@dataclass(frozen=True)
class Large:
    """The large one."""

    name: Literal["large"] = "large"
    width: int = 4
    """of all"""
    depth: int = 9
    """layers"""


@dataclass(frozen=True)
class Whole:
    train: Source
    """to learn from"""
    val: Free[Source | None] = None
    """to measure on"""
    net: Small | Large = field(default_factory=Small)
    """the network"""


def test_the_same_keys_are_told_once():
    rows = rows_of(config.describe(Whole))
    assert list(rows) == [
        "train: {...} (required)",
        "train.path: str (required) *",
        "train.size: int = 8",
        "val: {...} or null = null *",
        "net: {name: small | large, ...} = {name: small, ...}",
        "net.name=small",
        "net.width: int = 4",
        "net.depth: int = 1",
        "net.name=large",
        "as for name=small: width",
        "net.depth: int = 9",
    ]
    assert rows["val: {...} or null = null *"] == "to measure on (keys as in train)"


def test_a_part_is_told_whole():
    text = config.describe(Whole, "val")
    assert list(rows_of(text)) == ["val: {...} or null = null *", "val.path: str (required) *", "val.size: int = 8"]
    assert list(rows_of(config.describe(Whole, "net.depth"))) == [
        *("net.name=small:", "net.depth: int = 1"),
        *("net.name=large:", "net.depth: int = 9"),
    ]
    assert config.describe(Whole, "net.width").count("net.width") == 1  # the same for both
    assert rows_of(config.describe(Whole, "net.name")) == {
        "net.name=small": "The small one.",
        "net.name=large": "The large one.",
    }
    with pytest.raises(ValueError, match=r"no key net\.widht; did you mean net\.width\?"):
        config.describe(Whole, "net.widht")


def test_the_help_of_runs_names_every_key_in_lines_of_120():
    text = config.describe(runs.Run)
    assert max(map(len, text.splitlines())) <= 120
    for key in dotted_keys(runs.Run):
        assert key in text or key.rpartition(".")[2] in text, key
    for key in ("data", "tokenizer.quantizer", "tokenizer.quantizer.window_decay", "prior"):
        assert max(map(len, config.describe(runs.Run, key).splitlines())) <= 120
    assert text.count("(keys as in data.train)") == 3  # of data.val, for each task, and of the contexts of a cache
    both = config.describe(runs.Run, "data.train")
    assert both.startswith("task=tokenizer:\n  data.train: {medium: images | ")
    assert "\ntask=prior:\n  data.train: {medium: tokens | images | " in both
