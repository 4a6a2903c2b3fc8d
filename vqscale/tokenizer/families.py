"""The families of published tokenizers: which network and quantizer they are, and how their projects call things.

To add one: its line in FAMILIES. How a state dictionary then becomes a tokenizer, strictly, is in published.py. Why FVQ
is left out: README.md.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from vqscale.tokenizer import encodec_names, vqgan_names
from vqscale.tokenizer.family import PYRAMID, Family, State, codes, count, numbers, pyramid

WINDOW = "head.istft.window"
ENCODEC = "feature_extractor.encodec."
BOOK = f"{ENCODEC}quantizer.vq.layers.0._codebook."
VOCOS = ("backbone.embed.weight", "backbone.convnext.0.pwconv1.weight")


def _seanet(encoder: str) -> tuple[str, ...]:
    """What sizes of SEANet are read from, its encoder being called so."""
    layers = ("0.conv.conv.weight_v", "1.block.1.conv.conv.weight_v", "13.lstm.weight_ih_l0")
    return tuple(f"{encoder}{layer}" for layer in layers)


def _conv(raw: State) -> dict[str, Any]:
    """The net of taming-transformers. What no shape says: groups of 32."""
    attention = numbers(raw, r"encoder\.down\.(\d+)\.attn\.")
    mid = "encoder.mid.attn_1.q.weight" in raw
    return {"name": "conv", **pyramid(raw), "attention_levels": list(attention), "mid_attention": mid}


def _ibq(raw: State) -> dict[str, Any]:
    """Arg max of the plain dot product; training terms as released, where the paper's beta is on the other loss."""
    released = {"commitment_weight": 1.0, "codebook_weight": 0.25, "entropy_weight": 0.05, "entropy_temperature": 0.01}
    quantizer = {"name": "ibq", "similarity": "dot", "temperature": 1.0, "init": "normal", "revive_every": 0}
    return {
        "net": _conv(raw),
        "quantizer": {**quantizer, **released, **codes(raw)},
        "latent_norm": "none",
    }


def _nearest(raw: State) -> dict[str, Any]:
    """The nearest row; training terms as released (`legacy`), where beta is on the other loss than in the paper."""
    quantizer = {"name": "vq", "similarity": "euclid", "commitment_weight": 1.0, "codebook_weight": 0.25, **STILL}
    return {"net": _conv(raw), "quantizer": {**quantizer, **codes(raw)}, "latent_norm": "none"}


def _llamagen(raw: State) -> dict[str, Any]:
    """Rows and latents of length one, and so the row of the largest cosine."""
    quantizer = {"name": "vq", "similarity": "cosine", **STILL, **codes(raw)}
    return {"net": _conv(raw), "quantizer": quantizer, "latent_norm": "none"}


def _open_magvit2(raw: State) -> dict[str, Any]:
    net = {"name": "magvit", **pyramid(raw), "adaptive": True}
    quantizer = {"name": "lfq", "dim": net["z_channels"], "fit": "none"}
    return {"net": net, "quantizer": quantizer, "latent_norm": "none"}


def _simvq(raw: State) -> dict[str, Any]:
    return {"net": {"name": "magvit", **pyramid(raw)}, **_mapped(raw)}


def _mapped(raw: State) -> dict[str, Any]:
    quantizer = {"name": "simvq", "bias": "quantize.embedding_proj.bias" in raw, **codes(raw)}
    return {"quantizer": quantizer, "latent_norm": "none"}


def _simvq_audio(raw: State) -> dict[str, Any]:
    return {"signal": {"name": "sounds"}, "net": _wave(raw, "encoder.model.", causal=True), **_mapped(raw)}


def _wavtokenizer(raw: State) -> dict[str, Any]:
    quantizer = {"name": "ema", "init": "normal", "revive_every": 0, **codes(raw, f"{BOOK}embed")}
    net = _wave(raw, f"{ENCODEC}encoder.model.", causal=False)
    return {"signal": {"name": "sounds"}, "net": net, "quantizer": quantizer, "latent_norm": "none"}


