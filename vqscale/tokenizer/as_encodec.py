"""A tokenizer of sounds as `EncodecModel` in `transformers`: encoder, levels of codes and decoder.

That class is SEANet's encoder and decoder around a residual quantizer of nearest rows, of any sizes. How many levels it
uses it is told as kilobits a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vqscale.nets.waves.config import WaveConfig
from vqscale.quantizers.config.compositions import ResidualConfig
from vqscale.quantizers.config.tables import EMAConfig, VQConfig
from vqscale.quantizers.residual import Residual
from vqscale.signals.config_sounds import SoundsSignal
from vqscale.tokenizer.foreign import Foreign, refuse
from vqscale.tokenizer.model import Tokenizer

LOADS_AS = "transformers.EncodecModel"


def export(tokenizer: Tokenizer) -> Foreign:
    """ValueError with every reason why the class is another network."""
    refuse(LOADS_AS, "tokenizer", reasons(tokenizer))
    config = tokenizer.config
    assert config is not None
    net, quantizer, signal = config.net, config.quantizer, config.signal
    assert isinstance(net, WaveConfig)
    assert isinstance(quantizer, ResidualConfig)
    assert isinstance(signal, SoundsSignal)
    settings = _settings(net, quantizer, signal.sample_rate)
    extractor = {
        "feature_extractor_type": "EncodecFeatureExtractor",
        "feature_size": net.in_channels,
        "sampling_rate": signal.sample_rate,
        "padding_value": 0.0,
        "padding_side": "right",
        "return_attention_mask": True,
    }
    files = {"config.json": settings, "preprocessor_config.json": extractor}
    remarks = (f"encode(waves, bandwidth={settings['target_bandwidths'][-1]}) gives the ids of all levels",)
    return Foreign(LOADS_AS, "model.safetensors", _tensors(tokenizer), files, remarks)


def reasons(tokenizer: Tokenizer) -> Iterable[str]:
    """For which the class is another network."""
    config, net = tokenizer.config, tokenizer.net
    assert config is not None, "a tokenizer that was loaded has a config"
    quantizer = config.quantizer
    if not isinstance(net, WaveConfig):
        yield f"net.name is {net.name}, and it has the net wave"
    else:
        if net.decoder != "seanet":
            yield f"net.decoder is {net.decoder}, and it has seanet"
        if net.spectra is not None:
            yield "net.spectra is set, and it begins with samples"
        if not net.lstm_layers:
            yield "net.lstm_layers is 0, and it has at least 1"
        if net.in_channels > 2:
            yield f"net.in_channels is {net.in_channels}, and it has 1 or 2"
    if not isinstance(config.signal, SoundsSignal):
        yield f"signal.name is {config.signal.name}, and it has sounds"
    if config.latent_norm != "none":
        yield f"latent_norm is {config.latent_norm}, and it has none"
    if not isinstance(quantizer, ResidualConfig):
        yield f"quantizer.name is {quantizer.name}, and it has residual"
    elif not isinstance(quantizer.inner, VQConfig | EMAConfig):
        yield f"quantizer.inner.name is {quantizer.inner.name}, and it has nearest rows: vq or ema"
    else:
        inner = quantizer.inner
        if inner.similarity != "euclid":
            yield f"quantizer.inner.similarity is {inner.similarity}, and it has euclid"
        if quantizer.scale != 1:
            yield f"quantizer.scale is {quantizer.scale}, and it has 1"
        if inner.num_codes < 2 or inner.num_codes & (inner.num_codes - 1):
            yield f"quantizer.inner.num_codes is {inner.num_codes}, and it has a power of two"


def _settings(net: WaveConfig, quantizer: ResidualConfig, rate: int) -> dict[str, Any]:
    assert isinstance(quantizer.inner, VQConfig | EMAConfig)
    num_codes, dim = quantizer.inner.num_codes, quantizer.inner.dim
    bits = math.ceil(rate / net.hop) * round(math.log2(num_codes))  # a second, of a level
    used = sorted({*(1 << power for power in range(quantizer.levels.bit_length())), quantizer.levels})
    return {
        "architectures": [LOADS_AS.split(".")[1]],
        "model_type": "encodec",
        "dtype": "float32",
        "target_bandwidths": [_bandwidth(levels, bits) for levels in used],
        "sampling_rate": rate,
        "audio_channels": net.in_channels,
        "normalize": False,
        "num_filters": net.channels,
        "upsampling_ratios": list(reversed(net.ratios)),
        "kernel_size": net.kernel,
        "last_kernel_size": net.kernel,
        "residual_kernel_size": net.residual_kernel,
        "num_lstm_layers": net.lstm_layers,
        "use_causal_conv": net.causal,
        "hidden_size": dim,
        "codebook_size": num_codes,
    }


def _bandwidth(levels: int, bits: int) -> float:
    """Kilobits a second that the class, which rounds down, takes for so many levels."""
    found = levels * bits / 1000
    while min(1000 * found // bits, found * 1000 / bits) < levels:
        found = math.nextafter(found, math.inf)
    return found


@torch.no_grad()
def _tensors(tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Weights by their names there, as the published file has them."""
    found = {}
    for part in ("encoder", "decoder"):
        for name, x in getattr(tokenizer, part).state_dict().items():
            found[f"{part}.{name.replace('model.', 'layers.', 1).replace('.convtr.', '.conv.')}"] = x
    quantizer = tokenizer.quantizer
    assert isinstance(quantizer, Residual)
    ids = torch.arange(quantizer.num_codes, device=quantizer.mesh.device)
    for i, level in enumerate(quantizer.quantizers()):
        book, rows_KD = f"quantizer.layers.{i}.codebook.", level.decode(ids)
        found |= {f"{book}embed": rows_KD, f"{book}embed_avg": rows_KD.clone()}
        found |= {f"{book}cluster_size": rows_KD.new_ones(len(ids)), f"{book}inited": rows_KD.new_ones(1)}
    return found
