"""Quantizers: one paper, one file, one interface (base.py). None of them knows about ranks; their codebook does.

To add one: a file here, its settings in config.py, and its line in QUANTIZERS. The tests run over this dictionary.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vqscale import config as configuration
from vqscale.quantizers.config import QuantizerConfig

if TYPE_CHECKING:
    from vqscale.parallel.mesh import Mesh
    from vqscale.quantizers.base import Quantizer

QUANTIZERS = {
    "vq": "vqscale.quantizers.vq:VQ",
    "ema": "vqscale.quantizers.ema:EMA",
    "ibq": "vqscale.quantizers.ibq:IBQ",
    "simvq": "vqscale.quantizers.simvq:SimVQ",
    "fsq": "vqscale.quantizers.fsq:FSQ",
    "lfq": "vqscale.quantizers.lfq:LFQ",
    "bsq": "vqscale.quantizers.bsq:BSQ",
    "scq": "vqscale.quantizers.scq:SCQ",
    "residual": "vqscale.quantizers.residual:Residual",
    "grouped": "vqscale.quantizers.grouped:Grouped",
}


def build(config: Mapping[str, Any] | QuantizerConfig, mesh: Mesh | None = None, *, seed: int = 0) -> Quantizer:
    """The quantizer of a config, e.g. {"name": "ibq", "num_codes": 4096, "dim": 64}; no mesh is one process.

    Raises ConfigError (a ValueError) that lists all problems of a dict, the nearest known key of each unknown one.
    """
    if isinstance(config, Mapping):
        parsed: QuantizerConfig = configuration.parse(QuantizerConfig, config, source="quantizer")
        return build(parsed, mesh, seed=seed)
    module, name = QUANTIZERS[config.name].split(":")
    quantizer: Quantizer = getattr(import_module(module), name)(config, mesh, seed=seed)
    return quantizer
