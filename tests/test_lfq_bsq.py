"""LFQ and BSQ: signs, ids and entropies against all 2^D codes written out, on one process and on several."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from whole import FOUR, GRIDS, close, mine, normal

from vqscale import quantizers
from vqscale.codes import bits
from vqscale.config import ConfigError
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh

TOKENS = 16
# name, D, group_bits, temperature; on 4 ranks 2^1 codes leave ranks without any
CASES = [
    ("lfq", 1, 18, 0.5),
    ("lfq", 5, 18, 1.0),
    ("lfq", 5, 2, 0.3),
    ("lfq", 6, 6, 0.01),
    ("lfq", 7, 3, 2.0),
    ("bsq", 1, 18, 1.0),
    ("bsq", 5, 18, 0.2),
    ("bsq", 6, 4, 0.01),
    ("bsq", 7, 3, 1.0),
]


def _built(name, dim, group_bits=18, temperature=1.0, mesh=None, **settings):
    config = {"name": name, "dim": dim, "group_bits": group_bits, "entropy_temperature": temperature, **settings}
    return quantizers.build(config, mesh)


def _all_codes(dim):
    """Every code in the order of its id, the first channel the slowest, as +-1."""
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=dim)), dtype=torch.float64)


def _entropy(p, dim=-1):
    return -torch.special.xlogy(p, p).sum(dim)


def _enumerated(name, x, group_bits, temperature, commitment=0.3, weight=0.7, diversity=1.5):
    """(z, ids, losses, entropies) with the softmax over all codes, and over all codes of each group of bits."""
    dim = x.shape[1]
    v, scale = (x, 1.0) if name == "lfq" else (x / x.norm(dim=1, keepdim=True), dim**-0.5)
    codes = scale * _all_codes(dim)
    ids = (v.detach() @ codes.t()).argmax(1)
    distance = (v - codes[ids]).square()
    p = torch.softmax(2 * v @ codes.t() / temperature, dim=1)
    spread = 0
    for start in range(0, dim, group_bits):
        part = v[:, start : start + group_bits]
        mean = torch.softmax(2 * part @ (scale * _all_codes(part.shape[1])).t() / temperature, dim=1).mean(0)
        spread = spread + _entropy(mean.clamp_min(torch.finfo(mean.dtype).tiny))
    token = _entropy(p.clamp_min(torch.finfo(p.dtype).tiny)).mean()
    losses = {
        "commitment": commitment * (distance.mean() if name == "lfq" else distance.sum(1).mean()),
        "entropy": weight * (token - diversity * spread),
    }
    return codes[ids] + v - v.detach(), ids, losses, {"token": token, "mean": spread, "largest": p.amax(1).mean()}


SETTINGS = {"commitment_weight": 0.3, "entropy_weight": 0.7, "diversity_weight": 1.5}


def _quantize(data, codes):
    mesh, out = Mesh(data, codes), []
    for name, dim, group_bits, temperature in CASES:
        quantizer = _built(name, dim, group_bits, temperature, mesh, **SETTINGS).double()
        x = mine(_tokens(dim), mesh).requires_grad_()
        answer = quantizer(x)
        (sum(answer.losses.values()) + (answer.z * mine(normal(TOKENS, dim, seed=9), mesh)).sum(1).mean()).backward()
        values = {**{k: v.detach() for k, v in answer.losses.items()}, **answer.stats}
        out.append((answer.z.detach(), answer.ids, x.grad, values))
    return out


def _tokens(dim):
    """Sorted by the first channel: the ranks see different bits, and a mean of their entropies is not the entropy."""
    x = 0.7 * normal(TOKENS, dim, seed=dim)
    return x[x[:, 0].argsort()]


@pytest.mark.parametrize("grid", [*GRIDS, pytest.param((4, 1), marks=FOUR)])
def test_values_and_gradients_are_those_of_all_codes_written_out(ranks, grid):
    world = grid[0] * grid[1]
    results = ranks(world, _quantize, *grid)
    for which, (name, dim, group_bits, temperature) in enumerate(CASES):
        x = _tokens(dim).requires_grad_()
        z, ids, losses, entropies = _enumerated(name, x, group_bits, temperature)
        (sum(losses.values()) + (z * normal(TOKENS, dim, seed=9)).sum(1).mean()).backward()
        got = [result[which] for result in results]
        close(torch.cat([part[0] for part in got]), z.detach())
        assert torch.equal(torch.cat([part[1] for part in got]), ids)
        close(torch.cat([part[2] for part in got]) / world, x.grad)
        values = {key: torch.stack([part[3][key] for part in got]) for key in got[0][3]}
        for key, loss in losses.items():
            close(values[key].mean(), loss.detach())
        close(values["entropy_token"].mean(), entropies["token"].detach())
        close(values["saturation"].mean(), entropies["largest"].detach())
        for value in values["entropy_mean"]:  # the same number on every rank
            close(value, entropies["mean"].detach())


def _apart(codes):
    """Every rank has tokens of a code of its own."""
    mesh = Mesh(1, codes)
    token = torch.tensor([[1.0 if mesh.world.rank >> 1 & 1 else -1.0, 1.0 if mesh.world.rank & 1 else -1.0]])
    return {name: float(_built(name, 2, temperature=0.01, mesh=mesh)(token).stats["entropy_mean"]) for name in _names}


_names = ("lfq", "bsq")


@pytest.mark.dist
def test_the_mean_probability_is_that_of_all_ranks(ranks):
    # each rank alone has entropy 0
    for result in ranks(4, _apart, 4):
        for name in _names:
            assert result[name] == pytest.approx(math.log(4), rel=1e-6)


def test_groups_of_bits_bound_the_entropy_and_are_exact_when_independent_or_whole():
    x, mesh = normal(50, 6, seed=1), Mesh()
    whole = bits.entropy_of_mean(x, 6, mesh)
    sizes = [float(bits.entropy_of_mean(x, group, mesh)) for group in (1, 2, 3, 6, 7, 18)]
    assert sizes[0] > sizes[1] > sizes[3]
    assert sizes[0] > sizes[2] > sizes[3]
    assert sizes[3:] == [float(whole)] * 3
    same = x[:1].expand(50, 6)
    for group in (1, 2, 4, 6):
        close(bits.entropy_of_mean(same, group, mesh), bits.entropy(same).mean())
    # all 16 signs of 4 bits: uniform, so independent
    every = 30 * _all_codes(4)
    for group in (1, 3, 4):
        close(bits.entropy_of_mean(every, group, mesh), torch.tensor(4 * math.log(2), dtype=torch.float64))


@pytest.mark.parametrize("group_bits", [3, 7])
def test_tokens_come_in_blocks(group_bits, monkeypatch):
    g, answers = normal(1, seed=3), []
    for block in (2**22, 16):
        monkeypatch.setattr(bits, "BLOCK", block)
        x = normal(37, 7, seed=2).requires_grad_()
        value = bits.entropy_of_mean(x, group_bits, Mesh())
        (value * g).backward()
        answers.append((value.detach(), x.grad))
    close(answers[0][0], answers[1][0])
    close(answers[0][1], answers[1][1])


def test_entropy_of_mean_agrees_with_finite_differences():
    x = normal(6, 5, seed=4).requires_grad_()
    torch.autograd.gradcheck(lambda x: bits.entropy_of_mean(x, 2, Mesh()), (x,))
    torch.autograd.gradcheck(lambda x: bits.entropy_of_mean(x, 5, Mesh()), (x,))
    torch.autograd.gradcheck(bits.entropy, (x,))


@pytest.mark.parametrize("name", _names)
def test_nothing_has_two_to_the_dim(name):
    quantizer, draw = _built(name, 62, group_bits=8), random.Random(1)
    ids = [0, 2**62 - 1, 1, 2**61, *(draw.randrange(2**62) for _ in range(100))]
    codes = quantizer.decode(torch.tensor(ids))
    signs = torch.tensor([[1.0 if number >> (61 - i) & 1 else -1.0 for i in range(62)] for number in ids])
    assert torch.equal(codes.sign(), signs)
    assert quantizer.encode(3 * signs).tolist() == ids
    x = signs.clone().requires_grad_()
    out = quantizer(x)
    assert out.ids.tolist() == ids
    assert torch.equal(out.z, codes)
    assert quantizer.num_codes == 2**62
    assert float(out.stats["usage"]) == pytest.approx(len(set(ids)) / 2**62)
    sum(out.losses.values()).backward()
    assert torch.isfinite(x.grad).all()
    assert sum(buffer.numel() for buffer in quantizer.buffers()) == 1 + 62 * 62 + 62 + 1  # of the whitening all but one


def _traffic(codes, dim):
    mesh = Mesh(1, codes)
    quantizer = _built("lfq", dim, group_bits=8, mesh=mesh)
    x = mine(normal(TOKENS, dim, seed=1).float(), mesh).requires_grad_()
    with ops.count_bytes() as sent:
        sum(quantizer(x).losses.values()).backward()
    return sent["codes"]


@pytest.mark.dist
def test_traffic_is_tokens_times_dim_and_does_not_know_the_number_of_codes(ranks):
    small, large = (ranks(2, _traffic, 2, dim)[0] for dim in (8, 16))
    per_token = TOKENS // 2 * 4
    # log-odds there and their gradient back; twice the dimension is 256 times the codes
    assert large - small == 2 * 8 * per_token
    assert small < 2 * 8 * per_token + TOKENS // 2 * 8 + 100  # and ids, and a few scalars


def test_the_first_channel_is_the_most_significant_bit_and_zero_is_minus():
    for name in _names:
        quantizer = _built(name, 3)
        x = torch.tensor([[2.0, -0.1, -3.0], [-1.0, 0.0, 0.5], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
        scale = 1.0 if name == "lfq" else 3**-0.5
        out = quantizer(x)
        assert out.ids.tolist() == [4, 1, 0, 7]
        close(out.z, scale * torch.tensor([[1.0, -1, -1], [-1, -1, 1], [-1, -1, -1], [1, 1, 1]]), 1e-6)


def test_bsq_lives_on_the_sphere():
    quantizer = _built("bsq", 9, entropy_weight=0.0, commitment_weight=1.0).double()
    x = 5 * normal(100, 9, seed=7)
    x[0] = torch.eye(9, dtype=torch.float64)[0]  # as far from its code as there is
    x.requires_grad_()
    out = quantizer(x)
    close(out.z.detach().norm(dim=1), torch.ones(100, dtype=torch.float64))
    u = (x / x.norm(dim=1, keepdim=True)).detach()
    close(out.losses["commitment"].detach(), (2 - 2 * u.abs().sum(1) / 3).mean())
    far = quantizer(x[:1])
    assert float(far.losses["commitment"].detach()) == pytest.approx(2 - 2 / 3)
    assert set(out.losses) == {"commitment"}
    g = normal(100, 9, seed=8)
    (out.z * g).sum().backward()
    # the gradient of u = x / |x|: g without its part along u, divided by |x|
    close(x.grad, (g - u * (u * g).sum(1, keepdim=True)) / x.detach().norm(dim=1, keepdim=True))


def test_the_bits_of_bsq_have_the_probability_of_the_paper():
    x, t = normal(20, 4, seed=2), 3.0
    u = x / x.norm(dim=1, keepdim=True)
    p = torch.softmax(2 * t * u @ (_all_codes(4) / 2).t(), dim=1)
    for bit in range(4):
        ones = _all_codes(4)[:, bit] > 0
        close(p[:, ones].sum(1), torch.sigmoid(4 * t * u[:, bit] / 2))
    stats = _built("bsq", 4, temperature=1 / t).double()(x).stats
    close(stats["entropy_token"], _entropy(p).mean())


@pytest.mark.parametrize("name", _names)
@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e3])
def test_extreme_temperatures_stay_finite(name, temperature):
    quantizer = _built(name, 12, temperature=temperature)
    x = (10 * normal(64, 12, seed=3)).float()
    x[0] = 0.0
    x.requires_grad_()
    out = quantizer(x)
    (sum(out.losses.values()) + out.z[1:].sum()).backward()
    assert torch.isfinite(x.grad).all()
    entropy = float(out.stats["entropy_mean"])
    assert -1e-6 <= entropy <= 12 * math.log(2) + 1e-4
    if temperature < 1:  # the tokens are their codes: the entropy of the ids, but for the token of zeros
        counts = torch.bincount(out.ids[1:]).double()
        expected = float(_entropy(counts[counts > 0] / 63))
        assert abs(entropy - expected) < 0.25
    else:
        assert entropy == pytest.approx(12 * math.log(2), rel=1e-3)


@pytest.mark.parametrize("name", _names)
def test_a_token_that_is_not_a_number_is_seen(name):
    quantizer = _built(name, 4)
    x = normal(6, 4, seed=1).float()
    x[2, 1] = math.nan
    out = quantizer(x)
    assert math.isnan(float(sum(out.losses.values())))
    assert 0 <= int(out.ids.min()) <= int(out.ids.max()) < 16
    assert torch.isnan(out.z[2]).any()
    assert torch.isfinite(out.z[[0, 1, 3, 4, 5]]).all()


@pytest.mark.parametrize("name", _names)
def test_either_size_is_enough(name):
    for settings in ({"num_codes": 64}, {"dim": 6}, {"num_codes": 64, "dim": 6}):
        quantizer = quantizers.build({"name": name, **settings})
        assert (quantizer.num_codes, quantizer.dim) == (64, 6)
    assert quantizers.build({"name": name}).num_codes == 2**16


@pytest.mark.parametrize("name", _names)
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_codes": 1000}, ["num_codes 1000 is no power of two", "512 (dim 9) or 1024 (dim 10)"]),
        ({"num_codes": 65537, "dim": 16}, ["65536 (dim 16) or 131072 (dim 17)"]),
        ({"num_codes": 1}, ["num_codes 1 is no power of two", "use 2"]),
        ({"num_codes": -4}, ["num_codes -4 is no power of two"]),
        ({"num_codes": 4096, "dim": 13}, ["4096 is 2^12, but dim is 13", "num_codes: 8192", "dim: 12"]),
        ({"dim": 63}, ["dim is 63", "1 to 62 bits"]),
        ({"dim": 0}, ["dim is 0"]),
        ({"num_codes": 2**63}, ["past the last id, 2^62"]),
        ({"group_bits": 25}, ["group_bits is 25", "1 to 24"]),
        ({"entropy_temperature": 0.0}, ["entropy_temperature is 0.0"]),
        ({"window_decay": 1.0}, ["window_decay is 1.0"]),
        ({"similarity": "dot"}, ["similarity", "unknown"]),
    ],
)
def test_a_wrong_config_says_the_rule_the_place_and_the_way_out(name, settings, words):
    with pytest.raises(ConfigError) as caught:
        quantizers.build({"name": name, **settings})
    for word in words:
        assert word in str(caught.value)
