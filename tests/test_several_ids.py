"""Several ids per token (residual and grouped tokenizers) in priors: losses, draws, caches, evaluation, refusals."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import jobs
import numpy as np
import prior_runs
import pytest
import torch
from saved_runs import small
from test_head_sampling import chi_square, likely
from whole import mine, normal, put

from vqscale import config as configuration
from vqscale import priors
from vqscale.codes.rows import set_aside
from vqscale.data.tokens.stream import Cache
from vqscale.metrics import unigram
from vqscale.parallel.mesh import Mesh
from vqscale.priors import PRIORS, Prior
from vqscale.priors.config.autoregressive import AutoregressiveConfig
from vqscale.programs.sampling import draw as sample
from vqscale.programs.sampling.request import SampleRequest
from vqscale.train import nulls
from vqscale.train import prior as training
from vqscale.train.config import Run

CODES, GRID, IDS = 5, (2, 3), 2
STILL = {"dropout_token": 0.0, "dropout_residual": 0.0, "dropout_ffn": 0.0}
STILL_HEAD = "{name: factorised, within: {num_layers: 1, ffn_multiple: 8, dropout: 0.0}}"
NET = {"width": 16, "num_layers": 1, "num_heads": 2, "ffn_multiple": 8, **STILL}
HEAD = {"name": "factorised", "within": {"num_layers": 1, "ffn_multiple": 8, "dropout": 0.0}}
SETTINGS = {"num_codes": CODES, "num_ids": IDS, "grid": list(GRID), "num_classes": 3, "net": NET, "head": HEAD}


def built(mesh=None, name="autoregressive", **more):
    """A prior with values as of a trained one, the same on any number of ranks."""
    prior = priors.build({"name": name, **SETTINGS, **more}, mesh, seed=1).double()
    for place, digit in enumerate(prior.head.heads):
        put(digit.outputs, normal(digit.num_codes, 16, seed=place))
        put(digit.inputs, normal(digit.num_codes, 16, seed=9 + place))
    return prior.eval()


def batch(count=4):
    ids = torch.randint(CODES, (count, *GRID, IDS), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(count) % 3


def test_the_first_loss_is_log_k_of_each_id_and_one_batch_is_learnt_by_heart():
    prior = priors.build({"name": "autoregressive", **SETTINGS, "class_dropout": 0.0}, seed=1)
    ids, labels = batch(3)
    adam, seen = torch.optim.Adam(prior.parameters(), lr=1e-2), []
    for _ in range(80):
        loss = prior(ids, labels).loss
        seen.append(float(loss.detach()))
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert seen[0] == pytest.approx(IDS * math.log(CODES), abs=1e-5)
    assert seen[-1] < 0.1
    assert torch.equal(prior.sample(labels, {"temperature": 0.0}, numbers_B=torch.arange(3)), ids)
    assert prior.eval()(ids, labels).right_B.tolist() == [1.0] * 3
    assert 0 < float(prior(ids.flip(0), labels).right_B.mean()) < 1


@torch.no_grad()
def test_a_sample_has_its_probability():
    """All images of two tokens of two ids below two: their nats are those of a distribution, and it is drawn from."""
    prior = built(num_codes=2, grid=[1, 2])
    every = torch.tensor(list(itertools.product(range(2), repeat=4))).view(16, 1, 2, 2)
    p = (-2 * prior(every, torch.full((16,), 1)).nats_B).exp()
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-9)
    drawn = prior.sample(torch.full((4000,), 1), numbers_B=torch.arange(4000))
    places = (drawn.flatten(1) * torch.tensor([8, 4, 2, 1])).sum(1)
    assert likely(*chi_square(places, p))


def _on(codes):
    mesh = Mesh(1, codes)
    prior = built(mesh)
    tables = set_aside(prior)
    ids, labels = batch()
    found = prior(mine(ids, mesh), mine(labels, mesh))
    found.loss.backward()
    options = {"guidance": 2.0, "top_k": 4, "temperature": 0.9}
    drawn = prior.sample(mine(labels, mesh), options, numbers_B=mine(torch.arange(4), mesh))
    dense = {name: p.grad for name, p in prior.named_parameters()}
    return found.nats_B, drawn, dense, {name: table.rows.grad for name, table in tables.items()}


@pytest.mark.dist
def test_it_is_the_same_on_two_processes(ranks):
    results, (nats, drawn, dense, rows) = ranks(2, _on, 2), _on(1)
    torch.testing.assert_close(torch.cat([result[0] for result in results]), nats)
    assert drawn.shape == (4, *GRID, IDS)
    assert torch.equal(torch.cat([result[1] for result in results]), drawn)
    for name, expected in dense.items():
        torch.testing.assert_close(sum(result[2][name] for result in results) / 2, expected)
    for name, expected in rows.items():
        torch.testing.assert_close(torch.cat([result[3][name] for result in results]) / 2, expected)


def test_ids_of_another_number_are_refused():
    ids, labels = batch()
    with pytest.raises(ValueError, match=r"one of 2 x 3 ids .* with 2 ids each \(num_ids\)"):
        built()(ids[..., 0], labels)
    for name in PRIORS:
        with pytest.raises(configuration.ConfigError, match=r"num_ids is 2, and this head has one id per tok.*fact"):
            priors.build({"name": name, **SETTINGS, "head": {"name": "flat"}})
    with pytest.raises(configuration.ConfigError, match=r"factors \[2, 2\] multiply to 4, .* num_codes 5"):
        priors.build({"name": "autoregressive", **SETTINGS, "head": {"name": "factorised", "factors": [2, 2]}})


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    for name, count, seed in (("train", prior_runs.NUM_TRAIN, 1), ("val", prior_runs.NUM_VAL, 2)):
        prior_runs.write_cache(folder / name, count, seed, num_ids=IDS)
    return folder


def run_of(folder, caches, *more):
    net = "prior.head={name: factorised, within: {num_layers: 1, ffn_multiple: 8}}"
    return prior_runs.write_config(folder, caches, "prior.num_ids=2", net, *more)


def test_a_cache_of_several_ids_and_a_prior_of_one_do_not_go_together(caches, tmp_path):
    config = configuration.load(Run, prior_runs.write_config(tmp_path, caches))
    with pytest.raises(ValueError, match=r"2 ids in the cache .*, and 1 in .*prior.num_ids=2 and .*name=factorised"):
        training.open_streams(config)
    open_ids = configuration.load(Run, run_of(tmp_path, caches, "prior.num_ids=null", "prior.grid=null"))
    filled = nulls.fill(open_ids)
    assert (filled.prior.num_ids, filled.prior.grid) == (IDS, prior_runs.GRID)
    training.open_streams(filled)


def test_what_held_out_ids_are_measured_by_is_of_each_column(caches, tmp_path):
    config = configuration.load(Run, run_of(tmp_path, caches))
    stream, held_out = training.open_streams(config)
    prior, mesh = priors.build(config.prior, seed=1), Mesh()
    seen = unigram.count(stream, mesh)
    train, val = (torch.from_numpy(np.asarray(Cache(caches / name).ids[:])).long() for name in ("train", "val"))
    counts = torch.stack([torch.bincount(train[..., i].flatten(), minlength=prior_runs.CODES) for i in range(IDS)])
    assert torch.equal(seen, counts)
    scores = training.evaluate(prior, prior, held_out, mesh, 0, seen, seed=0)
    shares = ((counts + 1).double() / (counts.sum(1, keepdim=True) + prior_runs.CODES)).log()
    first = val[:, 0].flatten(0, -2)
    expected = -sum(shares[i, first[:, i]].mean() for i in range(IDS))
    assert scores["unigram"] == pytest.approx(float(expected), abs=1e-9)
    assert scores["uniform"] == pytest.approx(IDS * math.log(prior_runs.CODES))
    assert scores["loss"] == pytest.approx(scores["uniform"], abs=1e-5)
    used = [len(first[:, i].unique()) / prior_runs.CODES for i in range(IDS)]
    assert scores["usage"] == pytest.approx(sum(used) / IDS)


def test_samples_are_decoded_by_a_tokenizer_of_as_many_ids(tmp_path):
    grouped = {"name": "grouped", "groups": 2, "inner": {"name": "vq", "num_codes": CODES, "dim": 4}}
    tokenizer = small(quantizer=grouped)
    grid = tokenizer.encode(torch.zeros(1, 3, 16, 16)).shape[1:-1]
    prior = built(grid=list(grid)).float()
    request = SampleRequest(5, (0, 1), priors.sampling("autoregressive")(), batch=4)
    sample.sample(prior, tokenizer, tmp_path, Mesh(), request, progress=False)
    with np.load(tmp_path / "samples.npz") as file:
        assert file["ids"].shape == (5, *grid, IDS)
        assert file["arr_0"].shape[0] == 5
    other = SimpleNamespace(quantizer=SimpleNamespace(num_codes=CODES, num_ids=1), fingerprint="f", card={})
    with pytest.raises(ValueError, match="the prior has 2 ids per token and the tokenizer 1"):
        sample.check(prior, other, request)


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_is_the_same_on_two_processes_and_goes_on_on_another_number(caches, tmp_path):
    more = (f"prior.head={STILL_HEAD}", "optim.schedule=constant", "run.eval_images=0")
    one, two = (jobs.finish(run_of(tmp_path / str(n), caches, *more), world=n) for n in (1, 2))
    jobs.same_numbers(one, two)
    config = run_of(tmp_path / "3", caches, *more)
    jobs.finish(config, "run.steps=4", world=2)
    jobs.same_numbers(one, jobs.finish(config))
    prior = Prior.load(one)
    assert prior.sample(torch.tensor([0, 1]), numbers_B=torch.arange(2)).shape == (2, *prior_runs.GRID, IDS)
    assert isinstance(configuration.load(Run, one / "run.yaml").prior, AutoregressiveConfig)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("head", [STILL_HEAD, "{name: bits, width: 16, num_layers: 1}"], ids=["factorised", "bits"])
def test_the_networks_of_heads_are_cut_by_zero(tmp_path, head):
    """Stage 3 finds the parameters of a head's own network where it is called."""
    more = (f"prior.head={head}", "prior.num_codes=64", "run.steps=2", "run.eval_every=2", "run.checkpoint_every=2")
    for name in ("train", "val"):
        prior_runs.write_cache(tmp_path / "caches" / name, 16, 1, num_ids=IDS, num_codes=64)
    runs = []
    for name, options in (("plain", ()), ("zero", ("engine.name=deepspeed", "engine.zero_stage=3"))):
        path = prior_runs.write_config(tmp_path / name, tmp_path / "caches", "prior.num_ids=2", *more)
        runs.append(jobs.finish(path, *options, world=2))
    jobs.same_numbers(*runs)
