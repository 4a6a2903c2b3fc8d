"""SEANet's decoder in the net of waves: lengths, what a place sees, published counts, whole recordings."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vqscale import nets
from vqscale.engine.config import OptimConfig
from vqscale.engine.optimisers import groups
from vqscale.nets.waves.config import SpectraConfig, WaveConfig
from vqscale.nets.waves.seanet import Decoder, Up
from vqscale.nets.waves.weight_norm import NormedTransposed
from vqscale.plan.count import network

SMALL = WaveConfig(decoder="seanet", channels=2, ratios=(3, 5), lstm_layers=1)


def test_the_default_has_published_counts():
    with torch.device("meta"):
        parts = nets.build(WaveConfig(decoder="seanet"), 512)
    assert sum(x.numel() for x in parts.decoder.parameters()) == 8_802_274
    assert len(parts.decoder.state_dict()) == 62
    assert parts.decoder.get_parameter(parts.last_weight).shape == (1, 32, 7)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("spectra", [None, SpectraConfig(window=12, width=4, hidden=4, num_blocks=1)])
def test_any_length_has_a_frame_for_each_begun_hop(causal, spectra):
    parts = nets.build(dataclasses.replace(SMALL, causal=causal, spectra=spectra, in_channels=2), 4)
    for length, frames in ((1, 1), (15, 1), (16, 2), (149, 10), (150, 10)):
        latents = parts.encoder(torch.randn(1, 2, length))
        assert latents.shape == (1, 4, frames)
        assert parts.decoder(latents).shape == (1, 2, 15 * frames)


def test_a_causal_sample_sees_no_later_frames_but_for_the_mirrored_beginning():
    decoder = Decoder(dataclasses.replace(SMALL, lstm_layers=0), 4)
    assert [last_seen(decoder, sample) for sample in (0, 150, 164, 165)] == [6, 10, 10, 11]
    both = Decoder(dataclasses.replace(SMALL, lstm_layers=0, causal=False), 4)
    assert last_seen(both, 150) > 10


def last_seen(decoder, sample):
    latents = torch.randn(1, 4, 30, requires_grad=True)
    decoder(latents)[0, :, sample].sum().backward()
    return int(latents.grad.abs().sum(1).nonzero()[-1, -1])


@pytest.mark.parametrize(("causal", "left"), [(True, 0), (False, 2)])
def test_every_number_adds_its_kernel_where_its_stride_is(causal, left):
    up, x = Up(2, 1, 3, causal), torch.randn(1, 2, 4)
    weight, expected = up.convtr.weight_v, torch.zeros(1, 1, 15)
    for t in range(4):
        expected[0, 0, 3 * t : 3 * t + 6] += (x[0, :, t, None] * weight[:, 0]).sum(0)
    torch.testing.assert_close(up(x), expected[..., left : left + 12] + up.convtr.bias)


def test_a_normed_transposed_convolution_begins_as_the_plain_one_and_knows_no_scale_of_v():
    conv, x = torch.nn.ConvTranspose1d(2, 3, 4, 2), torch.randn(1, 2, 5)
    normed = NormedTransposed(conv)
    before = normed(x)
    torch.testing.assert_close(before, conv(x))
    assert normed.weight_g.shape == (2, 1, 1)
    with torch.no_grad():
        normed.weight_v *= 7.0
        torch.testing.assert_close(normed(x), before)
    decays = {p: g["weight_decay"] for g in groups(normed, OptimConfig(weight_decay=0.1)) for p in g["params"]}
    assert [decays[p] for p in (normed.weight_v, normed.weight_g, normed.bias)] == [0.1, 0.0, 0.0]


def test_a_gradient_reaches_every_parameter():
    parts = nets.build(dataclasses.replace(SMALL, channels=4), 4)  # a v of one number is only a sign
    parts.decoder(parts.encoder(torch.randn(2, 1, 200))).square().mean().backward()
    for part in (parts.encoder, parts.decoder):
        assert all(x.grad is not None and x.grad.any() for x in part.parameters())


def test_operations_are_counted_with_those_of_transposed_convolutions():
    def product(out, into, times, kernel=1):
        return 2 * out * into * kernel * times

    def block(channels, length):
        return product(channels // 2, channels, length, 3) + product(channels, channels // 2 + channels, length)

    lstm, ends = product(4 * 8, 2 * 8, 10), 2 * product(8, 4, 10, 7) + 2 * product(2, 1, 150, 7)
    up_and_down = 2 * (product(4, 2, 50, 6) + product(8, 4, 10, 10))
    expected = 2 * (lstm + block(2, 150) + block(4, 50)) + ends + up_and_down
    assert network(SMALL, (150,), 4).forward == expected


def test_problems_of_a_config():
    assert list(SMALL.problems()) == []  # no window to cut: an odd hop is one
    found = dict(dataclasses.replace(SMALL, turning_phases=True, ratios=(0, 2)).problems())
    assert "decoder is seanet, which has no phases" in found["turning_phases"]
    assert "at least 1" in found["ratios"]
