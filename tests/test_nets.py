"""The convolutional nets: published names and counts, and every block against a formula written out here."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vqscale.nets.config import ConvConfig
from vqscale.nets.conv import Attention, Decoder, Downsample, Encoder, Residual, Upsample

SMALL = ConvConfig(
    channels=8, multipliers=(1, 2, 3), num_blocks=1, attention_levels=(1,), z_channels=5, num_groups=4, dropout=0.0
)
SIMVQ = ConvConfig(multipliers=(1, 2, 2, 4), num_blocks=2, attention_levels=(), mid_attention=False, z_channels=128)


def on_meta(config: ConvConfig) -> tuple[Encoder, Decoder]:
    with torch.device("meta"):
        return Encoder(config), Decoder(config)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def conv_names(name: str, c_out: int, c_in: int, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (c_out, c_in, size, size), f"{name}.bias": (c_out,)}


def norm_names(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def block_names(name: str, c_in: int, c_out: int) -> dict[str, tuple[int, ...]]:
    names = norm_names(f"{name}.norm1", c_in) | conv_names(f"{name}.conv1", c_out, c_in, 3)
    names |= norm_names(f"{name}.norm2", c_out) | conv_names(f"{name}.conv2", c_out, c_out, 3)
    return names | (conv_names(f"{name}.nin_shortcut", c_out, c_in, 1) if c_in != c_out else {})


def attention_names(name: str) -> dict[str, tuple[int, ...]]:
    names = norm_names(f"{name}.norm", 512)
    for part in ("q", "k", "v", "proj_out"):
        names |= conv_names(f"{name}.{part}", 512, 512, 1)
    return names


def mid_names() -> dict[str, tuple[int, ...]]:
    return block_names("mid.block_1", 512, 512) | attention_names("mid.attn_1") | block_names("mid.block_2", 512, 512)


def published_encoder() -> dict[str, tuple[int, ...]]:
    names = conv_names("conv_in", 128, 3, 3)
    for level, (c_in, c_out) in enumerate([(128, 128), (128, 128), (128, 256), (256, 256), (256, 512)]):
        for block in range(4):
            names |= block_names(f"down.{level}.block.{block}", c_in if block == 0 else c_out, c_out)
        if level < 4:
            names |= conv_names(f"down.{level}.downsample.conv", c_out, c_out, 3)
    for block in range(4):
        names |= attention_names(f"down.4.attn.{block}")
    return names | mid_names() | norm_names("norm_out", 512) | conv_names("conv_out", 256, 512, 3)


def published_decoder() -> dict[str, tuple[int, ...]]:
    names = conv_names("conv_in", 512, 256, 3) | mid_names()
    for level, (c_in, c_out) in {4: (512, 512), 3: (512, 256), 2: (256, 256), 1: (256, 128), 0: (128, 128)}.items():
        for block in range(5):
            names |= block_names(f"up.{level}.block.{block}", c_in if block == 0 else c_out, c_out)
        if level > 0:
            names |= conv_names(f"up.{level}.upsample.conv", c_out, c_out, 3)
    for block in range(5):
        names |= attention_names(f"up.4.attn.{block}")
    return names | norm_names("norm_out", 128) | conv_names("conv_out", 3, 128, 3)


def test_default_is_the_published_network():
    encoder, decoder = on_meta(ConvConfig())
    assert shapes(encoder) == published_encoder()
    assert shapes(decoder) == published_decoder()
    assert len(shapes(encoder)) == 244
    assert len(shapes(decoder)) == 294
    assert sum(p.numel() for p in encoder.parameters()) == 46_752_256
    assert sum(p.numel() for p in decoder.parameters()) == 59_903_875


def test_shapes_of_the_published_network():
    encoder, decoder = on_meta(ConvConfig())
    latents = encoder(torch.empty(2, 3, 256, 256, device="meta"))
    assert latents.shape == (2, 256, 16, 16)
    assert decoder(latents).shape == (2, 3, 256, 256)


def test_network_without_attention():
    encoder, decoder = on_meta(SIMVQ)
    names = [*shapes(encoder), *shapes(decoder)]
    assert not [name for name in names if "attn" in name]
    assert max(int(name.split(".")[3]) for name in shapes(encoder) if ".block." in name) == 1
    assert max(int(name.split(".")[3]) for name in shapes(decoder) if ".block." in name) == 2
    latents = encoder(torch.empty(1, 3, 128, 128, device="meta"))
    assert latents.shape == (1, 128, 16, 16)
    assert SIMVQ.strides == (8, 8)
    assert decoder(latents).shape == (1, 3, 128, 128)


def group_norm(x: torch.Tensor, groups: int, norm: nn.GroupNorm) -> torch.Tensor:
    parts = x.reshape(x.shape[0], groups, -1)
    mean = parts.mean(2, keepdim=True)
    variance = (parts - mean).square().mean(2, keepdim=True)
    flat = ((parts - mean) / torch.sqrt(variance + 1e-6)).reshape(x.shape)
    return flat * norm.weight[:, None, None] + norm.bias[:, None, None]


def conv3x3(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Every output pixel is the product of the weights with its window; x is padded already."""
    windows = x.unfold(2, 3, 1).unfold(3, 3, 1)
    return torch.einsum("bchwyx,ocyx->bohw", windows, weight) + bias[:, None, None]


