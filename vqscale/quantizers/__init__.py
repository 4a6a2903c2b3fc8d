"""Quantizers: one paper, one file, one interface (base.py).

A quantizer is arithmetic on what its codebook returns for the tokens of this rank. Which rank has which rows it does
not know; sums over the tokens or rows of all ranks it takes from codes/, or makes over an axis of its mesh.

To add one: a file here, its settings (in config/, which has no torch), and its line in QUANTIZERS. Build, save and the
tests of what every quantizer promises go over that dictionary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vqscale import config as configuration
from vqscale.quantizers.config import QUANTIZERS, QuantizerConfig

__all__ = ["QUANTIZERS", "build"]

if TYPE_CHECKING:
    from vqscale.parallel.mesh import Mesh
    from vqscale.quantizers.base import Quantizer


def build(config: Mapping[str, Any] | QuantizerConfig, mesh: Mesh | None = None, *, seed: int = 0) -> Quantizer:
    """The quantizer of a config, e.g. {"name": "ibq", "num_codes": 4096, "dim": 64}; no mesh is one process.

    Raises ConfigError (a ValueError) that lists all problems of a dict, the nearest known key of each unknown one.
    """
    if isinstance(config, Mapping):
        parsed: QuantizerConfig = configuration.parse(QuantizerConfig, config, source="quantizer")
        return build(parsed, mesh, seed=seed)
    quantizer: Quantizer = configuration.load_class(config.module)(config, mesh, seed=seed)
    return quantizer
