"""The network of waves: published counts, frames of any length, what a frame sees, closed cases of the inverse."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from vqscale import config as configuration
from vqscale import nets
from vqscale.engine.config import OptimConfig
from vqscale.engine.optimisers import groups
from vqscale.nets.waves.config import WaveConfig
from vqscale.nets.waves.seanet import Encoder
from vqscale.nets.waves.vocos import Decoder, Head, inverse_stft, spectrum, turned
from vqscale.nets.waves.weight_norm import NormedConv
from vqscale.parallel.mesh import Mesh
from vqscale.plan.count import network
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.model import Tokenizer

SMALL = WaveConfig(channels=4, ratios=(2, 4), width=8, hidden=12, num_blocks=2, num_groups=4)


def count(module):
    return sum(x.numel() for x in module.parameters())


def tokenizer(net, num_codes=64, dim=512, mesh=None):
    quantizer = {"name": "simvq", "num_codes": num_codes, "dim": dim, "init": "normal", "revive_every": 0}
    asked = {"net": {"name": "wave"}, "quantizer": quantizer, "latent_norm": "none"}
    parsed = configuration.parse(TokenizerConfig, asked)
    return Tokenizer.from_config(dataclasses.replace(parsed, net=net), mesh)


@pytest.mark.slow
def test_the_default_has_the_published_counts():
    with torch.device("meta"):
        whole = tokenizer(WaveConfig(), mesh=Mesh(device="meta"))
    model, backbone = whole.encoder.model, whole.decoder.backbone
    layers = [288, 3232, 8320, 12608, 65792, 49792, 328192, 197888, 2098176, 4202496, 1836032]
    assert [count(layer) for layer in model if count(layer)] == layers
    assert len(whole.encoder.state_dict()) == 62
    assert [count(part) for part in backbone.pos_net] == [3543552, 3543552, 2363904, 3543552, 3543552, 1536]
    assert {count(block) for block in backbone.convnext} == {3_550_464}
    assert count(backbone.embed) == 2_753_280
    assert (count(backbone), len(backbone.state_dict())) == (61_901_568, 158)
    assert count(whole.decoder.head) == 985_858
    trained = [x for x in whole.parameters() if x.requires_grad]
    assert (sum(x.numel() for x in trained), len(trained)) == (71_952_898, 225 - 1)  # all but the frozen rows
    assert whole.last_weight.shape == (1282, 768)
    recon, quantized = whole(torch.empty(2, 1, 24_000, device="meta"))
    assert (recon.shape, quantized.z.shape) == ((2, 1, 24_000), (150, 512))


@pytest.mark.parametrize("causal", [True, False])
def test_any_length_has_a_frame_for_each_begun_hop(causal):
    small = dataclasses.replace(WaveConfig(), channels=2, width=8, hidden=8, num_blocks=1, num_groups=2, causal=causal)
    parts = nets.build(small, 3)
    for length, frames in ((1, 1), (320, 1), (321, 2), (641, 3), (23_999, 75), (24_000, 75)):
        latents = parts.encoder(torch.randn(1, 1, length))
        assert latents.shape == (1, 3, frames)
        assert parts.decoder(latents).shape == (1, 1, 320 * frames)


def test_a_whole_utterance_comes_back_at_its_length_and_its_ids_at_whole_frames():
    model = tokenizer(SMALL, dim=6).eval()
    for length in (1, 40, 43):
        waves = torch.randn(2, 1, length)
        recon, quantized = model(waves)
        ids = model.encode(waves)
        assert recon.shape == waves.shape
        assert ids.shape == (2, math.ceil(length / 8))
        assert torch.equal(ids.flatten(), quantized.ids)
        assert torch.equal(model.decode(ids)[..., :length], recon)
        assert torch.equal(ids[:1], model.encode(waves[:1]))  # whatever else is in the batch


def test_a_causal_frame_sees_no_later_samples_but_for_the_mirrored_beginning():
    causal = Encoder(dataclasses.replace(WaveConfig(), channels=2, lstm_layers=0), 3)
    assert [last_seen(causal, frame) for frame in range(5)] == [2239, 1919, 1599, 1279, 1599]
    both = Encoder(dataclasses.replace(WaveConfig(), channels=2, lstm_layers=0, causal=False), 3)
    assert last_seen(both, 40) == 40 * 320 + 319 + 1195


def last_seen(encoder, frame):
    wave = torch.randn(1, 1, 20_000, requires_grad=True)
    encoder(wave)[0, :, frame].sum().backward()
    return int(wave.grad.nonzero()[-1, -1])


def test_the_inverse_gives_back_what_was_analysed_between_zeros():
    hop, wave = 320, torch.randn(2, 9 * 320, dtype=torch.float64)
    padded = torch.nn.functional.pad(wave, (480, 480))
    window = torch.hann_window(1280, dtype=torch.float64)
    spectra = torch.stft(padded, 1280, hop, window=window, center=False, return_complex=True)
    again = inverse_stft(spectra.transpose(1, 2).to(torch.complex64), hop)
    torch.testing.assert_close(again.double(), wave, rtol=0, atol=1e-6)


def test_closed_cases_of_the_head():
    head = Head(WaveConfig())
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        frames = torch.randn(1, 5, 768)
        assert head(frames).abs().max() < 1e-7  # an impulse where the window is 0
        head.out.bias[641:] = math.pi * torch.arange(641)
        wave = head(frames)[0]
    places = 160 + 320 * torch.arange(5)
    expected = torch.zeros(1600)
    expected[places] = 2 / 3
    expected[places[[0, -1]]] = 0.8
    torch.testing.assert_close(wave, expected, rtol=0, atol=1e-4)
    torch.manual_seed(0)
    published = Head(WaveConfig())
    torch.manual_seed(0)
    centred = Head(WaveConfig(centred_phases=True))
    assert torch.equal(centred.out.bias[641:], head.out.bias[641:])
    assert torch.equal(centred.out.bias[:641], published.out.bias[:641])
    assert torch.equal(centred.out.weight, published.out.weight)


def test_frames_that_are_alike_are_steady_tones_where_phases_turn_and_pulses_where_not():
    config, spectra = dataclasses.replace(SMALL, turning_phases=True), torch.zeros(1, 12, 17, dtype=torch.complex64)
    spectra[..., 3], spectra[..., 6] = 16, 8j
    places = 2 * math.pi * torch.arange(96) / 32
    places = places + 2 * math.pi * 12 / 32  # a window begins 12 samples before its frame
    tones = ((3 * places).cos() - (6 * places).sin() / 2) * 2 / 1.5  # the sum of windows over that of their squares
    torch.testing.assert_close(inverse_stft(turned(spectra), 8)[0, 16:-16], tones[16:-16], rtol=0, atol=1e-5)
    same = inverse_stft(spectra, 8)[0, 16:-16]
    torch.testing.assert_close(same[8:], same[:-8])  # overtones of the frames' rate alone
    torch.manual_seed(0)
    turning, still = Decoder(config, 3), Decoder(SMALL, 3)
    still.load_state_dict(turning.state_dict())
    latents = torch.randn(1, 3, 6)
    first, second = turning.eval()(latents), still.eval()(latents)
    assert (first - second).abs().max() > 1e-4


def test_magnitudes_end_at_100_and_their_gradients_are_finite():
    numbers = torch.tensor([[[-200.0, 4.0, 5.0, 1e5, 0.0, 0.0, 0.0, 0.0]]], requires_grad=True)
    size = spectrum(numbers)
    torch.testing.assert_close(size.real[0, 0], torch.tensor([0.0, math.exp(4), 100.0, 100.0]))
    size.real.sum().backward()
    torch.testing.assert_close(numbers.grad[0, 0, :4], torch.tensor([0.0, math.exp(4), 0.0, 0.0]))


def test_the_spectrum_is_float32_under_autocast():
    decoder, latents = Decoder(SMALL, 3), torch.randn(1, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert decoder.backbone(latents).dtype == torch.float32  # of the last layer norm
        assert decoder.head.out(torch.randn(1, 4, 8)).dtype == torch.bfloat16
        assert decoder(latents).dtype == torch.float32


@pytest.mark.parametrize("conv", [torch.nn.Conv1d(2, 3, 5, stride=2), torch.nn.Conv2d(2, 3, (5, 1), padding=(2, 0))])
def test_a_normed_convolution_begins_as_the_plain_one_and_knows_no_scale_of_v(conv):
    normed = NormedConv(conv)
    x = torch.randn(1, 2, *([7] * (conv.weight.ndim - 2)))
    torch.testing.assert_close(normed(x), conv(x))
    assert normed.weight_g.shape == (3, *(1 for _ in x.shape[1:]))
    before = normed(x)
    with torch.no_grad():
        normed.weight_v *= 7.0
        torch.testing.assert_close(normed(x), before)
        normed.weight_g *= 2.0
        normed.bias *= 2.0
        torch.testing.assert_close(normed(x), 2 * before)


def test_gains_do_not_decay():
    conv = NormedConv(torch.nn.Conv1d(2, 3, 5))
    decays = {
        p: group["weight_decay"] for group in groups(conv, OptimConfig(weight_decay=0.1)) for p in group["params"]
    }
    assert [decays[p] for p in (conv.weight_v, conv.weight_g, conv.bias)] == [0.1, 0.0, 0.0]


@pytest.mark.slow
def test_operations_are_counted_with_those_of_the_lstm():
    """On the meta device, of a second: each convolution of the encoder at its own rate, the rest 75 times."""

    def product(out, into, times, kernel=1):
        return 2 * out * into * kernel * times

    length, channels, expected = 24_000, 32, product(32, 1, 24_000, 7)
    for ratio in (2, 4, 5, 8):
        expected += product(channels // 2, channels, length, 3) + product(channels, channels // 2 + channels, length)
        length, channels = length // ratio, 2 * channels
        expected += product(channels, channels // 2, length, 2 * ratio)
    expected += 2 * product(4 * 512, 2 * 512, 75) + product(512, 512, 75, 7)
    expected += product(768, 512, 75, 7) + 8 * product(768, 768, 75, 3) + 4 * product(768, 768, 75)
    expected += 2 * product(75, 768, 75) + 12 * (product(768, 1, 75, 7) + 2 * product(768, 2304, 75))
    expected += product(1282, 768, 75)
    counted = network(WaveConfig(), (24_000,), 512)
    assert counted.forward == expected == 12_620_851_200
    assert (counted.tokens, counted.parameters) == (75, 71_952_898 - 512 * 512 - 512)


@pytest.mark.parametrize(
    ("change", "key", "says"),
    [
        ({"ratios": (3, 5)}, "ratios", "an even hop"),
        ({"num_groups": 3}, "num_groups", "3 groups do not divide the decoder's width of 8"),
        ({"decoder_kernel": 4}, "decoder_kernel", "odd"),
        ({"dropout": 1.0}, "dropout", r"lies in [0, 1)"),
        ({"lstm_layers": -1}, "lstm_layers", "0 or more"),
        ({"channels": 0}, "channels", "at least 1"),
    ],
)
def test_problems_of_a_config(change, key, says):
    assert list(SMALL.problems()) == []
    assert says in dict(dataclasses.replace(SMALL, **change).problems())[key]


def test_an_encoder_that_begins_with_a_gain_keeps_what_differs_between_frames():
    waves = torch.sin(torch.linspace(0, 900, 6400) ** 1.2)[None, None] * torch.linspace(0, 1, 6400)
    spread = {}
    for gain in (None, 1.8):
        torch.manual_seed(1)
        config = WaveConfig(channels=4, lstm_layers=0, encoder_gain=gain)
        z_BDn = Encoder(config, 16)(waves)
        spread[gain] = ((z_BDn - z_BDn.mean(-1, keepdim=True)).norm() / z_BDn.norm()).item()
    assert spread[None] < 0.05
    assert spread[1.8] > 0.3
    assert [key for key, _ in WaveConfig(encoder_gain=0.0).problems()] == ["encoder_gain"]
