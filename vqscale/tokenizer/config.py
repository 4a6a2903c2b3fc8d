"""What a tokenizer is made of, without torch: the part of a run's config that its weights cannot do without.

Not here: what it is trained for and with (vqscale.train.config).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from vqscale.nets.config import ConvConfig, NetConfig
from vqscale.quantizers.config import QuantizerConfig
from vqscale.quantizers.config.tables import IBQConfig
from vqscale.signals.config import ImagesSignal, SignalConfig


@dataclass(frozen=True)
class TokenizerConfig:
    """Encoder, quantizer, decoder. The defaults are the recipe that keeps codes in use; see configs/study/README.md."""

    signal: SignalConfig = field(default_factory=ImagesSignal)
    """what is tokenized"""
    net: NetConfig = field(default_factory=ConvConfig)
    """encoder and decoder"""
    quantizer: QuantizerConfig = field(default_factory=lambda: IBQConfig(similarity="euclid", temperature=0.3))
    """what turns latents into ids; its codebook is sharded over mesh.codes"""
    latent_norm: Literal["none", "rms", "layer"] = "rms"
    """norm of each latent before the quantizer, without parameters; keeps the scale of latents from drifting"""
    code_dropout: Literal["none", "random"] = "none"
    """in training the decoder is given any number of an image's codes, each number as often (random: UViM), or all"""
    no_code: Literal["zero", "learned"] = "zero"
    """what it is given in place of a dropped code: a code of zeros, or behind post_quant_conv a learned vector, zero at
    first; where zeros are a code (fsq with odd levels) the second tells the two apart"""

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from self.signal.net_misfits(self.net)
        if self.no_code == "learned" and self.code_dropout == "none":
            yield (
                "no_code",
                "no_code is learned and code_dropout none: without dropped codes the vector is never met; use "
                "code_dropout: random, or no_code: zero",
            )
