"""Plain network modules: no ranks, no codes.

To add a network of tokenizers: a file here with `build(config, dim) -> Parts`, its settings in config.py, and its line
in NETS. The tests run over this dictionary.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import nn

    from vqscale.nets.config import NetConfig

NETS = {"conv": "vqscale.nets.conv", "magvit": "vqscale.nets.magvit"}


class Parts(NamedTuple):
    """What stands before and behind a quantizer of `dim`: images -> (B, dim, h, w), and (B, dim, h, w) -> images.

    The convolutions next to the quantizer run in the type of the parameters, whatever the autocast; nn.Identity where
    a network has none.
    """

    encoder: nn.Module
    quant_conv: nn.Module
    post_quant_conv: nn.Module
    decoder: nn.Module


def build(config: NetConfig, dim: int) -> Parts:
    """The network of a config for a quantizer of `dim`. ValueError where the two do not fit."""
    parts: Parts = import_module(NETS[config.name]).build(config, dim)
    return parts
