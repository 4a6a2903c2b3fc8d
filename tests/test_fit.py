"""Where quantizers begin: whitening, bases drawn from latents, revival by use; the same on every grid of ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from whole import GRIDS, mine, normal

from vqscale import config as configuration
from vqscale import quantizers
from vqscale.codes.config import UpkeepConfig
from vqscale.codes.revival import choose_by_use
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.plan import traffic
from vqscale.plan.traffic import Grid
from vqscale.quantizers.config import QuantizerConfig
from vqscale.quantizers.config.implicit import FSQConfig
from vqscale.quantizers.fsq import evenest_scale
from vqscale.quantizers.moments import inverse_root, moments, roots, with_ridge

TOKENS = 512


def _latents(dim, step=0, tokens=TOKENS):
    """Latents as an encoder has them early: every channel says nearly the same, off centre."""
    x_ND = normal(tokens, dim, seed=7 + step)
    shared_N1 = normal(tokens, 1, seed=77 + step)
    return (3.0 * shared_N1 + 0.1 * x_ND + 2.0).float()


# Moments and roots.


def test_moments_are_those_of_numpy():
    x = _latents(5).double()
    mean, covariance = moments(x, Mesh().world)
    np.testing.assert_allclose(mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.numpy().T, bias=True), rtol=1e-9, atol=1e-12)


def test_roots_of_a_covariance():
    c = with_ridge(moments(_latents(5), Mesh().world)[1])
    a = inverse_root(c)
    torch.testing.assert_close(a @ c @ a, torch.eye(5, dtype=torch.float64), atol=1e-9, rtol=0.0)
    torch.testing.assert_close(a, a.t())
    out, back = roots(c)
    torch.testing.assert_close(out @ back, torch.eye(5, dtype=torch.float64), atol=1e-9, rtol=0.0)


def test_the_gradient_of_the_inverse_root_is_finite_where_eigenvalues_are_equal():
    factor = normal(4, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: inverse_root(with_ridge(f @ f.t())), (factor,))
    same = torch.eye(4, dtype=torch.float64).requires_grad_()
    inverse_root(same).sum().backward()
    # of C^(-1/2) at C = 1: -1/2 times what comes, symmetric
    torch.testing.assert_close(same.grad, torch.full((4, 4), -0.5, dtype=torch.float64))


# Whitening.


def _driven(config, mesh=None, seed=3):
    quantizer = quantizers.build(config, mesh, seed=seed)
    quantizer.begin()
    return quantizer.train()


FROZEN = [{"name": "fsq", "levels": [5, 4, 3]}, {"name": "lfq", "dim": 6}, {"name": "bsq", "dim": 6}]


@pytest.mark.parametrize("config", FROZEN, ids=lambda c: c["name"])
def test_latents_that_all_say_the_same_use_all_codes_once_they_are_whitened(config):
    used = {}
    for fit in ("none", "whiten"):
        quantizer = _driven({**config, "fit": fit})
        ids = quantizer(_latents(quantizer.dim, tokens=4096)).ids
        share = ids.bincount(minlength=quantizer.num_codes).double() / len(ids)
        used[fit] = float((-torch.xlogy(share, share).sum()).exp()) / quantizer.num_codes  # perplexity, of K
    assert used["none"] < 0.3
    assert used["whiten"] > 0.9


@pytest.mark.parametrize("config", FROZEN, ids=lambda c: c["name"])
def test_nothing_is_whitened_before_a_training_begins(config):
    x = _latents(quantizers.build(config).dim)
    published = quantizers.build({**config, "fit": "none"})
    for quantizer in (quantizers.build(config).train(), quantizers.build(config).eval()):
        assert torch.equal(quantizer(x).z, published(x).z)
        assert torch.equal(quantizer.encode(x), published.encode(x))


def test_whitened_latents_have_no_mean_and_the_identity_as_covariance():
    quantizer = _driven({"name": "lfq", "dim": 6})
    y = quantizer.whitening(_latents(6).double())
    mean, covariance = moments(y, Mesh().world)
    torch.testing.assert_close(mean, torch.zeros(6, dtype=torch.float64), atol=1e-9, rtol=0.0)
    # the ridge shrinks directions that have next to no variance: here 0.01 of 9
    torch.testing.assert_close(covariance, torch.eye(6, dtype=torch.float64), atol=0.1, rtol=0.0)
    assert float(covariance.diagonal().min()) > 0.9


def test_evaluation_whitens_by_running_moments_and_encodes_what_forward_does():
    quantizer = _driven({"name": "fsq", "levels": [5, 4, 3], "whiten_decay": 0.5})
    expected_mean = expected_cov = None
    for step in range(3):
        x = _latents(3, step)
        quantizer(x)
        quantizer.update()
        mean, covariance = x.double().mean(0), torch.from_numpy(np.cov(x.double().numpy().T, bias=True))
        expected_mean = mean if expected_mean is None else 0.5 * expected_mean + 0.5 * mean
        expected_cov = covariance if expected_cov is None else 0.5 * expected_cov + 0.5 * covariance
    torch.testing.assert_close(quantizer.whitening.mean_D, expected_mean)
    torch.testing.assert_close(quantizer.whitening.covariance_DD, expected_cov)
    quantizer.eval()
    x = _latents(3, 9)
    ids = quantizer.encode(x)
    assert torch.equal(ids, quantizer(x).ids)
    assert torch.equal(ids[:7], quantizer.encode(x[:7])), "a token's id depends on no other token"
    assert torch.equal(quantizer.decode(ids), quantizer(x).z)


def test_a_skipped_step_leaves_no_trace_and_latents_that_are_no_numbers_ruin_nothing():
    quantizer = _driven({"name": "bsq", "dim": 6})
    quantizer(_latents(6))
    quantizer.update()
    before = {name: x.clone() for name, x in quantizer.state_dict().items()}
    quantizer(_latents(6, 1) * torch.nan)
    quantizer.update(stepped=False)
    quantizer(_latents(6, 2))
    quantizer.update(stepped=False)
    for name, x in quantizer.state_dict().items():
        assert torch.equal(x, before[name]), name


FEW = [
    torch.ones(64, 6),
    torch.ones(1, 6),
    normal(3, 6, seed=1).float(),
    normal(64, 6, seed=2).float() * torch.eye(6)[0],
]


@pytest.mark.parametrize("x", FEW, ids=["constant", "one token", "three tokens", "dead channels"])
@pytest.mark.parametrize("name", ["lfq", "bsq"])
def test_constant_latents_one_token_and_dead_channels_stay_finite(x, name):
    quantizer = _driven({"name": name, "dim": 6})
    x = x.clone().requires_grad_()
    answer = quantizer(x)
    (answer.z.square().sum() + sum(answer.losses.values())).backward()
    assert torch.isfinite(answer.z).all()
    assert torch.isfinite(x.grad).all()
    quantizer.update()
    assert torch.isfinite(quantizer.eval()(x).z).all()


def _whiten(data, codes, config):
    mesh = Mesh(data, codes)
    quantizer = _driven(config, mesh)
    x = mine(_latents(quantizer.dim), mesh).clone().requires_grad_()
    answer = quantizer(x)
    weights = mine(normal(TOKENS, quantizer.dim, seed=5).float(), mesh)
    ((answer.z * weights).sum(1).mean() + sum(answer.losses.values())).backward()
    quantizer.update()
    ids = ops.gather(answer.ids, mesh.world)
    gradient = ops.gather(x.grad / mesh.world.size, mesh.world)  # as the engine averages
    return ids, gradient, quantizer.whitening.mean_D, quantizer.whitening.covariance_DD


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("config", FROZEN, ids=lambda c: c["name"])
def test_whitening_is_the_same_on_every_grid_gradients_included(ranks, grid, config):
    ids, gradient, mean, covariance = _whiten(1, 1, config)
    for other in ranks(grid[0] * grid[1], _whiten, *grid, config):
        assert torch.equal(other[0], ids)
        torch.testing.assert_close(other[1], gradient, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(other[2], mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(other[3], covariance, rtol=1e-10, atol=1e-12)


def test_the_scale_of_a_channel_is_where_its_digits_are_most_even():
    """The numbers of facts: the standard deviation whose digits have the largest entropy, to its third digit."""
    found = {levels: evenest_scale(levels, FSQConfig()) for levels in range(3, 9)}
    for levels, expected in {3: 1.275, 4: 1.195, 5: 1.15, 6: 1.125, 7: 1.10, 8: 1.085}.items():
        assert found[levels] == pytest.approx(expected, abs=0.004)
    quantizer = _driven({"name": "fsq", "levels": [8, 7, 6]})
    x = normal(200_000, 3, seed=2).float()
    digits = quantizer(x).ids[:, None] // quantizer.basis_D % quantizer.levels_D
    for channel, levels in enumerate((8, 7, 6)):
        share = digits[:, channel].bincount(minlength=levels).double() / len(x)
        assert -(share * share.log()).sum() > 0.99 * math.log(levels)
        torch.testing.assert_close(share, share.flip(0), atol=0.01, rtol=0.0)  # centred among the levels


# SimVQ: a basis drawn from latents.


def _fitted(data, codes, num_codes=13, steps=4, **more):
    mesh = Mesh(data, codes)
    config = {"name": "simvq", "num_codes": num_codes, "dim": 3, "warmup_steps": steps, "revive_every": 0, **more}
    quantizer = _driven(config, mesh)
    passed = []
    for step in range(steps):
        x = mine(_latents(3, step, 8), mesh)
        passed.append(torch.equal(quantizer(x).z, x))
        quantizer.update()
    rows = torch.cat(ops.gather_objects(quantizer.codebook.rows.detach(), mesh.codes))
    return passed, rows, quantizer.decode(torch.arange(num_codes)), quantizer.encode(_latents(3, 9))


@pytest.mark.parametrize("bias", [True, False])
def test_the_first_codes_of_simvq_are_latents_on_a_white_basis(bias):
    passed, rows, codes, _ = _fitted(1, 1, bias=bias)
    assert all(passed), "tokens pass unquantized while the basis is drawn"
    latents = torch.cat([_latents(3, step, 8) for step in range(4)])
    nearest = torch.cdist(codes.double(), latents.double()).min(1)
    assert float(nearest.values.max()) < 1e-3
    assert len(nearest.indices.unique()) == len(codes)
    mean, covariance = moments(rows, Mesh().world)
    spread = covariance + torch.outer(mean, mean)  # without a bias the mean counts as spread
    torch.testing.assert_close(spread, torch.eye(3, dtype=torch.float64), atol=0.35, rtol=0.0)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_fit_of_simvq_is_the_same_on_every_grid(ranks, grid):
    _, rows, codes, ids = _fitted(1, 1)
    for _, other_rows, other_codes, other_ids in ranks(grid[0] * grid[1], _fitted, *grid):
        torch.testing.assert_close(other_rows, rows, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other_codes, codes, rtol=1e-5, atol=1e-5)
        assert torch.equal(other_ids, ids)


def test_a_dead_row_of_simvq_is_revived_where_the_map_meets_a_token():
    quantizer = _driven({"name": "simvq", "num_codes": 16, "dim": 3, "warmup_steps": 3, "revive_after": 2})
    for step in range(3):
        quantizer(_latents(3, step, 32))
        quantizer.update()
    with torch.no_grad():
        quantizer.map.weight += 0.1 * normal(3, 3, seed=4).float()
        quantizer.codebook.rows[:4] = 100.0  # nothing is near them
    for step in range(12):
        x = _latents(3, 20 + step, 32)
        quantizer(x)
        before = quantizer.codebook.rows.clone()
        quantizer.update()
        changed = (quantizer.codebook.rows != before).any(1).nonzero()[:, 0]
        if len(changed):
            assert float(torch.cdist(quantizer.decode(changed).double(), x.double()).min(1).values.max()) < 1e-2
    assert float(quantizer.codebook.rows.abs().max()) < 100


def test_without_a_fit_simvq_is_as_published():
    published = {"name": "simvq", "num_codes": 16, "dim": 3, "init": "normal", "revive_every": 0}
    x = _latents(3)
    undriven = quantizers.build({"name": "simvq", "num_codes": 16, "dim": 3})
    assert torch.equal(undriven(x).z, quantizers.build(published)(x).z)
    quantizer = _driven(published)
    rows = quantizer.codebook.rows.clone()
    for step in range(5):
        assert not torch.equal(quantizer(_latents(3, step)).z, _latents(3, step))
        quantizer.update()
    assert torch.equal(quantizer.codebook.rows, rows)


TABLES = [{"name": name} for name in ("vq", "ema", "ibq", "simvq")] + [{"name": "scq", "solver": "relaxed"}]


@pytest.mark.parametrize("config", TABLES, ids=lambda c: c["name"])
def test_a_landing_goes_from_the_latents_to_the_codes_by_equal_steps(config):
    """Steps 0 and 1 pass; then a = 1/4, 2/4, 3/4 of the way, and the code itself from there on; never in evaluation."""
    config = {**config, "num_codes": 13, "dim": 3, "warmup_steps": 2, "revive_every": 0}
    for step, share in enumerate([0.0, 0.0, 0.25, 0.5, 0.75, 1.0]):
        quantizer, direct = (_driven({**config, "landing_steps": steps}) for steps in (3, 0))
        for before in range(step):
            for each in (quantizer, direct):
                each(_latents(3, before, 16))
                each.update()
        x = _latents(3, step, 16)
        torch.testing.assert_close(quantizer(x).z, x + share * (direct(x).z - x))
        assert torch.equal(quantizer.eval()(x).z, direct.eval()(x).z)


# Revival.


def _chosen(data, codes, num, seed):
    mesh = Mesh(data, codes)
    use_N = mine(torch.arange(1, 9, dtype=torch.float32), mesh)
    return choose_by_use(mine(normal(8, 2, seed=1).float(), mesh), use_N, num, mesh, seed)


@pytest.mark.parametrize("grid", GRIDS)
def test_tokens_by_use_are_the_same_on_every_grid(ranks, grid):
    for num in (1, 3, 8):
        for other in ranks(grid[0] * grid[1], _chosen, *grid, num, 5):
            assert torch.equal(other, _chosen(1, 1, num, 5))


@pytest.mark.slow
def test_tokens_are_drawn_in_proportion_to_use():
    """2000 first draws of 8 tokens of use 1 to 8: shares within four deviations of use / 36."""
    x = torch.arange(8.0)[:, None]
    use = torch.arange(1.0, 9.0)
    first = torch.cat([choose_by_use(x, use, 1, Mesh(), seed)[0] for seed in range(2000)]).long()
    share, expected = first.bincount(minlength=8) / 2000, use / 36
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / 2000).sqrt()).all()
    assert len(choose_by_use(x, use, 8, Mesh(), 0).unique()) == 8


def _sent(data, codes, revive_every, dead=0):
    """Bytes of the update of a step in which so many codes are dead."""
    mesh = Mesh(data, codes)
    more = {"num_codes": 8, "init": "normal", "revive_every": revive_every, "revive_after": 1 if dead else 100}
    quantizer = _driven({"name": "vq", "dim": 3, **more}, mesh)
    rows = normal(8, 3, seed=1).float()
    rows[:dead] = 1e6  # whom nothing meets
    layout = quantizer.codebook.layout
    quantizer.codebook.rows.data = rows[layout.start : layout.stop].clone()
    quantizer(mine(rows[dead:].repeat(16, 1)[:64], mesh))
    with ops.count_bytes() as sent:
        quantizer.update()
    return dict(sent)


@pytest.mark.dist
def test_where_no_code_is_dead_an_update_sends_one_number(ranks):
    assert all(not sent for sent in ranks(4, _sent, 2, 2, 0))
    for sent in ranks(4, _sent, 2, 2, 1):
        assert sent == {"codes": 8}


@pytest.mark.dist
def test_a_revival_sends_what_the_plan_says_and_follows_the_dead(ranks):
    for dead in (1, 3):
        planned = traffic.revival(traffic.Work(8, 3, 16), Grid(2, 2), dead)
        expected = {axis: nbytes for axis, nbytes in traffic.sent(planned, Grid(2, 2)).items() if nbytes}
        for sent in ranks(4, _sent, 2, 2, 1, dead):
            assert sent == expected


# Files that are older.


def test_files_without_the_keys_mean_the_published_form():
    old = {"name": "fsq", "levels": [5, 4, 3], "num_codes": None, "shift": "atanh", "eps": 1e-3, "symmetric": False}
    assert configuration.parse(QuantizerConfig, old, written=True).fit == "none"
    assert configuration.parse(QuantizerConfig, old).fit == "whiten"
    simvq = configuration.parse(QuantizerConfig, {"name": "simvq"}, written=True)
    assert (simvq.init, simvq.revive_every) == ("normal", 0)
    nested = configuration.parse(QuantizerConfig, {"name": "residual", "inner": old}, written=True)
    assert nested.inner.fit == "none"
    table = configuration.parse(QuantizerConfig, {"name": "vq", "revive_every": 10, "revive_after": None}, written=True)
    assert (table.revive_patience, table.revive_from) == (10.0, "tokens")
    assert UpkeepConfig().revive_patience == 3.0
