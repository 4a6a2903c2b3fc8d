"""Tokenizers that others published: their state dictionaries become ours, key by key or not at all.

A family is a network, a quantizer and the names that its project gives them. Sizes are read from the shapes; that the
network then computes what the published one does is for the tests, which state it again from its description.

The files are Lightning checkpoints: beside the weights they hold `loss.*` (LPIPS, discriminator), which is ignored, and
the moving averages of what was trained as `model_ema.<name without its dots>`: those are what the papers evaluate.
Nothing is downloaded here. Not here: reading files (nets/weights.py), our own formats (saved.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vqscale import config as configuration
from vqscale.nets.weights import check_shapes
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.export import entries
from vqscale.tokenizer.model import Tokenizer

State = Mapping[str, Tensor]
AVERAGE = "model_ema."
NO_AVERAGES = ("model_ema.decay", "model_ema.num_updates")
IGNORED = ("loss.", "discriminator.")


@dataclass(frozen=True)
class Family:
    """One project's tokenizers. `rename` maps the beginnings of our names to theirs; `frozen` names have no average."""

    where: str
    image_size: int  # and how the originals were resized
    interpolation: str
    config: Callable[[State], dict[str, Any]]
    rename: Mapping[str, str]
    frozen: tuple[str, ...] = ()


def convert(state: State, family: str, weights: Literal["average", "raw"] = "average") -> Tokenizer:
    """The tokenizer in a state dictionary of a family of FAMILIES, in evaluation mode, on one process.

    ValueError that lists missing and unknown keys and other shapes, by their published names.
    """
    kind, what = family_named(family), f"the state dictionary of a published {family} tokenizer"
    raw = {name: x for name, x in state.items() if not name.startswith((AVERAGE, *IGNORED))}
    averages = {name: x for name, x in state.items() if name.startswith(AVERAGE) and name not in NO_AVERAGES}
    _check_begin(raw, what)
    config = configuration.parse(TokenizerConfig, kind.config(raw), source=what, written=True)  # forms as published
    tokenizer = Tokenizer.from_config(config)
    mine = entries(tokenizer)
    theirs = {_published(name, kind.rename): name for name in mine}
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


def _published(name: str, rename: Mapping[str, str]) -> str:
    for ours, theirs in rename.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _average(name: str) -> str:
    return AVERAGE + name.replace(".", "")


def _check_begin(raw: State, what: str) -> None:
    """What sizes are read from must be there before anything can be compared."""
    needed = ("encoder.conv_in.weight", "encoder.conv_out.weight", "encoder.down.0.block.0.conv1.weight")
    lacks = [name for name in (*needed, "quantize.embedding.weight") if name not in raw]
    if lacks:
        some = ", ".join(list(raw)[:3]) or "nothing"
        raise ValueError(
            f"{what} has no {', '.join(lacks)} among its {len(raw)} keys ({some}, ...): these are other weights; give "
            f"the checkpoint of a tokenizer, and its family ({' or '.join(FAMILIES)})"
        )


def _check_averages(averages: State, what: str) -> None:
    if not averages:
        raise ValueError(
            f"{what} has no averaged weights ({AVERAGE}*): take the others with --weights raw, or give the whole "
            "checkpoint; the published numbers are of averaged weights"
        )


def _pyramid(raw: State) -> dict[str, Any]:
    """What both networks have: sizes of the encoder."""
    channels, in_channels = raw["encoder.conv_in.weight"].shape[:2]
    levels = range(1 + max(_numbers(raw, r"encoder\.down\.(\d+)\.")))
    firsts = [raw.get(f"encoder.down.{level}.block.0.conv1.weight") for level in levels]
    return {
        "channels": channels,
        "in_channels": in_channels,
        "multipliers": [0 if first is None else first.shape[0] // channels for first in firsts],
        "num_blocks": 1 + max(_numbers(raw, r"encoder\.down\.0\.block\.(\d+)\.")),
        "z_channels": raw["encoder.conv_out.weight"].shape[0],
    }


def _numbers(raw: State, pattern: str) -> Iterable[int]:
    return sorted({int(found[1]) for name in raw if (found := re.match(pattern, name))})


def _codes(raw: State) -> dict[str, Any]:
    num_codes, dim = raw["quantize.embedding.weight"].shape
    return {"num_codes": num_codes, "dim": dim}


def _ibq(raw: State) -> dict[str, Any]:
    """Arg max of the plain dot product; training terms as released, where the paper's beta is on the other loss."""
    attention = _numbers(raw, r"encoder\.down\.(\d+)\.attn\.")
    mid = "encoder.mid.attn_1.q.weight" in raw
    released = {"commitment_weight": 1.0, "codebook_weight": 0.25, "entropy_weight": 0.05, "entropy_temperature": 0.01}
    quantizer = {"name": "ibq", "similarity": "dot", "temperature": 1.0, "init": "normal", "revive_every": 0}
    return {
        "net": {"name": "conv", **_pyramid(raw), "attention_levels": list(attention), "mid_attention": mid},
        "quantizer": {**quantizer, **released, **_codes(raw)},
        "latent_norm": "none",
    }


def _simvq(raw: State) -> dict[str, Any]:
    quantizer = {"name": "simvq", "bias": "quantize.embedding_proj.bias" in raw, **_codes(raw)}
    return {"net": {"name": "magvit", **_pyramid(raw)}, "quantizer": quantizer, "latent_norm": "none"}


FAMILIES = {
    "ibq": Family(
        where="TencentARC/IBQ-Tokenizer-1024, -8192, -16384 or -262144 on the Hugging Face hub",
        image_size=256,
        interpolation="sampled",
        config=_ibq,
        rename={"quantizer.codebook.rows": "quantize.embedding.weight"},
    ),
    "simvq": Family(
        where="zyx123/SimVQ on the Hugging Face hub",
        image_size=128,
        interpolation="bilinear",
        config=_simvq,
        rename={"quantizer.codebook.rows": "quantize.embedding.weight", "quantizer.map.": "quantize.embedding_proj."},
        frozen=("quantize.embedding.weight",),
    ),
}
