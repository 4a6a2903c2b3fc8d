"""The families of published tokenizers: which network and quantizer they are, and how their projects call things.

To add one: its line in FAMILIES. How a state dictionary then becomes a tokenizer, strictly, is in published.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One project's tokenizers."""

    where: str
    card: Mapping[str, Any]
    """what is known of how its samples were read, as the card of a saved tokenizer has it"""
    config: Callable[[State], dict[str, Any]]
    """the config of a tokenizer, of the weights without averages"""
    needs: tuple[str, ...]
    """names that `config` reads"""
    rename: Mapping[str, str]
    """regular expressions for our names, and what of theirs takes the place"""
    frozen: tuple[str, ...] = ()
    """their names of what has no average"""
    ignored: tuple[str, ...] = ()
    """how the names begin of what is never called, beside losses and discriminators"""
    reduce: Callable[[State], State] = dict
    """what of the file is used, under plain names, before anything is compared"""

    def published(self, name: str) -> str:
        """Their name of what we call `name`."""
        for ours, theirs in self.rename.items():
            name = re.sub(ours, theirs, name)
        return name


PYRAMID = (
    "encoder.conv_in.weight",
    "encoder.conv_out.weight",
    "encoder.down.0.block.0.conv1.weight",
    "quantize.embedding.weight",
)
WINDOW = "head.istft.window"
ENCODEC = "feature_extractor.encodec."
BOOK = f"{ENCODEC}quantizer.vq.layers.0._codebook."


def _waves(encoder: str) -> tuple[str, ...]:
    """What sizes of the net of waves are read from, its encoder being called so."""
    layers = ("0.conv.conv.weight_v", "1.block.1.conv.conv.weight_v", "13.lstm.weight_ih_l0")
    return (*(f"{encoder}{layer}" for layer in layers), "backbone.embed.weight", "backbone.convnext.0.pwconv1.weight")


