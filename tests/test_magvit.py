"""The network of the published SimVQ tokenizers: names, counts, memory; its numbers are in test_published.py."""

from __future__ import annotations

import dataclasses

import published
import pytest
import torch
from torch import nn

from vqscale import config as configuration
from vqscale import nets
from vqscale.nets.config import MagvitConfig, NetConfig, grid
from vqscale.nets.magvit import Residual, Upsample

SMALL = MagvitConfig(channels=8, multipliers=(1, 2), num_blocks=2, z_channels=4, num_groups=4)


def test_default_is_the_published_network():
    with torch.device("meta"):
        parts = nets.build(MagvitConfig(), 128)
    mine = {f"encoder.{name}": tuple(x.shape) for name, x in parts.encoder.state_dict().items()}
    mine |= {f"decoder.{name}": tuple(x.shape) for name, x in parts.decoder.state_dict().items()}
    theirs = {n: shape for n, shape in published.simvq_shapes(8).items() if not n.startswith("quantize.")}
    assert mine == theirs
    assert isinstance(parts.quant_conv, nn.Identity)
    latents = parts.encoder(torch.empty(2, 3, 128, 128, device="meta"))
    assert latents.shape == (2, 128, 16, 16)
    assert parts.decoder(latents).shape == (2, 3, 128, 128)


def test_pixels_come_from_the_outer_part_of_the_channels():
    up = Upsample(2)
    with torch.no_grad():
        up.conv1.weight.zero_()
        up.conv1.bias.copy_(torch.arange(8.0))
    pixels = up(torch.zeros(1, 2, 1, 1))
    assert pixels[0, 0].tolist() == [[0, 2], [4, 6]]
    assert pixels[0, 1].tolist() == [[1, 3], [5, 7]]


def test_checkpointing_changes_nothing(monkeypatch):
    plain = nets.build(SMALL, 4)
    recomputed = nets.build(dataclasses.replace(SMALL, checkpointing=True), 4)
    calls, original = [], Residual.forward
    monkeypatch.setattr(Residual, "forward", lambda self, x: calls.append(1) or original(self, x))
    images, grads, counts = torch.randn(2, 3, 8, 8), [], []
    for parts in (plain, recomputed):
        for mine, whole in zip(parts[:4], plain[:4], strict=True):
            mine.load_state_dict(whole.state_dict())
        calls.clear()
        parts.decoder(parts.encoder(images)).square().mean().backward()
        counts.append(len(calls))
        grads.append([p.grad for part in parts[:4] for p in part.parameters()])
    assert counts[1] == 2 * counts[0] > 0
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_every_network_has_its_line_and_its_settings():
    for name in nets.NETS:
        net = configuration.parse(NetConfig, {"name": name})
        dim = getattr(net, "z_channels", 5)
        sides = net.only_sides or tuple(4 * stride for stride in net.strides)
        with torch.device("meta"):
            parts, context = nets.build(net, dim), [torch.empty(1, net.context_channels, *sides)] * net.takes_context
            samples = torch.empty(1, net.in_channels, *sides)
        latents = parts.quant_conv(parts.encoder(samples, *context))
        assert latents.shape == (1, dim, *grid(net, sides))
        assert parts.decoder(parts.post_quant_conv(latents), *context).shape[2:] == sides
        assert parts.decoder.get_parameter(parts.last_weight).ndim > 1


@pytest.mark.parametrize(
    ("change", "key", "says"),
    [
        ({"num_groups": 3}, "num_groups", "3 groups do not divide 8 channels"),
        ({"multipliers": ()}, "multipliers", "at least 1"),
        ({"num_blocks": 0}, "num_blocks", "num_blocks is 0"),
    ],
)
def test_problems_of_a_config(change, key, says):
    assert list(SMALL.problems()) == []
    found = dict(dataclasses.replace(SMALL, **change).problems())
    assert says in found[key]
