"""The published networks once more, for tests: as functions of a state dictionary with the published names.

Written from their description alone and without anything of vqscale: every operation is a sum of products, so that a
mistake in a block of ours and in a layer of torch that both would use cannot hide each other. Also made state
dictionaries: names and shapes as they are published, values that keep signals of unit size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def normed(s, name: str, x: Tensor) -> Tensor:
    """Group normalisation with 32 groups and eps 1e-6, then swish."""
    h = group_normed(s, name, x)
    return h / (1 + torch.exp(-h))


def group_normed(s, name: str, x: Tensor) -> Tensor:
    groups = x.reshape(x.shape[0], 32, -1)
    mean = groups.sum(2, keepdim=True) / groups.shape[2]
    variance = ((groups - mean) ** 2).sum(2, keepdim=True) / groups.shape[2]
    flat = ((groups - mean) / (variance + 1e-6) ** 0.5).reshape(x.shape)
    return flat * s[f"{name}.weight"][:, None, None] + s[f"{name}.bias"][:, None, None]


def conv(s, name: str, x: Tensor, stride: int = 1, pad: tuple[int, int, int, int] | None = None) -> Tensor:
    """A convolution as one matrix product of weights and windows. `pad`: left, right, top, bottom; None keeps sides."""
    weight = s[f"{name}.weight"]
    out, _, rows, columns = weight.shape
    around = (columns // 2, columns // 2, rows // 2, rows // 2) if pad is None else pad
    padded = F.pad(x, around)
    windows = F.unfold(padded, (rows, columns), stride=stride)
    sides = ((padded.shape[2] - rows) // stride + 1, (padded.shape[3] - columns) // stride + 1)
    y = (weight.reshape(out, -1) @ windows).reshape(x.shape[0], out, *sides)
    return y + s[f"{name}.bias"][:, None, None] if f"{name}.bias" in s else y


def block(s, name: str, x: Tensor) -> Tensor:
    h = conv(s, f"{name}.conv1", normed(s, f"{name}.norm1", x))
    h = conv(s, f"{name}.conv2", normed(s, f"{name}.norm2", h))
    return h + (conv(s, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in s else x)


def attention(s, name: str, x: Tensor) -> Tensor:
    h = group_normed(s, f"{name}.norm", x)
    q, k, v = (conv(s, f"{name}.{part}", h).flatten(2) for part in "qkv")
    scores = torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -0.5
    weights = torch.exp(scores - scores.amax(2, keepdim=True))
    weights = weights / weights.sum(2, keepdim=True)
    return x + conv(s, f"{name}.proj_out", torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))


def ibq_latents(s, images: Tensor) -> Tensor:
    x = conv(s, "encoder.conv_in", images)
    for level in range(5):
        for j in range(4):
            x = block(s, f"encoder.down.{level}.block.{j}", x)
            if level == 4:
                x = attention(s, f"encoder.down.4.attn.{j}", x)
        if level < 4:
            x = conv(s, f"encoder.down.{level}.downsample.conv", x, stride=2, pad=(0, 1, 0, 1))
    x = block(s, "encoder.mid.block_2", attention(s, "encoder.mid.attn_1", block(s, "encoder.mid.block_1", x)))
    return conv(s, "quant_conv", conv(s, "encoder.conv_out", normed(s, "encoder.norm_out", x)))


def ibq_images(s, z: Tensor) -> Tensor:
    x = conv(s, "decoder.conv_in", conv(s, "post_quant_conv", z))
    x = block(s, "decoder.mid.block_2", attention(s, "decoder.mid.attn_1", block(s, "decoder.mid.block_1", x)))
    for level in (4, 3, 2, 1, 0):
        for j in range(5):
            x = block(s, f"decoder.up.{level}.block.{j}", x)
            if level == 4:
                x = attention(s, f"decoder.up.4.attn.{j}", x)
        if level > 0:
            x = conv(s, f"decoder.up.{level}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    return conv(s, "decoder.conv_out", normed(s, "decoder.norm_out", x))


def ibq_ids(s, x_ND: Tensor) -> Tensor:
    return (x_ND @ s["quantize.embedding.weight"].T).argmax(1)


def ibq_codes(s) -> Tensor:
    return s["quantize.embedding.weight"]


def simvq_latents(s, images: Tensor) -> Tensor:
    x = conv(s, "encoder.conv_in", images)
    for level in range(4):
        for j in range(2):
            x = block(s, f"encoder.down.{level}.block.{j}", x)
        if level < 3:
            x = conv(s, f"encoder.down.{level}.downsample", x, stride=2)
    for j in range(2):
        x = block(s, f"encoder.mid_block.{j}", x)
    return conv(s, "encoder.conv_out", normed(s, "encoder.norm_out", x))


def simvq_images(s, z: Tensor) -> Tensor:
    x = conv(s, "decoder.conv_in", z)
    for j in range(2):
        x = block(s, f"decoder.mid_block.{j}", x)
    for level in (3, 2, 1, 0):
        for j in range(2):
            x = block(s, f"decoder.up.{level}.block.{j}", x)
        if level > 0:
            wide = conv(s, f"decoder.up.{level}.upsample.conv1", x)
            batch, four, height, width = wide.shape
            x = wide.new_empty(batch, four // 4, 2 * height, 2 * width)
            for row in (0, 1):
                for column in (0, 1):
                    part = 2 * row + column
                    x[:, :, row::2, column::2] = wide[:, part * (four // 4) : (part + 1) * (four // 4)]
    return conv(s, "decoder.conv_out", normed(s, "decoder.norm_out", x))


def simvq_codes(s) -> Tensor:
    e = s["quantize.embedding.weight"] @ s["quantize.embedding_proj.weight"].T
    return e + s["quantize.embedding_proj.bias"] if "quantize.embedding_proj.bias" in s else e


def simvq_ids(s, x_ND: Tensor) -> Tensor:
    return torch.cdist(x_ND, simvq_codes(s)).argmin(1)


class Names:
    """Collects published names with their shapes."""

    def __init__(self, biases: bool) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.biases = biases

    def conv(self, name: str, out: int, into: int, side: int, bias: bool = True) -> None:
        self.shapes[f"{name}.weight"] = (out, into, side, side)
        if bias:
            self.shapes[f"{name}.bias"] = (out,)

    def norm(self, name: str, channels: int) -> None:
        self.shapes |= {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}

    def block(self, name: str, into: int, out: int) -> None:
        self.norm(f"{name}.norm1", into)
        self.conv(f"{name}.conv1", out, into, 3, self.biases)
        self.norm(f"{name}.norm2", out)
        self.conv(f"{name}.conv2", out, out, 3, self.biases)
        if into != out:
            self.conv(f"{name}.nin_shortcut", out, into, 1, self.biases)

    def attention(self, name: str, channels: int) -> None:
        self.norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.{part}", channels, channels, 1)


def ibq_shapes(num_codes: int) -> dict[str, tuple[int, ...]]:
    names, top = Names(biases=True), (512, 512)
    names.conv("encoder.conv_in", 128, 3, 3)
    for level, (into, out) in enumerate([(128, 128), (128, 128), (128, 256), (256, 256), (256, 512)]):
        for j in range(4):
            names.block(f"encoder.down.{level}.block.{j}", into if j == 0 else out, out)
            if level == 4:
                names.attention(f"encoder.down.4.attn.{j}", 512)
        if level < 4:
            names.conv(f"encoder.down.{level}.downsample.conv", out, out, 3)
    for side in ("encoder", "decoder"):
        names.block(f"{side}.mid.block_1", *top)
        names.attention(f"{side}.mid.attn_1", 512)
        names.block(f"{side}.mid.block_2", *top)
    names.norm("encoder.norm_out", 512)
    names.conv("encoder.conv_out", 256, 512, 3)
    names.conv("decoder.conv_in", 512, 256, 3)
    for level, (into, out) in {4: top, 3: (512, 256), 2: (256, 256), 1: (256, 128), 0: (128, 128)}.items():
        for j in range(5):
            names.block(f"decoder.up.{level}.block.{j}", into if j == 0 else out, out)
            if level == 4:
                names.attention(f"decoder.up.4.attn.{j}", 512)
        if level > 0:
            names.conv(f"decoder.up.{level}.upsample.conv", out, out, 3)
    names.norm("decoder.norm_out", 128)
    names.conv("decoder.conv_out", 3, 128, 3)
    names.conv("quant_conv", 256, 256, 1)
    names.conv("post_quant_conv", 256, 256, 1)
    return names.shapes | {"quantize.embedding.weight": (num_codes, 256)}


def simvq_shapes(num_codes: int) -> dict[str, tuple[int, ...]]:
    names, top = Names(biases=False), (512, 512)
    names.conv("encoder.conv_in", 128, 3, 3, bias=False)
    for level, (into, out) in enumerate([(128, 128), (128, 256), (256, 256), (256, 512)]):
        for j in range(2):
            names.block(f"encoder.down.{level}.block.{j}", into if j == 0 else out, out)
        if level < 3:
            names.conv(f"encoder.down.{level}.downsample", out, out, 3)
    for side in ("encoder", "decoder"):
        for j in range(2):
            names.block(f"{side}.mid_block.{j}", *top)
    names.norm("encoder.norm_out", 512)
    names.conv("encoder.conv_out", 128, 512, 1)
    names.conv("decoder.conv_in", 512, 128, 3)
    for level, (into, out) in {3: top, 2: (512, 256), 1: (256, 256), 0: (256, 128)}.items():
        for j in range(2):
            names.block(f"decoder.up.{level}.block.{j}", into if j == 0 else out, out)
        if level > 0:
            names.conv(f"decoder.up.{level}.upsample.conv1", 4 * out, out, 3)
    names.norm("decoder.norm_out", 128)
    names.conv("decoder.conv_out", 3, 128, 3)
    proj = {"quantize.embedding_proj.weight": (128, 128), "quantize.embedding_proj.bias": (128,)}
    return names.shapes | {"quantize.embedding.weight": (num_codes, 128)} | proj


def made(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Values for names: products of unit size, scales around one, biases that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if name == "quantize.embedding.weight":
            state[name] = values
        elif len(shape) > 1:
            state[name] = values / torch.Size(shape[1:]).numel() ** 0.5
        else:
            state[name] = 0.1 * values + float(".norm" in name and name.endswith("weight"))
    return state


def checkpoint(averaged: dict[str, Tensor], frozen: tuple[str, ...] = ()) -> dict:
    """A Lightning checkpoint whose averages are `averaged`; the raw weights are not numbers."""
    raw = {name: x if name in frozen else torch.full_like(x, float("nan")) for name, x in averaged.items()}
    raw |= {
        "loss.discriminator.main.0.weight": torch.ones(2),
        "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1),
    }
    shadows = {f"model_ema.{n.replace('.', '')}": x for n, x in averaged.items() if n not in frozen}
    shadows |= {"model_ema.lossdiscriminatormain0weight": torch.ones(2)}
    counts = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(-1)}
    return {"state_dict": raw | shadows | counts, "epoch": 329, "global_step": 1}
