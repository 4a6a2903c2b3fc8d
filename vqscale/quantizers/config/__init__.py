"""The settings of quantizers, as frozen dataclasses that mirror the YAML, and which quantizers there are.

One file for each family: tables (codes are rows), implicit (codes follow from their ids), compositions (made of other
quantizers). No torch here, so that --help and errors of a config come at once; a dataclass names the class it builds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vqscale.config import OneOf

# One line for each quantizer: its name in a config, and where its settings are.
QUANTIZERS = {
    "vq": "vqscale.quantizers.config.tables:VQConfig",
    "ema": "vqscale.quantizers.config.tables:EMAConfig",
    "ibq": "vqscale.quantizers.config.tables:IBQConfig",
    "simvq": "vqscale.quantizers.config.tables:SimVQConfig",
    "fsq": "vqscale.quantizers.config.implicit:FSQConfig",
    "lfq": "vqscale.quantizers.config.implicit:LFQConfig",
    "bsq": "vqscale.quantizers.config.implicit:BSQConfig",
    "scq": "vqscale.quantizers.config.tables:SCQConfig",
    "residual": "vqscale.quantizers.config.compositions:ResidualConfig",
    "grouped": "vqscale.quantizers.config.compositions:GroupedConfig",
}


class QuantizerSettings:
    """What the settings of every quantizer say beside their keys."""

    name: str
    module: ClassVar[str]
    """the quantizer's class, as `module:Class`"""
    composes: ClassVar[bool] = True
    """whether levels and parts of a composition may be this: a token has one id, and it says the output"""


if TYPE_CHECKING:
    QuantizerConfig = QuantizerSettings
    SingleConfig = QuantizerSettings
else:
    QuantizerConfig = OneOf(QUANTIZERS)
    SingleConfig = OneOf(QUANTIZERS, lambda settings: settings.composes)
