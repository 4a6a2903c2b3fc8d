"""FSQ: every number that its paper and its known mistakes give, and arithmetic on ids that floats cannot do."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from whole import close, normal

from vqscale import quantizers
from vqscale.config import ConfigError
from vqscale.quantizers.config.implicit import LEVELS
from vqscale.quantizers.fsq import mean_norm

CONVENTIONS = [{"eps": eps, "shift": shift} for eps in (1e-3, -1e-3) for shift in ("atanh", "tan")]


def _fsq(levels, **settings):
    return quantizers.build({"name": "fsq", "levels": levels, **settings})


def _dense(x, levels, eps=1e-3, shift="atanh"):
    """(code before rounding, code, id) of one token, in Python's own numbers."""
    before, code, number, basis = [], [], 0, 1
    for value, n in zip(x, levels, strict=True):
        h, o, w = (n - 1) * (1 - eps) / 2, 0.5 * (n % 2 == 0), n // 2
        f = h * math.tanh(value + getattr(math, shift)(o / h)) - o
        before.append(f / w)
        code.append(round(f) / w)
        number, basis = number + (round(f) + w) * basis, basis * n
    return before, code, number


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_known_token(convention):
    out = _fsq([3, 5, 4], **convention)(torch.tensor([[0.25, 0.6, -7.0]]))
    assert out.z.tolist() == [[0.0, 0.5, -1.0]]
    assert out.ids.tolist() == [10]


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_values_ids_and_gradients_are_those_of_the_formula(convention):
    levels = [8, 5, 3, 4, 12]
    x = 1.5 * normal(200, 5, seed=1)
    quantizer = _fsq(levels, **convention).double()
    out = quantizer(x.requires_grad_())
    dense = [_dense(token, levels, **convention) for token in x.tolist()]
    close(out.z.detach(), torch.tensor([code for _, code, _ in dense], dtype=torch.float64))
    assert out.ids.tolist() == [number for _, _, number in dense]
    g = normal(200, 5, seed=2)
    (out.z * g).sum().backward()
    step = 1e-6
    for i, token in enumerate(x.tolist()[:20]):
        for channel in range(5):
            side = [[v + step * sign * (c == channel) for c, v in enumerate(token)] for sign in (1, -1)]
            up, down = (_dense(t, levels, **convention)[0][channel] for t in side)
            assert float(x.grad[i, channel] / g[i, channel]) == pytest.approx((up - down) / (2 * step), abs=1e-8)


