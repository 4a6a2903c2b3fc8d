"""A tokenizer of images as `VQModel` of `diffusers`: encoder, codes and decoder.

That class takes the nearest row, and gives it to the decoder. Another similarity is a nearest row too, of longer rows:
with keys k, biases b and codes c the entries

    e = (k, c, f),   f^2 = m - (|k|^2 + |c|^2 + 2 b),   m the largest of these sums

have |x - e|^2 = |x|^2 + m - 2 (x . k + b) for latents x that are zero behind their D numbers; post_quant_conv reads c
alone. Where keys are the codes there is one of the two, and where all f are zero no f: so with euclid, and with cosine
of codes of length one, the table is ours. It looks in float32: an id may differ where two codes are equally near.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vqscale.nets.config import ConvConfig
from vqscale.tokenizer.foreign import Foreign, reasons_of_tokenizer, refuse, scanned
from vqscale.tokenizer.model import Tokenizer

LOADS_AS = "diffusers.VQModel"
VERSION = "0.42.1"  # whose settings these are
SAME = 1e-6  # what float32 leaves of a difference

RESIDUAL = {"nin_shortcut": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
MIDDLE = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}


def export(tokenizer: Tokenizer) -> Foreign:
    """The whole tokenizer. ValueError with every reason why the class is another network."""
    net = tokenizer.net
    reasons = [*reasons_of_tokenizer(tokenizer, mid_attention=False)]
    if isinstance(net, ConvConfig) and net.multipliers[0] != 1:
        reasons.append(f"net.multipliers begin with {net.multipliers[0]}, and its first level has the first channels")
    refuse(LOADS_AS, "tokenizer", reasons)
    assert isinstance(net, ConvConfig)
    tensors = dict(_tensors(tokenizer))
    settings = _settings(net, tokenizer, tensors["quantize.embedding.weight"].shape)
    remarks = (
        "decode(encode(pixels).latents) looks for the ids; decode(ids.flatten(), force_not_quantize=True, shape=(B, h, "
        "w, vq_embed_dim)) takes ids; pixels lie in [-1, 1]",
    )
    return Foreign(LOADS_AS, "diffusion_pytorch_model.safetensors", tensors, {"config.json": settings}, remarks)


def _settings(net: ConvConfig, tokenizer: Tokenizer, table: torch.Size) -> dict[str, Any]:
    with_attention = [level in net.attention_levels for level in range(len(net.multipliers))]
    return {
        "_class_name": LOADS_AS.split(".")[1],
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "block_out_channels": list(net.widths),
        "down_block_types": ["AttnDownEncoderBlock2D" if on else "DownEncoderBlock2D" for on in with_attention],
        "up_block_types": ["AttnUpDecoderBlock2D" if on else "UpDecoderBlock2D" for on in reversed(with_attention)],
        "force_upcast": False,
        "in_channels": net.in_channels,
        "latent_channels": net.z_channels,
        "layers_per_block": net.num_blocks,
        "lookup_from_codebook": True,
        "mid_block_add_attention": net.mid_attention,
        "norm_num_groups": net.num_groups,
        "norm_type": "group",
        "num_vq_embeddings": table[0],
        "out_channels": net.in_channels,
        "sample_size": tokenizer.card.get("image_size", 256),
        "scaling_factor": 1.0,
        "vq_embed_dim": table[1],
    }


@torch.no_grad()
def _tensors(tokenizer: Tokenizer) -> Iterator[tuple[str, Tensor]]:
    """Weights by their names there."""
    assert isinstance(tokenizer.net, ConvConfig)
    last = len(tokenizer.net.multipliers) - 1
    for side in ("encoder", "decoder"):
        for name, x in getattr(tokenizer, side).state_dict().items():
            yield f"{side}.{_name(name, last)}", x.flatten(1) if _is_linear(name) else x
    table_KE, first = _table(*scanned(tokenizer))
    dim, width = tokenizer.quantizer.dim, table_KE.shape[1]
    yield "quantize.embedding.weight", table_KE.to(tokenizer.dtype)
    into, out = tokenizer.quant_conv.state_dict(), tokenizer.post_quant_conv.state_dict()
    yield "quant_conv.weight", F.pad(into["weight"], (0, 0, 0, 0, 0, 0, 0, width - dim))
    yield "quant_conv.bias", F.pad(into["bias"], (0, width - dim))
    yield "post_quant_conv.weight", F.pad(out["weight"], (0, 0, 0, 0, first, width - dim - first))
    yield "post_quant_conv.bias", out["bias"]


def _table(rows_KD: Tensor, keys_KD: Tensor, bias_K: Tensor | None) -> tuple[Tensor, int]:
    """(entries_KE as they are above, which of their numbers is the first of a code)."""
    first = 0 if torch.allclose(keys_KD, rows_KD, rtol=0, atol=SAME) else keys_KD.shape[1]
    entries_KE = torch.cat([keys_KD, rows_KD], 1) if first else rows_KD
    sum_K = entries_KE.square().sum(1)
    if bias_K is not None:
        sum_K += 2 * bias_K
    rest_K = sum_K.max() - sum_K
    if rest_K.max() > SAME * entries_KE.square().sum(1).max():
        entries_KE = torch.cat([entries_KE, rest_K.sqrt()[:, None]], 1)
    return entries_KE, first


def _is_linear(name: str) -> bool:
    """Projections of attention, which are convolutions of one pixel here."""
    return ("attn" in name) and name.endswith(("q.weight", "k.weight", "v.weight", "proj_out.weight"))


def _name(ours: str, last: int) -> str:
    """A name of an encoder or a decoder; levels of a decoder are numbered in the order in which they run there."""
    kind, *rest = ours.split(".")
    if kind == "norm_out":
        return ".".join(["conv_norm_out", *rest])
    if kind == "mid":
        return ".".join(["mid_block", MIDDLE[rest[0]], *_part(rest[0], rest[1:])])
    if kind in ("conv_in", "conv_out"):
        return ours
    level, what, *inside = rest
    blocks = ["down_blocks", level] if kind == "down" else ["up_blocks", str(last - int(level))]
    if what in ("downsample", "upsample"):
        return ".".join([*blocks, f"{what}rs.0", *inside])
    index, *part = inside
    return ".".join([*blocks, {"block": "resnets", "attn": "attentions"}[what], index, *_part(what, part)])


def _part(kind: str, part: list[str]) -> list[str]:
    names = ATTENTION if kind.startswith("attn") else RESIDUAL
    return [names.get(part[0], part[0]), *part[1:]]