def randomised(module: nn.Module) -> nn.Module:
    """Random values also where torch starts with ones and zeros, so that a forgotten scale or bias shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.double()


@pytest.mark.parametrize("out_channels", [8, 12])
def test_residual_block_is_its_formula(out_channels):
    block = randomised(Residual(8, out_channels, SMALL))
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64)

    def swish(h):
        return h / (1 + torch.exp(-h))

    h = F.pad(swish(group_norm(x, 4, block.norm1)), (1, 1, 1, 1))
    h = conv3x3(h, block.conv1.weight, block.conv1.bias)
    h = F.pad(swish(group_norm(h, 4, block.norm2)), (1, 1, 1, 1))
    h = conv3x3(h, block.conv2.weight, block.conv2.bias)
    if out_channels == 8:
        shortcut = x
    else:
        shortcut = torch.einsum("bchw,oc->bohw", x, block.nin_shortcut.weight[:, :, 0, 0])
        shortcut = shortcut + block.nin_shortcut.bias[:, None, None]
    torch.testing.assert_close(block(x), shortcut + h)


def test_attention_is_its_formula():
    attention = randomised(Attention(8, SMALL))
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    normed = group_norm(x, 4, attention.norm)
    q, k, v = (
        torch.einsum("bchw,oc->bohw", normed, part.weight[:, :, 0, 0]) + part.bias[:, None, None]
        for part in (attention.q, attention.k, attention.v)
    )
    scores = torch.einsum("bcyx,bcts->byxts", q, k) / 8**0.5
    weights = scores.flatten(3).softmax(3).reshape(scores.shape)
    mixed = torch.einsum("byxts,bcts->bcyx", weights, v)
    out = torch.einsum("bchw,oc->bohw", mixed, attention.proj_out.weight[:, :, 0, 0])
    torch.testing.assert_close(attention(x), x + out + attention.proj_out.bias[:, None, None])


def test_downsample_pads_right_and_below_only():
    down = randomised(Downsample(4))
    x = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    padded = torch.zeros(2, 4, 7, 9, dtype=torch.float64)
    padded[:, :, :6, :8] = x
    expected = conv3x3(padded, down.conv.weight, down.conv.bias)[:, :, ::2, ::2]
    torch.testing.assert_close(down(x), expected)
    assert expected.shape == (2, 4, 3, 4)


def test_upsample_repeats_then_convolves():
    up = randomised(Upsample(4))
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    repeated = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(up(x), conv3x3(F.pad(repeated, (1, 1, 1, 1)), up.conv.weight, up.conv.bias))


def test_order_of_the_parts():
    """The small nets by their published recipe, part after part, each part found by its name."""
    encoder, decoder = randomised(Encoder(SMALL)), randomised(Decoder(SMALL))
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)

    def middle(net, h):
        return net.mid.block_2(net.mid.attn_1(net.mid.block_1(h)))

    h = encoder.conv_in(images)
    h = encoder.down[0].downsample(encoder.down[0].block[0](h))
    h = encoder.down[1].downsample(encoder.down[1].attn[0](encoder.down[1].block[0](h)))
    h = middle(encoder, encoder.down[2].block[0](h))
    latents = encoder.conv_out(F.silu(encoder.norm_out(h)))
    torch.testing.assert_close(encoder(images), latents)
    assert latents.shape == (2, 5, 2, 3)

    h = middle(decoder, decoder.conv_in(latents))
    h = decoder.up[2].upsample(decoder.up[2].block[1](decoder.up[2].block[0](h)))
    first, second = decoder.up[1].attn
    h = decoder.up[1].upsample(second(decoder.up[1].block[1](first(decoder.up[1].block[0](h)))))
    h = decoder.up[0].block[1](decoder.up[0].block[0](h))
    torch.testing.assert_close(decoder(latents), decoder.conv_out(F.silu(decoder.norm_out(h))))


def test_checkpointing_recomputes_and_changes_nothing(monkeypatch):
    config = dataclasses.replace(SMALL, dropout=0.2)
    plain, recomputed = Encoder(config), Encoder(dataclasses.replace(config, checkpointing=True))
    recomputed.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 8, 8)
    calls = {"plain": 0, "recomputed": 0}
    original = Residual.forward

    grads = {}
    for name, encoder in {"plain": plain, "recomputed": recomputed}.items():

        def counted(self, x, name=name):
            calls[name] += 1
            return original(self, x)

        monkeypatch.setattr(Residual, "forward", counted)
        torch.manual_seed(5)  # the same dropout; the recomputation must draw it again
        encoder(images).square().mean().backward()
        grads[name] = {key: p.grad for key, p in encoder.named_parameters()}
    assert calls["recomputed"] == 2 * calls["plain"] > 0
    for key, grad in grads["plain"].items():
        torch.testing.assert_close(grads["recomputed"][key], grad, rtol=1e-5, atol=1e-8, msg=key)


@pytest.mark.parametrize(
    ("change", "key", "says"),
    [
        ({"num_groups": 3}, "num_groups", "3 groups do not divide 8 channels"),
        ({"multipliers": ()}, "multipliers", "at least 1"),
        ({"multipliers": (1, 0)}, "multipliers", "at least 1"),
        ({"attention_levels": (1, 3)}, "attention_levels", r"levels \[3\], but 3 multipliers make levels 0 to 2"),
        ({"dropout": 1.0}, "dropout", r"\[0, 1\)"),
        ({"num_blocks": 0}, "num_blocks", "num_blocks is 0"),
        ({"channels": -8}, "channels", "channels is -8"),
    ],
)
def test_problems_of_a_config(change, key, says):
    assert list(SMALL.problems()) == []
    found = dict(dataclasses.replace(SMALL, **change).problems())
    assert key in found
    assert re.search(says, found[key])


def test_config_needs_no_torch():
    code = "import sys, vqscale.nets.config; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