def _pyramid(raw: State) -> dict[str, Any]:
    """What both networks have: sizes of the encoder."""
    channels, in_channels = raw["encoder.conv_in.weight"].shape[:2]
    levels = range(_count(raw, r"encoder\.down\.(\d+)\."))
    firsts = [raw.get(f"encoder.down.{level}.block.0.conv1.weight") for level in levels]
    return {
        "channels": channels,
        "in_channels": in_channels,
        "multipliers": [0 if first is None else first.shape[0] // channels for first in firsts],
        "num_blocks": _count(raw, r"encoder\.down\.0\.block\.(\d+)\."),
        "z_channels": raw["encoder.conv_out.weight"].shape[0],
    }


def _numbers(raw: State, pattern: str) -> list[int]:
    return sorted({int(found[1]) for name in raw if (found := re.match(pattern, name))})


def _count(raw: State, pattern: str) -> int:
    """How many layers there are of a kind; ValueError unless they are numbered 0, 1, 2, ..."""
    found = _numbers(raw, pattern)
    if found != list(range(len(found))):
        raise ValueError(f"the numbers of {pattern} are {', '.join(map(str, found[:5]))}, ... and not 0, 1, 2, ...")
    return len(found)


def _codes(raw: State, name: str = "quantize.embedding.weight") -> dict[str, Any]:
    num_codes, dim = raw[name].shape
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
    return {"net": {"name": "magvit", **_pyramid(raw)}, **_mapped(raw)}


def _mapped(raw: State) -> dict[str, Any]:
    quantizer = {"name": "simvq", "bias": "quantize.embedding_proj.bias" in raw, **_codes(raw)}
    return {"quantizer": quantizer, "latent_norm": "none"}


def _simvq_audio(raw: State) -> dict[str, Any]:
    return {"signal": {"name": "sounds"}, "net": _wave(raw, "encoder.model.", causal=True), **_mapped(raw)}


def _wavtokenizer(raw: State) -> dict[str, Any]:
    quantizer = {"name": "ema", "init": "normal", "revive_every": 0, **_codes(raw, f"{BOOK}embed")}
    net = _wave(raw, f"{ENCODEC}encoder.model.", causal=False)
    return {"signal": {"name": "sounds"}, "net": net, "quantizer": quantizer, "latent_norm": "none"}


def _wave(raw: State, encoder: str, causal: bool) -> dict[str, Any]:
    """What no shape says: whether the encoder is causal, and groups of 32."""
    name = re.escape(encoder)
    first, embed = raw[f"{encoder}0.conv.conv.weight_v"], raw["backbone.embed.weight"]
    lstm = _numbers(raw, rf"{name}(\d+)\.lstm\.")[-1]
    if lstm > len(raw):
        raise ValueError(f"there is a layer {encoder}{lstm} among {len(raw)} keys")
    strided = [raw.get(f"{encoder}{3 * level}.conv.conv.weight_v") for level in range(1, lstm // 3 + 1)]
    return {
        "name": "wave",
        "channels": first.shape[0],
        "in_channels": first.shape[1],
        "kernel": first.shape[2],
        "residual_kernel": raw[f"{encoder}1.block.1.conv.conv.weight_v"].shape[2],
        "ratios": [2 if down is None else down.shape[2] // 2 for down in strided],
        "lstm_layers": _count(raw, rf"{name}\d+\.lstm\.weight_ih_l(\d+)"),
        "causal": causal,
        "width": embed.shape[0],
        "decoder_kernel": embed.shape[2],
        "hidden": raw["backbone.convnext.0.pwconv1.weight"].shape[0],
        "num_blocks": _count(raw, r"backbone\.convnext\.(\d+)\."),
    }


def _without_window(state: State) -> State:
    """The window of the inverse transform is what ours is made with, and no weight."""
    window = state.get(WINDOW)
    if window is not None and not torch.allclose(window.float(), torch.hann_window(len(window)), atol=1e-5):
        raise ValueError(
            f"{WINDOW} of {len(window)} samples is not the Hann window that the net wave inverts with: these are other "
            "weights than those of the published tokenizers"
        )
    return {name: x for name, x in state.items() if name != WINDOW}


def _in_use(state: State) -> State:
    """WavTokenizer's norms have a scale and a shift for each of four bandwidths, of which the first is in use."""
    first = {".norm.scale.weight": ".norm.weight", ".norm.shift.weight": ".norm.bias"}
    found = dict(_without_window(state))
    for name in state:
        for theirs, plain in first.items():
            if name.endswith(theirs):
                found[name.replace(theirs, plain)] = found.pop(name)[0]
    return found


SIMVQ = {
    r"^quantizer\.codebook\.rows$": "quantize.embedding.weight",
    r"^quantizer\.map\.": "quantize.embedding_proj.",
}

FAMILIES = {
    "ibq": Family(
        where="TencentARC/IBQ-Tokenizer-1024, -8192, -16384 or -262144 on the Hugging Face hub",
        card={"image_size": 256, "interpolation": "sampled"},
        config=_ibq,
        needs=PYRAMID,
        rename={r"^quantizer\.codebook\.rows$": "quantize.embedding.weight"},
    ),
    "simvq": Family(
        where="zyx123/SimVQ on the Hugging Face hub",
        card={"image_size": 128, "interpolation": "bilinear"},
        config=_simvq,
        needs=PYRAMID,
        rename=SIMVQ,
        frozen=("quantize.embedding.weight",),
    ),
    "simvq_audio": Family(
        where="zyx123/SimVQ on the Hugging Face hub, vq_audio_log/simvq_{4k,8k,65k,262k}",
        card={},
        config=_simvq_audio,
        needs=(*_waves("encoder.model."), "quantize.embedding.weight"),
        rename=SIMVQ | {r"^decoder\.(backbone|head)\.": r"\1.", r"^(encoder\..*conv)\.": r"\1.conv."},
        frozen=("quantize.embedding.weight",),
        ignored=("decoder.",),
        reduce=_without_window,
    ),
    "wavtokenizer": Family(
        where="novateur/WavTokenizer on the Hugging Face hub; it has no averages: --weights raw",
        card={},
        config=_wavtokenizer,
        needs=(*_waves(f"{ENCODEC}encoder.model."), f"{BOOK}embed"),
        rename={
            r"^quantizer\.codebook\.rows$": f"{BOOK}embed",
            r"^decoder\.(backbone|head)\.": r"\1.",
            r"^(encoder\..*conv)\.": r"\1.conv.",
            r"^encoder\.": f"{ENCODEC}encoder.",
        },
        ignored=(
            *(f"{ENCODEC}decoder.", *(f"{BOOK}{name}" for name in ("embed_avg", "cluster_size", "inited"))),
            *("multiperioddisc.", "multiresddisc.", "dac.", "dacdiscriminator.", "melspec_loss."),
        ),
        reduce=_in_use,
    ),
}
