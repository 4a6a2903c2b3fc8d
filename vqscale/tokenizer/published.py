"""Tokenizers that others published: their state dictionaries become ours, key by key or not at all.

The families are in families.py. Sizes are read from the shapes; that the network then computes what the published one
does is for the tests, which state it again from its description.

The files are Lightning checkpoints: beside the weights they hold `loss.*` (LPIPS, discriminator), which is ignored, and
the moving averages of what was trained as `model_ema.<name without its dots>`: those are what the papers evaluate.
Nothing is downloaded here. Not here: reading files (nets/weights.py), our own formats (saved.py).
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from vqscale import config as configuration
from vqscale.nets.weights import check_shapes
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.export import entries
from vqscale.tokenizer.families import FAMILIES, Family, State
from vqscale.tokenizer.family import first_levels
from vqscale.tokenizer.model import Tokenizer

AVERAGE = "model_ema."
NO_AVERAGES = ("model_ema.decay", "model_ema.num_updates")
IGNORED = ("loss.", "discriminator.")


def convert(
    state: State, family: str, weights: Literal["average", "raw"] = "average", levels: int | None = None
) -> Tokenizer:
    """The tokenizer in a state dictionary of a family of FAMILIES, in evaluation mode, on one process; of a residual
    quantizer with the first so many levels alone.

    ValueError that lists missing and unknown keys and other shapes, by their published names.
    """
    kind, what = family_named(family), f"the state dictionary of a published {family} tokenizer"
    state = kind.reduce(state)
    if levels is not None:
        state = first_levels(state, kind.level, levels)
    raw = {name: x for name, x in state.items() if not name.startswith((AVERAGE, *IGNORED, *kind.ignored))}
    averages = {name: x for name, x in state.items() if name.startswith(AVERAGE) and name not in NO_AVERAGES}
    _check_begin(raw, kind, what)
    sizes = _sizes(raw, kind, what)
    config = configuration.parse(TokenizerConfig, sizes, source=what, written=True)  # forms as published
    tokenizer = Tokenizer.from_config(config)
    mine = entries(tokenizer)
    theirs = {kind.published(name): name for name in mine}
    given = {name: tuple(x.shape) for name, x in raw.items()}
    known = {_average(name) for name in state}
    given |= {name: tuple(x.shape) for name, x in averages.items() if name not in known}  # averages of nothing
    wanted = {name: mine[ours].shape for name, ours in theirs.items()}
    if weights == "average":
        _check_averages(averages, what)
        averaged = {name: _average(name) for name in wanted if name not in kind.frozen}
        wanted |= {average: wanted[name] for name, average in averaged.items()}
        given |= {name: tuple(averages[name].shape) for name in averaged.values() if name in averages}
    else:
        averaged = {}
    check_shapes(wanted, given, what=what)
    with torch.no_grad():
        for name, ours in theirs.items():
            mine[ours].tensor.copy_(state[averaged.get(name, name)])
    return tokenizer.eval()


def family_named(name: str) -> Family:
    """The family of this name; ValueError that lists them where there is none."""
    if name not in FAMILIES:
        raise ValueError(f"no family of published tokenizers is named {name!r}: there are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _average(name: str) -> str:
    return AVERAGE + name.replace(".", "")


def _check_begin(raw: State, kind: Family, what: str) -> None:
    """What sizes are read from must be there before anything can be compared."""
    lacks = [name for name in kind.needs if name not in raw]
    if lacks:
        some = ", ".join(list(raw)[:3]) or "nothing"
        raise ValueError(
            f"{what} has no {', '.join(lacks)} among its {len(raw)} keys ({some}, ...): these are other weights; give "
            f"the checkpoint of a tokenizer, and its family ({' or '.join(FAMILIES)})"
        )


def _sizes(raw: State, kind: Family, what: str) -> dict[str, Any]:
    """The config that the shapes say. ValueError where they are those of no such network."""
    try:
        return kind.config(raw)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        shapes = ", ".join(f"{name} {tuple(raw[name].shape)}" for name in kind.needs)
        raise ValueError(
            f"{what} has no sizes of one ({error}), as its shapes are {shapes}: these are other weights; give the "
            f"checkpoint of a tokenizer, and its family ({' or '.join(FAMILIES)})"
        ) from None


def _check_averages(averages: State, what: str) -> None:
    if not averages:
        raise ValueError(
            f"{what} has no averaged weights ({AVERAGE}*): take the others with --weights raw, or give the whole "
            "checkpoint; the published numbers are of averaged weights"
        )