def _encodec(raw: State) -> dict[str, Any]:
    """The nearest row of each level to what the levels before left; rows as moving averages, as it was trained."""
    inner = {"name": "ema", "init": "normal", "revive_every": 0, **codes(raw, encodec_names.ROWS)}
    quantizer = {"name": "residual", "levels": count(raw, encodec_names.LEVEL), "inner": inner}
    net = {**_sampled(raw, "encoder.model.", causal=True), "decoder": "seanet"}
    return {"signal": {"name": "sounds"}, "net": net, "quantizer": quantizer, "latent_norm": "none"}


def _wave(raw: State, encoder: str, causal: bool) -> dict[str, Any]:
    """What no shape says of the decoder: groups of 32."""
    embed = raw["backbone.embed.weight"]
    return {
        **_sampled(raw, encoder, causal),
        "width": embed.shape[0],
        "decoder_kernel": embed.shape[2],
        "hidden": raw["backbone.convnext.0.pwconv1.weight"].shape[0],
        "num_blocks": count(raw, r"backbone\.convnext\.(\d+)\."),
    }


def _sampled(raw: State, encoder: str, causal: bool) -> dict[str, Any]:
    """Of the net of waves what an encoder of samples says. What no shape says: whether it is causal."""
    name = re.escape(encoder)
    first = raw[f"{encoder}0.conv.conv.weight_v"]
    lstm = numbers(raw, rf"{name}(\d+)\.lstm\.")[-1]
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
        "lstm_layers": count(raw, rf"{name}\d+\.lstm\.weight_ih_l(\d+)"),
        "causal": causal,
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


STILL = {"init": "normal", "revive_every": 0}
ROWS = {r"^quantizer\.codebook\.rows$": "quantize.embedding.weight"}
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
        rename=ROWS,
    ),
    "taming": Family(
        where="the table of CompVis/taming-transformers on GitHub, its VQGANs without Gumbel; they have no averages: "
        "--weights raw",
        card={"image_size": 256, "interpolation": "sampled"},
        config=_nearest,
        needs=PYRAMID,
        rename=ROWS,
    ),
    "diffusers": Family(
        where="diffusion_pytorch_model.safetensors in the folder of a VQModel; it has no averages: --weights raw",
        card={},
        config=_nearest,
        needs=PYRAMID,
        rename=ROWS,
        reduce=vqgan_names.of_diffusers,
    ),
    "llamagen": Family(
        where="FoundationVision/LlamaGen on the Hugging Face hub, vq_ds16_c2i.pt or vq_ds8_c2i.pt; no averages: "
        "--weights raw",
        card={"image_size": 256},
        config=_llamagen,
        needs=PYRAMID,
        rename=ROWS,
        reduce=vqgan_names.of_llamagen,
    ),
    "open_magvit2": Family(
        where="imagenet_256_L.ckpt in TencentARC/Open-MAGVIT2-Tokenizer-256-resolution on the Hugging Face hub",
        card={"image_size": 256, "interpolation": "sampled"},
        config=_open_magvit2,
        needs=(*PYRAMID[:3], "decoder.adaptive.0.gamma.weight"),
        rename={},
        reduce=vqgan_names.first_bit_first,
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
        needs=(*_seanet("encoder.model."), *VOCOS, "quantize.embedding.weight"),
        rename=SIMVQ | {r"^decoder\.(backbone|head)\.": r"\1.", r"^(encoder\..*conv)\.": r"\1.conv."},
        frozen=("quantize.embedding.weight",),
        ignored=("decoder.",),
        reduce=_without_window,
    ),
    "wavtokenizer": Family(
        where="novateur/WavTokenizer on the Hugging Face hub; it has no averages: --weights raw",
        card={},
        config=_wavtokenizer,
        needs=(*_seanet(f"{ENCODEC}encoder.model."), *VOCOS, f"{BOOK}embed"),
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
    "encodec": Family(
        where="encodec_24khz-d7cc33bc.th of facebookresearch/encodec on GitHub, or model.safetensors of "
        "facebook/encodec_24khz on the Hugging Face hub; no averages: --weights raw",
        card={},
        config=_encodec,
        needs=(*_seanet("encoder.model."), encodec_names.ROWS),
        rename={
            r"^quantizer\.columns\.(\d+)\.codebook\.rows$": r"quantizer.vq.layers.\1._codebook.embed",
            r"\.(conv|convtr)\.(weight_[gv]|bias)$": r".\1.\1.\2",
        },
        reduce=encodec_names.plain,
        level=encodec_names.LEVEL,
    ),
}
