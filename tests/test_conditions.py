"""Conditions of priors: classes, whose parameters have the names they always had, and a second one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jobs
import prior_runs
import pytest
import torch
from test_priors import batch, config_of, lively
from torch import nn

from vqscale import config as configuration
from vqscale import priors
from vqscale.codes import noise
from vqscale.nets.config.transformer import TransformerConfig
from vqscale.priors.base import SampleWarning
from vqscale.priors.conditions import Classes, Condition
from vqscale.priors.config.autoregressive import AutoregressiveConfig
from vqscale.priors.config.conditions import CONDITIONS, ConditionSettings

PARITY = {"name": "parity", "dropout": 0.25}


@dataclass(frozen=True)
class ParityConfig(ConditionSettings):
    module: ClassVar[str] = f"{__name__}:Parity"
    name: Literal["parity"] = "parity"
    """which condition"""
    dropout: float = 0.1
    """share of images that are trained without"""

    def check_labels(self, labels, path, num_classes):
        return [f"{path}: the labels of {(labels % 2).sum()} images are odd"]


class Parity(Condition):
    """Whether the label of an image is odd."""

    saved_as = "parity"
    num_classes = 2

    def __init__(self, config, net):
        super().__init__(config.condition.dropout)
        self.odd = nn.Parameter(torch.arange(3.0)[:, None, None].repeat(1, net.num_prefix, net.width))

    def of(self, batch):
        return batch.labels % 2

    def checked(self, condition, axis):
        return condition.bool()

    def forward(self, condition, null_B=None):
        rows_B = condition.long() if null_B is None else torch.where(null_B, 2, condition.long())
        return self.odd[rows_B]


def register(rank=0):
    CONDITIONS["parity"] = f"{__name__}:ParityConfig"


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(CONDITIONS, "parity", f"{__name__}:ParityConfig")


def test_no_class_is_a_class_of_its_own():
    config = AutoregressiveConfig(num_classes=3)
    classes = Classes(config, TransformerConfig(width=24, num_heads=2, num_prefix=2))
    rows = classes(torch.tensor([-1, 0, 2]))
    assert rows.shape == (3, 2, 24)
    assert torch.equal(rows.flatten(1), classes.table.weight[[3, 0, 2]])
    null = classes(torch.tensor([-1, 0, 2]), torch.tensor([False, True, False]))
    assert torch.equal(null, rows[[0, 0, 2]])


@pytest.mark.parametrize("scale", [0.02, 0.05])
def test_first_values_are_those_of_the_papers(scale):
    torch.manual_seed(0)
    classes = Classes(AutoregressiveConfig(num_classes=100), TransformerConfig(width=128, init_scale=scale))
    assert float(classes.table.weight.detach().std()) == pytest.approx(scale, rel=0.05)


def test_configs_from_before_there_were_conditions_mean_classes():
    prior = priors.build(config_of("autoregressive", class_dropout=0.3))
    assert isinstance(prior.condition, Classes)
    assert (prior.num_classes, prior.condition.dropout) == (4, 0.3)
    assert prior.classes is prior.condition
    assert "classes.table.weight" in dict(prior.named_parameters())
    named = priors.build(config_of("autoregressive", class_dropout=0.3, condition={"name": "classes"}))
    assert named.fingerprint == prior.fingerprint
    assert "condition" in configuration.to_dict(prior.config)


def test_guidance_towards_no_classes_is_warned_of():
    prior = priors.build(config_of("autoregressive", num_classes=0))
    with pytest.warns(SampleWarning, match="guidance is 2.0, but this prior has no classes to guide to"):
        prior.sample(torch.tensor([-1]), {"guidance": 2.0}, numbers_B=torch.tensor([0]))
    assert prior.remarks(prior.sample_config()) == []


def test_a_second_condition_makes_the_prefix_and_is_dropped_and_guided_by(registered):
    prior = lively(priors.build(config_of("autoregressive", condition=PARITY)))
    names = [name for name, _ in prior.named_parameters()]
    assert "parity.odd" in names
    assert not any(name.startswith("classes") for name in names)
    assert (prior.num_classes, prior.condition.dropout) == (2, 0.25)
    ids, _ = batch()
    odd, keys = torch.tensor([0, 1, 1, 0, 1, 0]), noise.keys(1, torch.arange(6))
    many = torch.zeros(4000, dtype=torch.int64)
    dropped = prior.condition.dropped(many, noise.keys(1, torch.arange(4000)))
    assert abs(float(dropped.double().mean()) - 0.25) < 0.03
    prior(ids, odd, keys).loss.backward()
    assert prior.condition.odd.grad.flatten(1).any(1).tolist() == [
        True,
        True,
        bool(prior.condition.dropped(odd, keys).any()),
    ]
    prior.eval()
    torch.testing.assert_close(prior(ids, odd).nats_B[:1], prior(ids[:1], odd[:1]).nats_B)
    numbers = torch.arange(6)
    away = prior.sample(odd, {"guidance": 0.0}, numbers_B=numbers)
    assert torch.equal(away, prior.sample(1 - odd, {"guidance": 0.0}, numbers_B=numbers))
    assert not torch.equal(prior.sample(odd, numbers_B=numbers), prior.sample(1 - odd, numbers_B=numbers))


def test_a_second_condition_is_saved_and_loaded(registered, tmp_path):
    prior = lively(priors.build(config_of("autoregressive", condition=PARITY)))
    loaded = priors.Prior.load(prior.save(tmp_path / "out"))
    assert loaded.config.condition == prior.config.condition == ParityConfig(dropout=0.25)
    assert loaded.fingerprint == prior.fingerprint
    assert torch.equal(loaded.condition.odd, prior.condition.odd)


@pytest.mark.slow
@pytest.mark.dist
def test_a_second_condition_is_trained(registered, tmp_path):
    caches = prior_runs.write_caches(tmp_path / "caches")
    path = prior_runs.write_config(tmp_path, caches, "prior.condition={name: parity, dropout: 0.3}")
    job = jobs.start(path, before=register)
    assert job.wait() == [0], job.output
    assert "images are odd" in job.output
    prior = priors.Prior.load(tmp_path / "run")
    first = torch.arange(3.0)[:, None, None].expand_as(prior.condition.odd)
    assert not torch.equal(prior.condition.odd[:2], first[:2])
