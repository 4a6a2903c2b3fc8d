"""The encoder of waves that begins with spectra: what it is given, what a frame sees, whole tokenizers of it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from vqscale import config as configuration
from vqscale import nets
from vqscale.config.load import ConfigError
from vqscale.nets.waves.config import SpectraConfig, WaveConfig
from vqscale.nets.waves.spectral import Encoder, log_spectra
from vqscale.plan.count import network
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.model import Tokenizer

SEEN = SpectraConfig(window=40, width=12, hidden=16, num_blocks=2, kernel=3)
SMALL = WaveConfig(
    ratios=(10, 2), kernel=3, lstm_layers=0, spectra=SEEN, width=16, hidden=16, num_blocks=1, num_groups=4
)


def encoder(**changes):
    config = dataclasses.replace(SMALL, **changes)
    return Encoder(config, config.spectra, 5)


def test_levels_are_those_of_each_window_written_out():
    wave, window, hop, floor = torch.randn(2, 1, 103), 12, 5, 1e-3
    for causal, left in ((True, 7), (False, 4)):
        levels = log_spectra(wave, window, hop, floor, causal).numpy()
        assert levels.shape == (2, 7, 21)
        padded = np.pad(wave[1, 0].double().numpy(), (left, 50), mode="reflect")
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
        for frame in (0, 1, 11, 20):
            sizes = np.abs(np.fft.rfft(padded[hop * frame :][:window] * hann)) * 2 / hann.sum()
            expected = 1 - 2 * np.log(np.maximum(sizes, floor)) / np.log(floor)
            np.testing.assert_allclose(levels[1, :, frame], expected, atol=1e-5)


def test_silence_is_minus_one_and_a_full_sine_one():
    assert torch.equal(log_spectra(torch.zeros(1, 2, 50), 16, 8, 1e-5, False), torch.full((1, 18, 7), -1.0))
    sine = torch.sin(2 * math.pi * 4 / 16 * torch.arange(160))[None, None]
    levels = log_spectra(sine, 16, 8, 1e-5, False)[0, :, 5]
    assert levels[4].item() == pytest.approx(1, abs=1e-5)
    assert (levels[[0, 1, 7, 8]] < 0).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(log_spectra(sine, 16, 8, 1e-5, False)[0, :, 5], levels)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lstm_layers", [0, 1])
def test_any_length_has_a_frame_for_each_begun_hop(causal, lstm_layers):
    parts = nets.build(dataclasses.replace(SMALL, causal=causal, lstm_layers=lstm_layers), 5)
    for length, frames in ((1, 1), (20, 1), (21, 2), (199, 10), (200, 10), (201, 11)):
        latents = parts.encoder(torch.randn(2, 1, length))
        assert latents.shape == (2, 5, frames)
        assert parts.decoder(latents).shape == (2, 1, 20 * frames)


def test_a_causal_frame_sees_no_later_samples_and_the_other_as_many_on_both_sides():
    for lstm_layers in (0, 1):
        first, last = seen(encoder(causal=True, lstm_layers=lstm_layers), 20)
        assert last == 20 * 20 + 19
    first, last = seen(encoder(causal=False), 20)
    assert last > 20 * 20 + 19
    assert abs((20 * 20 + 9.5) - (first + last) / 2) <= 5  # half a step of the transform


def seen(encoder, frame):
    wave = torch.randn(1, 1, 900, requires_grad=True)
    encoder(wave)[0, :, frame].sum().backward()
    places = wave.grad.nonzero()[:, -1]
    return int(places[0]), int(places[-1])


@pytest.mark.parametrize("causal", [True, False])
def test_latents_know_neither_the_batch_nor_how_long_a_wave_goes_on(causal):
    model, waves = encoder(causal=causal), torch.randn(2, 1, 900)
    whole = model(waves)
    torch.testing.assert_close(model(waves[1:]), whole[1:])
    torch.testing.assert_close(model(waves[..., :600])[..., :25], whole[..., :25], rtol=0, atol=1e-6)


def test_gradients_reach_every_weight_and_are_finite_for_silence():
    for wave in (torch.randn(2, 1, 200), torch.zeros(2, 1, 200)):
        model = encoder(encoder_gain=1.5)
        wave.requires_grad_()
        model(wave).square().sum().backward()
        assert wave.grad.isfinite().all()
        for name, parameter in model.named_parameters():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


def test_a_gain_begins_with_larger_weights_and_no_biases():
    torch.manual_seed(1)
    plain = encoder()
    torch.manual_seed(1)
    gained = encoder(encoder_gain=2.0)
    first, second = plain.model[0].conv, gained.model[0].conv
    assert torch.equal(second.weight_g, 2 * first.weight_g)
    assert torch.equal(second.weight_v, first.weight_v)
    assert not second.bias.any()


def parsed(**net):
    spectra = {"window": 40, "width": 12, "hidden": 16, "num_blocks": 1, "kernel": 3}
    asked = {"name": "wave", "ratios": [10, 2], "kernel": 3, "lstm_layers": 0, "causal": False, "spectra": spectra}
    asked |= {"width": 16, "hidden": 16, "num_blocks": 1, "num_groups": 4, "dropout": 0.0, **net}
    quantizer = {"name": "simvq", "num_codes": 31, "dim": 4}
    signal = {"name": "sounds", "sample_rate": 8000, "mel_window": 64, "mel_hop": 32, "num_mels": 8}
    config = {"signal": signal, "net": asked, "quantizer": quantizer, "latent_norm": "none"}
    return configuration.parse(TokenizerConfig, config)


def test_a_tokenizer_of_it_is_saved_and_loaded_to_the_bit(tmp_path):
    tokenizer = Tokenizer.from_config(parsed(), seed=2).eval()
    for length in (7, 160, 333):
        waves = torch.randn(2, 1, length)
        recon, quantized = tokenizer(waves)
        ids = tokenizer.encode(waves)
        assert recon.shape == waves.shape
        assert torch.equal(ids.flatten(), quantized.ids)
        assert torch.equal(tokenizer.decode(ids)[..., :length], recon)
    again = Tokenizer.load(tokenizer.save(tmp_path / "saved"))
    assert again.fingerprint == tokenizer.fingerprint
    assert torch.equal(again.encode(waves), ids)
    assert torch.equal(again.decode(ids), tokenizer.decode(ids))


def test_a_plan_counts_it_without_computing_it():
    config = dataclasses.replace(SMALL, turning_phases=True)
    counted, parts = network(config, (210,), 5), nets.build(config, 5)
    parameters = [p.numel() for part in (parts.encoder, parts.decoder) for p in part.parameters()]
    assert (counted.tokens, counted.parameters) == (11, sum(parameters))
    first = 2 * 12 * 21 * 3 * 21  # the convolution of 21 levels of 21 frames
    assert counted.forward > first


@pytest.mark.parametrize(
    ("change", "key", "says"),
    [
        ({"window": 8}, "spectra.window", "leaves samples unseen"),
        ({"kernel": 4}, "spectra.kernel", "odd"),
        ({"floor": 1.0}, "spectra.floor", r"in (0, 1)"),
        ({"width": 0}, "spectra.width", "at least 1"),
        ({"window_length": 40}, "window_length", "window"),
    ],
)
def test_what_no_encoder_can_be_built_from_is_refused(change, key, says):
    with pytest.raises(ConfigError) as error:
        parsed(spectra={"window": 40, "width": 12, "hidden": 16, "num_blocks": 1, "kernel": 3, **change})
    assert key in str(error.value)
    assert says in str(error.value)
