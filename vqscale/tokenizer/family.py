"""What a family of published tokenizers says, and how sizes are read from the shapes of a state dictionary.

Which families there are: families.py. Not here: how a state dictionary becomes a tokenizer (published.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One project's tokenizers."""

    where: str
    card: Mapping[str, Any]
    """what is known of how its samples were read, as the card of a saved tokenizer has it"""
    config: Callable[[State], dict[str, Any]]
    """the config of a tokenizer, of the weights without averages"""
    needs: tuple[str, ...]
    """names that `config` reads"""
    rename: Mapping[str, str]
    """regular expressions for our names, and what of theirs takes the place"""
    frozen: tuple[str, ...] = ()
    """their names of what has no average"""
    ignored: tuple[str, ...] = ()
    """how the names begin of what is never called, beside losses and discriminators"""
    reduce: Callable[[State], State] = dict
    """what of the file is used, under plain names, before anything is compared"""
    level: str = ""
    """a regular expression for the names of a level of the quantizer, with its number, where there are several"""

    def published(self, name: str) -> str:
        """Their name of what we call `name`."""
        for ours, theirs in self.rename.items():
            name = re.sub(ours, theirs, name)
        return name


PYRAMID = (
    "encoder.conv_in.weight",
    "encoder.conv_out.weight",
    "encoder.down.0.block.0.conv1.weight",
    "quantize.embedding.weight",
)


def pyramid(raw: State) -> dict[str, Any]:
    """What conv and magvit have: sizes of the encoder."""
    channels, in_channels = raw["encoder.conv_in.weight"].shape[:2]
    levels = range(count(raw, r"encoder\.down\.(\d+)\."))
    firsts = [raw.get(f"encoder.down.{level}.block.0.conv1.weight") for level in levels]
    return {
        "channels": channels,
        "in_channels": in_channels,
        "multipliers": [0 if first is None else first.shape[0] // channels for first in firsts],
        "num_blocks": count(raw, r"encoder\.down\.0\.block\.(\d+)\."),
        "z_channels": raw["encoder.conv_out.weight"].shape[0],
    }


def numbers(raw: State, pattern: str) -> list[int]:
    """The numbers that layers of a kind have, by their names."""
    return sorted({int(found[1]) for name in raw if (found := re.match(pattern, name))})


def count(raw: State, pattern: str) -> int:
    """How many layers there are of a kind; ValueError unless they are numbered 0, 1, 2, ..."""
    found = numbers(raw, pattern)
    if found != list(range(len(found))):
        raise ValueError(f"the numbers of {pattern} are {', '.join(map(str, found[:5]))}, ... and not 0, 1, 2, ...")
    return len(found)


def first_levels(state: State, pattern: str, levels: int) -> State:
    """Without the levels of a residual quantizer after so many. ValueError where it has not so many."""
    there = count(state, pattern) if pattern else 1
    if not 1 <= levels <= there:
        raise ValueError(
            f"the first {levels} levels of a quantizer are asked for, and this one has {there}: change --levels, or "
            "leave it out and take all"
        )
    rest = {name for name in state if pattern and (found := re.match(pattern, name)) and int(found[1]) >= levels}
    return {name: x for name, x in state.items() if name not in rest}


def codes(raw: State, name: str = "quantize.embedding.weight") -> dict[str, Any]:
    num_codes, dim = raw[name].shape
    return {"num_codes": num_codes, "dim": dim}
