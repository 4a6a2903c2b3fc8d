"""A prior that is registered as the README says goes through training, the dry run and sampling: a bag of ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jobs
import prior_runs
import pytest
import torch
from torch import nn

from vqscale import priors
from vqscale.codes import noise
from vqscale.config import schema
from vqscale.nets.config_transformer import TransformerConfig
from vqscale.priors import base
from vqscale.priors.config import AutoregressiveConfig, IdsConfig
from vqscale.show import run_page
from vqscale.train import config_prior

pytestmark = [pytest.mark.slow, pytest.mark.dist]


@dataclass(frozen=True)
class BagConfig(IdsConfig):
    name: Literal["bag"] = "bag"
    """which prior"""
    net: TransformerConfig = field(default_factory=TransformerConfig)
    """of which it takes the width"""


class Bag(priors.Prior):
    """Every id follows from the class and the mean of half of the ids; the keys say of which half."""

    def __init__(self, config, mesh=None, *, seed=0):
        super().__init__(config, config.net, mesh, seed)
        self.mix = nn.Linear(config.net.width, config.net.width)
        if not torch.empty(0).is_meta:
            self.to(self.mesh.device)

    def states(self, labels_B, x_BTD):
        return self.mix(x_BTD.mean(1) + self.classes(labels_B)[:, 0])[:, None].expand(x_BTD.shape)

    def loss(self, ids_Bhw, condition_B, keys_B=None):
        seen_BT = noise.uniform(keys_B, 1, 1 + self.config.num_tokens) < 0.5
        x_BTD = self.head.embed(self.checked(ids_Bhw).flatten(1)) * seen_BT[..., None]
        return self.modelled(self.states(self.labels(condition_B, keys_B), x_BTD), ids_Bhw)

    @torch.no_grad()
    def sample(self, condition_B, *, numbers_B, grid=None, seed=0, **others):
        with self.evaluating():
            labels_B = self.sampled(condition_B, numbers_B, grid)
            h_BTD = self.states(labels_B, torch.zeros(len(labels_B), self.config.num_tokens, self.head.dim))
            keys_N = noise.keys(seed, numbers_B[:, None], torch.arange(self.config.num_tokens)).flatten()
            return self.head.sample(h_BTD.flatten(0, 1), keys_N).view(-1, *self.config.grid)


def register(rank=0, put=setattr):
    """What a line in PRIORS and one in PriorConfig do, in a process that has imported both."""
    priors.PRIORS["bag"] = f"{__name__}:Bag"
    for module in (priors, base, config_prior):
        put(module, "PriorConfig", AutoregressiveConfig | BagConfig)
    schema.fields_of.cache_clear()


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(priors, "PRIORS", dict(priors.PRIORS))
    register(put=monkeypatch.setattr)
    yield
    monkeypatch.undo()
    schema.fields_of.cache_clear()


def drawn(path, codes):
    register()
    prior = priors.Prior.load(path, mesh=base.Mesh(codes=codes))
    return prior.sample(torch.tensor([0, 3, -1]), numbers_B=torch.arange(3)), prior.fingerprint


def test_the_page_speaks_of_a_prior_without_network_and_classes():
    settings = {"name": "bag", "num_codes": 37, "grid": [2, 3], "num_classes": 0}
    summary = {"steps": 8, "processes": 2, "loss": 3.5}
    _, text = run_page.prior({"prior": settings, "data": {"batch": 8}}, summary, [])
    assert "A model (<b>bag</b>) learns which of the 37 ids stand at the 2 x 3 places of a picture. Trained" in text


def test_another_prior_is_trained_planned_and_sampled(tmp_path, registered, ranks):
    caches = prior_runs.write_caches(tmp_path / "caches")
    net = "prior.net={width: 16, num_layers: 2, num_heads: 2, ffn_multiple: 16}"
    paths = [prior_runs.write_config(tmp_path / str(n), caches, "prior.name=bag", net) for n in (1, 2)]
    one, two = (jobs.finish(path, world=n, before=register) for n, path in enumerate(paths, 1))
    jobs.same_numbers(one, two)  # also what is held out, whose halves follow from the numbers of images
    rows = jobs.rows(one)
    assert rows[-2]["loss"] < rows[0]["loss"] - 0.02
    assert rows[-1]["val/accuracy"] > 0

    job = jobs.start(paths[0], "--dry-run", "--world", "2", before=partial(register))
    assert job.wait() == [0], job.output
    assert "8 steps of 8 images, data 1 x codes 2 = 2 processes" in job.output

    ids, fingerprint = drawn(one, 1)
    assert ids.shape == (3, *prior_runs.GRID)
    for other in ranks(2, drawn, one, 2):
        assert torch.equal(other[0], ids)
        assert other[1] == fingerprint
