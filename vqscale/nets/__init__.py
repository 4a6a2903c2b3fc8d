"""Plain network modules: no ranks, no codes.

To add a network of tokenizers: a file here with `build(config, dim) -> Parts`, its settings, and its line in NETS, both
in config/. The tests run over this dictionary. Discriminators are another such set (discriminators.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vqscale.config import load_class
from vqscale.nets.config import NETS, NetConfig

__all__ = ["NETS", "Parts", "build"]

if TYPE_CHECKING:
    from torch import nn


class Parts(NamedTuple):
    """What stands before and behind a quantizer of `dim`: samples (B, C, *sides) -> (B, dim, *grid), and back.

    The convolutions next to the quantizer run in the type of the parameters, whatever the autocast; nn.Identity where
    a network has none. `last_weight` is the name in the decoder of the weight nearest to what comes out, by whose
    gradients adversarial losses are balanced.

    Where the config says takes_context, encoder and decoder are called with a context as second argument.
    """

    encoder: nn.Module
    quant_conv: nn.Module
    post_quant_conv: nn.Module
    decoder: nn.Module
    last_weight: str


def build(config: NetConfig, dim: int) -> Parts:
    """The network of a config for a quantizer of `dim`. ValueError where the two do not fit."""
    parts: Parts = load_class(config.module)(config, dim)
    return parts