def test_the_first_id_is_the_least_code_and_the_last_the_greatest():
    for levels in [*LEVELS.values(), (3, 3, 3), (1001,)]:
        quantizer = _fsq(list(levels), eps=1e-4)
        first, last = quantizer.decode(torch.tensor([0, quantizer.num_codes - 1])).tolist()
        assert first == [-1.0] * len(levels)
        assert last == pytest.approx([1.0 if n % 2 else (n // 2 - 1) / (n // 2) for n in levels])
    assert _fsq([8, 5, 5, 5]).decode(torch.tensor([999])).tolist() == [[0.75, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize("name", LEVELS)
def test_every_id_of_every_recommended_list_goes_there_and_back(name):
    quantizer, levels = _fsq(name), LEVELS[name]
    assert (quantizer.dim, quantizer.num_codes) == (len(levels), math.prod(levels))
    # the first channel runs fastest
    digits = torch.tensor([d[::-1] for d in itertools.product(*(range(n) for n in levels[::-1]))])
    width = torch.tensor(levels) // 2
    codes = quantizer.decode(torch.arange(quantizer.num_codes))
    assert torch.equal(codes, (digits - width) / width)
    # a token that is rounded to each code: nine tenths of the way from the middle
    half, offset = (torch.tensor(levels) - 1) * 0.999 / 2, torch.tensor([0.5 * (n % 2 == 0) for n in levels])
    x = torch.atanh((0.9 * (digits - width) + offset) / half) - torch.atanh(offset / half)
    assert torch.equal(quantizer.encode(x), torch.arange(quantizer.num_codes))
    out = quantizer(x)
    assert torch.equal(out.ids, torch.arange(quantizer.num_codes))
    assert torch.equal(out.z, codes)


def test_the_sizes_of_the_recommended_lists():
    sizes = {name: math.prod(levels) for name, levels in LEVELS.items()}
    assert list(sizes.values()) == [15, 64, 240, 512, 1000, 1920, 4375, 15360, 64000]


@pytest.mark.parametrize(("levels", "kept"), [([8, 5, 5, 5], 0.875), ([8, 8], 0.5), ([5, 3], 1.0)])
def test_codes_are_not_to_be_quantized_again(levels, kept):
    quantizer = _fsq(levels)
    codes = quantizer.decode(torch.arange(quantizer.num_codes))
    assert float((quantizer(codes).z == codes).float().mean()) == kept


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_level_is_reached_and_none_beyond(convention):
    for n in [*range(3, 40), 256]:
        quantizer = _fsq([n], **convention)
        ends = torch.tensor([[-1e30], [-50.0], [50.0], [1e30]])
        assert quantizer.encode(ends).tolist() == [0, 0, n - 1, n - 1]
        x = torch.linspace(-9, 9, 40_001)[:, None]
        ids = quantizer.encode(x)
        assert torch.equal(torch.unique(ids), torch.arange(n))
        assert bool((ids.diff() >= 0).all())
        assert float(quantizer.decode(quantizer.encode(torch.zeros(1, 1)))) == 0.0


def _middle(level, **settings):
    """The value before rounding at zero, and its slope, in digits."""
    quantizer = _fsq([level], **settings).double()
    x = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    y, _ = quantizer._round(x)
    y.sum().backward()
    return float(y.detach()) * (level // 2), float(x.grad)


def test_the_middle_and_its_slope():
    for level in range(3, 20):
        assert _middle(level)[0] == pytest.approx(0, abs=1e-15)
        assert _middle(level, eps=-1e-3)[0] == pytest.approx(0, abs=1e-15)
    for level, moved in ((4, -4.3e-4), (6, -5.4e-5), (8, -1.4e-5)):
        assert _middle(level, shift="tan")[0] == pytest.approx(moved, rel=0.05)
    for eps, level, slope in ((1e-3, 5, 0.999), (1e-3, 8, 0.8562), (-1e-3, 5, 1.001), (-1e-3, 8, 0.8580)):
        assert _middle(level, eps=eps)[1] == pytest.approx(slope, abs=5e-5)


@pytest.mark.parametrize(("eps", "low", "high"), [(1e-3, -1.430, 1.142), (-1e-3, -1.423, 1.136)])
def test_the_outermost_thresholds_tell_the_sign_of_eps(eps, low, high):
    quantizer, near = _fsq([8], eps=eps), 0.002
    ids = quantizer.encode(torch.tensor([[low - near], [low + near], [high - near], [high + near]]))
    assert ids.tolist() == [0, 1, 6, 7]


@pytest.mark.parametrize(
    "levels", [[8] * 8, [5] * 11, [5] * 12, [5] * 13, [16] * 7, [1000] * 6, [4] * 31, [7, 8] * 10, [3] * 39]
)
def test_ids_are_exact_beyond_what_floats_hold(levels):
    assert math.prod(levels) <= 2**62
    quantizer, draw = _fsq(levels, eps=1e-5), random.Random(0)
    tokens = [[draw.randrange(n) for n in levels] for _ in range(200)]
    tokens += [[0] * len(levels), [n - 1 for n in levels]]
    ids = [sum(d * math.prod(levels[:i]) for i, d in enumerate(digits)) for digits in tokens]
    assert max(ids) == math.prod(levels) - 1
    codes = quantizer.decode(torch.tensor(ids))
    width = torch.tensor(levels) // 2
    assert torch.equal(codes, (torch.tensor(tokens) - width) / width)
    half, offset = (torch.tensor(levels) - 1) * (1 - 1e-5) / 2, 0.5 * (torch.tensor(levels) % 2 == 0)
    f = torch.tensor(tokens) - width
    x = torch.atanh((f.double() - 0.2 * f.sign() + offset) / half) - torch.atanh(offset.double() / half)
    assert quantizer.encode(x).tolist() == ids
    assert quantizer(x).ids.tolist() == ids


def test_no_codebook_is_held():
    quantizer = _fsq([4] * 31)
    assert quantizer.num_codes == 2**62
    assert list(quantizer.parameters()) == []
    whitening = {"whitening.mean_D", "whitening.covariance_DD", "whitening.steps"}
    assert set(quantizer.state_dict()) == whitening
    assert sum(buffer.numel() for buffer in quantizer.buffers()) < 100 + 31 * 31 + 31 + 1


def test_half_precision_does_not_cost_codes():
    x = normal(20_000, 4, seed=5).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = _fsq([8, 5, 5, 5])(x.bfloat16())
        wide = _fsq([301, 8, 8, 6])(x.bfloat16())
    assert len(torch.unique(out.ids)) == 1000
    assert out.z.dtype == torch.float32
    assert torch.equal(wide.ids, _fsq([301, 8, 8, 6])(x.bfloat16().float()).ids)
    assert len(torch.unique(wide.ids % 301)) > 256


def test_normal_tokens_use_every_code():
    out = _fsq([8, 5, 5, 5])(normal(20_000, 4, seed=6).float())
    assert float(out.stats["usage"]) == 1.0
    assert float(out.stats["dead"]) == 0.0


def test_nothing_is_learned():
    quantizer = _fsq("fsq-2^8")
    out = quantizer(normal(10, 3, seed=1).float())
    assert out.losses == {}
    quantizer.begin()
    assert quantizer.update() == []


@pytest.mark.parametrize("levels", [[2], [2, 2, 2], [5, 4, 8], [3, 2, 16]])
def test_the_symmetric_form_is_evenly_spaced_and_antisymmetric(levels):
    quantizer = _fsq(levels, symmetric=True).double()
    x = 1.5 * normal(500, len(levels), seed=3)
    out, other = quantizer(x.requires_grad_()), quantizer(-x)
    n = torch.tensor(levels)
    digits = torch.floor((n - 1) * (torch.tanh(x) + 1) / 2 + 0.5).detach()
    close(out.z.detach(), 2 * digits / (n - 1) - 1)
    close(out.z.detach(), -other.z.detach())
    basis = torch.tensor([math.prod(levels[:i]) for i in range(len(levels))])
    assert torch.equal(out.ids, (digits.long() * basis).sum(1))
    assert torch.equal(out.ids + other.ids, torch.full_like(out.ids, quantizer.num_codes - 1))
    out.z.sum().backward()
    close(x.grad, 1 - torch.tanh(x.detach()) ** 2)
    for i, number in enumerate(levels):
        every = torch.unique(quantizer.decode(torch.arange(quantizer.num_codes))[:, i])
        close(every, torch.linspace(-1, 1, number, dtype=torch.float64))
    ends = torch.tensor([[-1e30], [1e30]], dtype=torch.float64).expand(2, len(levels))
    assert quantizer.encode(ends).tolist() == [0, quantizer.num_codes - 1]


def test_the_default_form_is_not_antisymmetric():
    # what makes the test above able to fail
    x = normal(2000, 4, seed=1).float()
    quantizer = _fsq([8, 5, 5, 5])
    assert 0.85 < float((quantizer(x).z == -quantizer(-x).z).float().mean()) < 0.95


def test_a_token_that_is_not_a_number_stays_one_and_has_an_id():
    for settings in ({}, {"symmetric": True}):
        quantizer = _fsq([4, 3], **settings)
        out = quantizer(torch.tensor([[math.nan, 0.1], [math.inf, -math.inf]]))
        assert math.isnan(float(out.z[0, 0]))
        assert torch.isfinite(out.z[1]).all()
        assert 0 <= int(out.ids.min()) <= int(out.ids.max()) < 12
        assert out.ids[1] == 3


@pytest.mark.parametrize("levels", [(3,), (8, 5, 5, 5), (4, 4, 4, 4, 4), (2, 3, 9)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_mean_length_of_all_codes_needs_no_list_of_them(levels, symmetric):
    codes = itertools.product(
        *[[(k - r) / r for k in range(n)] for n in levels for r in [(n - 1) / 2 if symmetric else n // 2]]
    )
    assert mean_norm(levels, symmetric) == pytest.approx(
        sum(math.hypot(*code) for code in codes) / math.prod(levels), rel=1e-10
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"levels": [5, 1]}, ["levels", "at least 3 levels", "there are 1 in [5, 1]", "write more"]),
        ({"levels": [0]}, ["there are 0 in [0]"]),
        ({"levels": []}, ["the list is empty"]),
        ({"levels": [8, 2]}, ["2 levels in [8, 2]", "symmetric: true"]),
        ({"levels": [8, 2], "eps": -1e-3}, ["2 levels in [8, 2]", "symmetric: true"]),
        ({"levels": "fsq-2^13"}, ["fsq-2^13 is no list", "fsq-2^12 = [7, 5, 5, 5, 5]", "fsq-2^4 = [5, 3]"]),
        ({"levels": [5] * 27}, ["2^62.7 codes", "ids end at 2^62"]),
        ({"levels": [5, 1002]}, ["eps 0.001", "1002 levels", "less than 1 / 1001"]),
        ({"levels": [5, 5], "eps": -0.3}, ["eps -0.3", "less than 1 / 4"]),
        ({"shift": "sinh"}, ["atanh", "tan", "sinh"]),
        ({"num_codes": 300}, ["num_codes", "300", "fsq-2^8"]),
        ({"num_codes": 256, "levels": "fsq-2^8"}, ["num_codes 256", "keep one of them"]),
    ],
)
def test_a_wrong_config_says_the_rule_the_place_and_the_way_out(settings, words):
    with pytest.raises(ConfigError) as caught:
        quantizers.build({"name": "fsq", **settings})
    for word in words:
        assert word in str(caught.value)
