"""The VQGANs of taming-transformers, LlamaGen and Open-MAGVIT2 once more, for tests: as functions of a state dictionary
with the published names, made of the sums of products in published.py; and those names with their shapes, also as
`diffusers` has them, today and in older files.
"""

from __future__ import annotations

import torch
from published import Names, attention, block, conv, group_normed, normed
from torch import Tensor

LEVELS = (1, 1, 2, 2, 4)
PROJECTIONS = {
    "diffusers": ("to_q", "to_k", "to_v", "to_out.0"),
    "diffusers_older": ("query", "key", "value", "proj_attn"),
}


def places(family: str) -> dict[str, str]:
    """How a family calls a layer at a level, {i} from the finest and {r} from the coarsest, block {j}."""
    if family == "llamagen":
        down, up, mid = "encoder.conv_blocks.{i}", "decoder.conv_blocks.{r}", ("mid.0", "mid.1", "mid.2")
        inner = "res.{j}"
    elif family in PROJECTIONS:
        down, up, mid = "encoder.down_blocks.{i}", "decoder.up_blocks.{r}", ("resnets.0", "attentions.0", "resnets.1")
        found = {"down": f"{down}.resnets.{{j}}", "down_attn": f"{down}.attentions.{{j}}"}
        found |= {"up": f"{up}.resnets.{{j}}", "up_attn": f"{up}.attentions.{{j}}"}
        found |= {"downsample": f"{down}.downsamplers.0.conv", "upsample": f"{up}.upsamplers.0.conv"}
        return found | dict(zip(("first", "middle", "second"), (f"mid_block.{layer}" for layer in mid), strict=True))
    else:
        down, up, mid = "encoder.down.{i}", "decoder.up.{i}", ("mid.block_1", "mid.attn_1", "mid.block_2")
        inner = "block.{j}"
    found = {"down": f"{down}.{inner}", "down_attn": f"{down}.attn.{{j}}", "downsample": f"{down}.downsample.conv"}
    found |= {"up": f"{up}.{inner}", "up_attn": f"{up}.attn.{{j}}", "upsample": f"{up}.upsample.conv"}
    return found | dict(zip(("first", "middle", "second"), mid, strict=True))


def _at(family: str, layer: str, i: int, j: int = 0, levels: int = len(LEVELS)) -> str:
    return places(family)[layer].format(i=i, r=levels - 1 - i, j=j)


