"""The discriminators of waves: published sizes, and all they answer against a twin written from the description."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from vqscale import config as configuration
from vqscale.nets import discriminators
from vqscale.nets.waves.config_discriminator import (
    NormalisedConfig,
    PeriodsConfig,
    ResolutionsConfig,
    WaveDiscriminatorConfig,
    bands,
)
from vqscale.nets.waves.discriminator import normalised
from vqscale.train import adversarial_losses as losses
from vqscale.train.config.losses import AdversarialConfig

SMALL = WaveDiscriminatorConfig(
    periods=PeriodsConfig(periods=(2, 3), channels=(2, 3, 4)),
    resolutions=ResolutionsConfig(windows=(32, 16), channels=3),
    normalised=NormalisedConfig(periods=(2, 5), period_channels=(2, 3), windows=(64, 32), channels=2),
)
LENGTH = 90  # which 2, 3 and 5 divide


def count(module):
    return sum(x.numel() for x in module.parameters())


@pytest.mark.slow
def test_the_default_has_the_published_sizes():
    with torch.device("meta"):
        net = discriminators.build(WaveDiscriminatorConfig())
        answers = net(torch.empty(1, 1, 24_000))
    assert [count(net.periods), count(net.resolutions), count(net.normalised)] == [41_105_770, 600_198, 42_519_760]
    assert count(net) == 84_225_728
    periods, magnitudes, spectra = answers[:5], answers[5:8], answers[8:]
    assert [x.values.numel() for x in periods] == [298, 297, 300, 301, 297]
    assert [x.values.numel() for x in magnitudes] == [204, 198, 216]
    assert [len(x.features) for x in periods + magnitudes] == [5] * 5 + [6] * 3
    assert [1 + len(x.features) for x in spectra] == [6] * 5 + [26] * 3  # with the answer, which is not matched
    assert [band.stop for band in bands(2048, NormalisedConfig().band_ends)] == [102, 256, 512, 768, 1025]


def conv(s, name, x, stride=(1, 1)):
    v = s[f"{name}.weight_v"]
    weight = s[f"{name}.weight_g"] * v / v.square().sum((1, 2, 3), keepdim=True).sqrt()
    return F.conv2d(x, weight, s[f"{name}.bias"], stride, [side // 2 for side in v.shape[2:]])


def stack(s, name, x, strides):
    maps = []
    for i, stride in enumerate(strides):
        h = conv(s, f"{name}.convs.{i}", x, stride)
        x = torch.where(h > 0, h, 0.1 * h)
        maps.append(x)
    return maps


def period(s, name, wave, p, whole):
    """Maps and answer; `whole`: a wave that p divides is lengthened by p too."""
    missing = (p - wave.shape[1] % p) % p or (p if whole else 0)
    rows = torch.cat([wave, wave[:, -1 - missing : -1].flip(1)], 1).view(len(wave), 1, -1, p)
    strides = [(3, 1)] * (len([n for n in s if n.startswith(f"{name}.stack") and n.endswith("bias")]) - 1) + [(1, 1)]
    maps = stack(s, f"{name}.stack", rows, strides)
    return maps, conv(s, f"{name}.post", maps[-1])


def transformed(wave, window):
    """(B, frequencies, frames) by the definition of the transform."""
    half = window // 2
    mirrored = torch.cat([wave[:, 1 : half + 1].flip(1), wave, wave[:, -half - 1 : -1].flip(1)], 1)
    pieces = mirrored.unfold(1, window, window // 4)
    angles = torch.arange(half + 1)[:, None] * torch.arange(window) * (2 * torch.pi / window)
    return torch.einsum("bnt,ft->bfn", pieces.to(torch.complex64), torch.exp(-1j * angles.to(torch.complex64)))


def twin(s, waves):
    """[(maps to match, answer)] of SMALL."""
    wave, found = waves[:, 0], []
    for i, p in enumerate((2, 3)):
        maps, answer = period(s, f"periods.parts.{i}", wave, p, whole=False)
        found.append(([*maps[1:], answer], answer))
    for i, window in enumerate((32, 16)):
        name, size = f"resolutions.parts.{i}", transformed(wave, window).abs()[:, None]
        maps = stack(s, f"{name}.stack", size, [(2, 2), (2, 1), (2, 2), (2, 1), (2, 2)])
        answer = conv(s, f"{name}.post", maps[-1])
        found.append(([*maps, answer], answer))
    level = wave - wave.mean(1, keepdim=True)
    level = 0.8 * level / (level.abs().max(1, keepdim=True).values + 1e-3)
    for i, p in enumerate((2, 5)):
        found.append(period(s, f"normalised.parts.{i}", level, p, whole=True))
    for i, window in enumerate((64, 32), start=2):
        name, x = f"normalised.parts.{i}", transformed(level, window).transpose(1, 2)
        both, edges = (
            torch.stack([x.real, x.imag], 1),
            [0, *(int(b * (window // 2 + 1)) for b in (0.1, 0.25, 0.5, 0.75, 1))],
        )
        parts = [
            stack(s, f"{name}.stacks.{j}", both[..., edges[j] : edges[j + 1]], [(1, 1)] + [(1, 2)] * 3 + [(1, 1)])
            for j in range(5)
        ]
        found.append(
            ([x for maps in parts for x in maps], conv(s, f"{name}.post", torch.cat([maps[-1] for maps in parts], -1)))
        )
    return found


@pytest.fixture
def net():
    torch.manual_seed(3)
    return discriminators.build(SMALL)


@pytest.mark.parametrize("length", [LENGTH, LENGTH + 1])
def test_answers_and_maps_are_those_of_the_twin(net, length):
    waves = torch.randn(2, 1, length)
    found, expected = net(waves), twin(net.state_dict(), waves)
    assert len(found) == SMALL.num_answers == len(expected)
    for answer, (maps, values) in zip(found, expected, strict=True):
        torch.testing.assert_close(answer.values, values, rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(answer.features, maps, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_losses_are_the_published_sums(net):
    """Means over the two of each kind that hinge, sums over the four of squares, with their weight 4."""
    config = dataclasses.replace(SMALL, normalised=dataclasses.replace(SMALL.normalised, weight=4.0))
    objectives = AdversarialConfig(net=config, feature_weight=1.0).objectives
    x, y = torch.randn(3, 1, LENGTH), torch.randn(3, 1, LENGTH).requires_grad_()
    real, fake = net(x), net(y)
    its, matched, learned = 0.0, 0.0, {"hinge": 0.0, "least_squares": 0.0}
    for i, ((f, d_x), (g, d_y)) in enumerate(zip(twin(net.state_dict(), x), twin(net.state_dict(), y), strict=True)):
        if i < 4:
            learned["hinge"] += ((1 - d_x).clamp(min=0).mean() + (1 + d_y).clamp(min=0).mean()) / 2
            its += (1 - d_y).clamp(min=0).mean() / 2
        else:
            learned["least_squares"] += (d_y**2).mean() + ((1 - d_x) ** 2).mean()
            its += ((1 - d_y) ** 2).mean()
        matched += sum((a - b).abs().mean() for a, b in zip(f, g, strict=True)) / (2 if i < 4 else 1)
    found = losses.discriminator(real, fake, objectives)
    assert found.keys() == learned.keys()
    for kind, value in learned.items():
        torch.testing.assert_close(found[kind], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.generator(fake, objectives), its, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.features(real, fake, objectives), matched, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_silent_reconstruction_has_finite_gradients(net, precision):
    objectives = AdversarialConfig(net=SMALL).objectives
    silent = torch.zeros(2, 1, LENGTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        fake, real = net(silent), net(torch.randn(2, 1, LENGTH))
    loss = losses.generator(fake, objectives) + losses.features(real, fake, objectives)
    (gradient,) = torch.autograd.grad(loss, silent, retain_graph=True)
    assert gradient.isfinite().all()
    sum(losses.discriminator(real, fake, objectives).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_the_floor_bounds_the_gradient_of_the_normalisation():
    def steepest(size, floor):
        waves = (size * torch.randn(1, 1, 1000)).requires_grad_()
        upstream = torch.randn(1, 1, 1000)
        normalised(waves, floor).backward(upstream / upstream.norm())
        return waves.grad.norm().item()

    for size in (0.0, 1e-7, 1e-4, 0.1):
        assert steepest(size, 1e-3) < 2 * 0.8 / 1e-3
    assert steepest(0.0, 1e-9) > 1e6  # as published
    assert normalised(3.0 + torch.randn(2, 1, 50), 1e-9).abs().amax((1, 2)).tolist() == pytest.approx([0.8, 0.8])


def test_what_it_cannot_be_is_refused():
    def problems(**change):
        return str(dict(AdversarialConfig(**change).problems()))

    assert "shows no maps" in problems(feature_weight=1.0)
    assert "say themselves what they are trained for" in problems(net=SMALL, discriminator="least_squares")
    assert problems(net=SMALL, feature_weight=1.0, lecam_weight=0.0) == "{}"
    for part, change, says in (
        ("periods", {"periods": []}, "takes numbers of at least 1"),
        ("resolutions", {"windows": [30]}, "multiples of 4"),
        ("normalised", {"band_ends": [0.5, 0.25]}, "growing shares"),
        ("normalised", {"windows": [16], "band_ends": [0.01]}, "without a frequency"),
        ("normalised", {"peak_floor": 0}, "silence is divided"),
        ("normalised", {"weight": 0}, "null for this part"),
    ):
        with pytest.raises(configuration.ConfigError, match=says):
            configuration.parse(AdversarialConfig, {"net": {"name": "wave", part: change}})
    nothing = {"name": "wave", "periods": None, "resolutions": None, "normalised": None}
    with pytest.raises(configuration.ConfigError, match="all parts of the discriminator are null"):
        configuration.parse(AdversarialConfig, {"net": nothing})
    least = SMALL.least_side
    assert len(discriminators.build(SMALL)(torch.zeros(1, 1, least))) == SMALL.num_answers
