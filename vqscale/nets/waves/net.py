"""The network of waves: SEANet's encoder (seanet.py), or one of spectra (spectral.py), and Vocos' decoder (vocos.py),
or SEANet's, around a quantizer of frames.

By default that of the published SimVQ tokenizers of speech: 71.95 M parameters with SimVQ of dim 512, one token for 320
samples. The whole SEANet decoder that their checkpoints hold beside it is never called, and is not built here. With
`decoder: seanet` it is EnCodec's of 24 kHz, 14.85 M parameters around a residual quantizer of dim 128.
"""

from __future__ import annotations

from torch import nn

from vqscale.nets import Parts
from vqscale.nets.waves import seanet, spectral
from vqscale.nets.waves.config import WaveConfig
from vqscale.nets.waves.vocos import Decoder


def build(config: WaveConfig, dim: int) -> Parts:
    """Encoder to a quantizer of `dim`, and decoder from it; nothing stands between."""
    seen = config.spectra
    encoder = seanet.Encoder(config, dim) if seen is None else spectral.Encoder(config, seen, dim)
    if config.decoder == "seanet":
        mirror = seanet.Decoder(config, dim)
        return Parts(encoder, nn.Identity(), nn.Identity(), mirror, mirror.last_weight)
    return Parts(encoder, nn.Identity(), nn.Identity(), Decoder(config, dim), "head.out.weight")