def _in_diffusers(family: str, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """What is inside a layer: projections of attention are matrices there."""
    if ".attentions." not in name:
        return name.replace(".nin_shortcut.", ".conv_shortcut.").replace(".norm_out.", ".conv_norm_out."), shape
    layer, part, kind = name.rsplit(".", 2)
    parts = dict(zip(("norm", "q", "k", "v", "proj_out"), ("group_norm", *PROJECTIONS[family]), strict=True))
    return f"{layer}.{parts[part]}.{kind}", shape[:2]


def shapes(
    family: str,
    ch: int,
    dim: int,
    num_codes: int,
    blocks: int = 2,
    z: int = 256,
    levels: tuple[int, ...] = LEVELS,
    attended: bool = True,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes, of every family in the same order; `attended`: there is attention at the coarsest level."""
    names, widths, top, last = Names(biases=True), [ch * m for m in levels], ch * levels[-1], len(levels) - 1

    def at(layer: str, i: int, j: int = 0) -> str:
        return _at(family, layer, i, j, len(levels))

    names.conv("encoder.conv_in", ch, 3, 3)
    for i, out in enumerate(widths):
        for j in range(blocks):
            names.block(at("down", i, j), widths[max(i - 1, 0)] if j == 0 else out, out)
            if attended and i == last:
                names.attention(at("down_attn", i, j), out)
        if i < last:
            names.conv(at("downsample", i), out, out, 3)
    for side in ("encoder", "decoder"):
        for layer in ("first", "second"):
            names.block(f"{side}.{places(family)[layer]}", top, top)
        names.attention(f"{side}.{places(family)['middle']}", top)
    names.norm("encoder.norm_out", top)
    names.conv("encoder.conv_out", z, top, 3)
    names.conv("decoder.conv_in", top, z, 3)
    for i, out in enumerate(widths):
        for j in range(blocks + 1):
            names.block(at("up", i, j), widths[min(i + 1, last)] if j == 0 else out, out)
            if attended and i == last:
                names.attention(at("up_attn", i, j), out)
        if i > 0:
            names.conv(at("upsample", i), out, out, 3)
    names.norm("decoder.norm_out", ch)
    names.conv("decoder.conv_out", 3, ch, 3)
    names.conv("quant_conv", dim, z, 1)
    names.conv("post_quant_conv", z, dim, 1)
    found = names.shapes | {"quantize.embedding.weight": (num_codes, dim)}
    return dict(_in_diffusers(family, *each) for each in found.items()) if family in PROJECTIONS else found


def latents(family: str, s, images: Tensor, blocks: int = 2) -> Tensor:
    x, last = conv(s, "encoder.conv_in", images), len(LEVELS) - 1
    for i in range(len(LEVELS)):
        for j in range(blocks):
            x = block(s, _at(family, "down", i, j), x)
            if i == last:
                x = attention(s, _at(family, "down_attn", i, j), x)
        if i < last:
            x = conv(s, _at(family, "downsample", i), x, stride=2, pad=(0, 1, 0, 1))
    x = _middle(family, s, "encoder", x)
    return conv(s, "quant_conv", conv(s, "encoder.conv_out", normed(s, "encoder.norm_out", x)))


def pixels(family: str, s, z: Tensor, blocks: int = 2) -> Tensor:
    x = _middle(family, s, "decoder", conv(s, "decoder.conv_in", conv(s, "post_quant_conv", z)))
    for i in reversed(range(len(LEVELS))):
        for j in range(blocks + 1):
            x = block(s, _at(family, "up", i, j), x)
            if i == len(LEVELS) - 1:
                x = attention(s, _at(family, "up_attn", i, j), x)
        if i > 0:
            x = conv(s, _at(family, "upsample", i), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return conv(s, "decoder.conv_out", normed(s, "decoder.norm_out", x))


def _middle(family: str, s, side: str, x: Tensor) -> Tensor:
    first, middle, second = (f"{side}.{places(family)[layer]}" for layer in ("first", "middle", "second"))
    return block(s, second, attention(s, middle, block(s, first, x)))


def magvit_shapes(ch: int, bits: int, blocks: int) -> dict[str, tuple[int, ...]]:
    names, widths, top, last = Names(biases=False), [ch * m for m in LEVELS], ch * LEVELS[-1], len(LEVELS) - 1
    names.conv("encoder.conv_in", ch, 3, 3, bias=False)
    for i, out in enumerate(widths):
        for j in range(blocks):
            names.block(f"encoder.down.{i}.block.{j}", widths[max(i - 1, 0)] if j == 0 else out, out)
        if i < last:
            names.conv(f"encoder.down.{i}.downsample", out, out, 3)
    for side in ("encoder", "decoder"):
        for j in range(blocks):
            names.block(f"{side}.mid_block.{j}", top, top)
    names.norm("encoder.norm_out", top)
    names.conv("encoder.conv_out", bits, top, 1)
    names.conv("decoder.conv_in", top, bits, 3)
    for i, out in enumerate(widths):
        into = widths[min(i + 1, last)]
        for j in range(blocks):
            names.block(f"decoder.up.{i}.block.{j}", into if j == 0 else out, out)
        for part in ("gamma", "beta"):
            names.shapes |= {
                f"decoder.adaptive.{i}.{part}.weight": (into, bits),
                f"decoder.adaptive.{i}.{part}.bias": (into,),
            }
        if i > 0:
            names.conv(f"decoder.up.{i}.upsample.conv1", 4 * out, out, 3)
    names.norm("decoder.norm_out", ch)
    names.conv("decoder.conv_out", 3, ch, 3)
    return names.shapes


def magvit_latents(s, images: Tensor, blocks: int) -> Tensor:
    x = conv(s, "encoder.conv_in", images)
    for i in range(len(LEVELS)):
        for j in range(blocks):
            x = block(s, f"encoder.down.{i}.block.{j}", x)
        if i < len(LEVELS) - 1:
            x = conv(s, f"encoder.down.{i}.downsample", x, stride=2)
    for j in range(blocks):
        x = block(s, f"encoder.mid_block.{j}", x)
    return conv(s, "encoder.conv_out", normed(s, "encoder.norm_out", x))


def magvit_pixels(s, z: Tensor, blocks: int) -> Tensor:
    x = conv(s, "decoder.conv_in", z)
    for j in range(blocks):
        x = block(s, f"decoder.mid_block.{j}", x)
    for i in reversed(range(len(LEVELS))):
        x = _adapted(s, f"decoder.adaptive.{i}", x, z)
        for j in range(blocks):
            x = block(s, f"decoder.up.{i}.block.{j}", x)
        if i > 0:
            wide = conv(s, f"decoder.up.{i}.upsample.conv1", x)
            batch, four, height, width = wide.shape
            x = wide.reshape(batch, 2, 2, four // 4, height, width).permute(0, 3, 4, 1, 5, 2)
            x = x.reshape(batch, four // 4, 2 * height, 2 * width)
    return conv(s, "decoder.conv_out", normed(s, "decoder.norm_out", x))


def _adapted(s, name: str, x: Tensor, z: Tensor) -> Tensor:
    count = z.shape[2] * z.shape[3]
    mean = z.sum((2, 3)) / count
    deviation = (((z - mean[:, :, None, None]) ** 2).sum((2, 3)) / (count - 1) + 1e-6) ** 0.5
    scale = deviation @ s[f"{name}.gamma.weight"].T + s[f"{name}.gamma.bias"]
    shift = mean @ s[f"{name}.beta.weight"].T + s[f"{name}.beta.bias"]
    plain = {"n.weight": torch.ones(x.shape[1]).to(x), "n.bias": torch.zeros(x.shape[1]).to(x)}
    return group_normed(plain, "n", x) * scale[:, :, None, None] + shift[:, :, None, None]
