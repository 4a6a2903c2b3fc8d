"""Coarse-to-fine prediction: the stated distribution by enumeration, one cluster and one code per cluster, its stages
apart and together; IAR's loss.
"""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from test_priors import NET, STILL, batch, config_of
from torch.nn import functional as F

from vqscale import config as configuration
from vqscale import priors
from vqscale.codes import noise
from vqscale.codes.rows import Table
from vqscale.nets.mode import evaluating
from vqscale.priors import Prior
from vqscale.priors.base import SampleWarning
from vqscale.priors.coarse_to_fine import join

NAME = "coarse_to_fine"
SMALL = {"num_codes": 3, "grid": [3], "num_clusters": 2, "class_dropout": 0.0}


def trained(prior):
    """Values of a trained one's size in all of it, tables too; on one process."""
    torch.manual_seed(8)
    rows = {id(p) for part in prior.modules() if isinstance(part, Table) for p in part.parameters()}
    with torch.no_grad():
        for p in prior.parameters():
            p.add_((0.6 if id(p) in rows else 0.2) * torch.randn(p.shape))
    return prior.eval()


def enumerated(prior):
    """(every image of 3 ids of 3 codes, the probability that the prior states)."""
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))
    with torch.no_grad():
        return every, (-prior(every, torch.ones(27).long()).nats_B.double() * 3).exp()


def fits(prior, p, settings=None, num=4000):
    """Whether samples have these probabilities, by chi-square."""
    drawn = prior.sample(torch.ones(num).long(), settings, numbers_B=torch.arange(num))
    counts = torch.bincount((drawn.flatten(1) * torch.tensor([9, 3, 1])).sum(1), minlength=27)
    used = p * num > 1e-3
    if counts[~used].sum():
        return False
    statistic = float(((counts - num * p).square() / (num * p))[used].sum())
    return statistic < int(used.sum()) + 4.5 * math.sqrt(2 * int(used.sum()))


@pytest.mark.parametrize("stages", ["both", "coarse", "fine"])
def test_images_are_drawn_with_the_probability_that_is_stated(stages):
    prior = trained(priors.build(config_of(NAME, **SMALL, stages=stages)))
    _, p = enumerated(prior)
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-5)
    assert not prior.config.bound
    assert p.max() > 1.5 * p.min()
    assert fits(prior, p)
    assert not fits(prior, p.flip(0).roll(5))


def test_with_support_of_all_what_is_stated_is_of_coarse_and_fine_ids_together():
    prior = trained(priors.build(config_of(NAME, **SMALL, support="all")))
    every, p = enumerated(prior)
    clusters = torch.tensor(list(itertools.product(range(2), repeat=3)))
    labels = torch.ones(8).long()
    with torch.no_grad():
        coarse_C = (-prior.coarse(clusters, labels).nats_B.double() * 3).exp()
        fine_CTK = (prior.states(clusters, prior.prefix(labels)) @ prior.head.rows.t()).double().softmax(2)
    mixed = sum(coarse_C[c] * torch.stack([fine_CTK[c, t, every[:, t]] for t in range(3)]).prod(0) for c in range(8))
    assert float(mixed.sum()) == pytest.approx(1.0, abs=1e-5)
    assert (p < mixed).all()
    assert prior.config.bound == "each id counts with its own cluster, and others may give it too"
    own = torch.tensor([4 * a + 2 * b + c for a, b, c in (every * 2 // 3).tolist()])
    stated = coarse_C[own] * torch.stack([fine_CTK[own, t, every[:, t]] for t in range(3)]).prod(0)
    torch.testing.assert_close(p, stated, rtol=1e-4, atol=1e-7)
    assert fits(prior, mixed)


def test_temperature_and_top_k_are_of_their_stage():
    prior = trained(priors.build(config_of(NAME, **SMALL)))
    every, p = enumerated(prior)
    cluster = every * 2 // 3
    likeliest = prior.sample(torch.ones(5).long(), {"temperature": 0.0}, numbers_B=torch.arange(5))
    assert len((likeliest * 2 // 3).unique(dim=0)) == 1
    for settings in ({"fine_temperature": 0.0}, {"fine_top_k": 1}):
        best = torch.zeros(27).double()
        for c in cluster.unique(dim=0):
            same = (cluster == c).all(1)
            best[p.masked_fill(~same, -1).argmax()] = p[same].sum()
        assert fits(prior, best, settings)
    with torch.no_grad():
        logits = prior.states(cluster, prior.prefix(torch.ones(27).long())) @ prior.head.rows.t()
        within = (cluster[..., None] == torch.tensor([0, 0, 1])).log() + logits / 0.5
        hot = within.double().log_softmax(2).gather(2, every[..., None]).sum((1, 2)).exp()
        coarse = (-prior.coarse(cluster, torch.ones(27).long()).nats_B.double() * 3).exp()
    assert fits(prior, coarse * hot, {"fine_temperature": 0.5})


def test_one_cluster_is_a_prior_of_independent_ids_and_as_many_as_codes_is_the_first_stage():
    ids, labels = batch()
    one = trained(priors.build(config_of(NAME, num_clusters=1)))
    h = one.states(ids * 0, one.prefix(labels))
    nats = F.cross_entropy((h @ one.head.rows.t()).flatten(0, 1), ids.flatten())
    assert float(one(ids, labels).loss.detach()) == pytest.approx(float(nats.detach()), rel=1e-5)
    assert one(ids, labels).parts["coarse"].abs() < 1e-6

    each = trained(priors.build(config_of(NAME, num_clusters=23)))
    flat = each.coarse
    found, expected = each(ids, labels), flat(ids, labels)
    torch.testing.assert_close(found.nats_B, expected.nats_B)
    assert torch.equal(found.right_B, expected.right_B)
    assert found.parts["fine"] == 0
    numbers = torch.arange(6)
    assert torch.equal(each.sample(labels, numbers_B=numbers, seed=2), flat.sample(labels, numbers_B=numbers, seed=2))


def test_nats_are_the_sum_of_the_stages():
    ids, labels = batch()
    prior = trained(priors.build(config_of(NAME, num_clusters=5)))
    found, coarse = prior(ids, labels), prior.coarse(prior.clusters.of(ids), labels)
    assert float(found.parts["coarse"]) == pytest.approx(float(coarse.loss.detach()))
    assert float(found.parts["fine"] + coarse.parts["cross_entropy"]) == pytest.approx(float(found.loss.detach()))
    fine = torch.stack([(-found.nats_B + coarse.nats_B) * 12])  # log p(fine | coarse), of members alone
    logits = prior.states(prior.clusters.of(ids), prior.prefix(labels)) @ prior.head.rows.t()
    same = prior.clusters.of(ids).flatten(1)[..., None] == prior.clusters.cluster_k
    expected = logits.masked_fill(~same, -math.inf).log_softmax(2).gather(2, ids.flatten(1)[..., None]).sum((1, 2))
    torch.testing.assert_close(fine[0], expected.detach(), rtol=1e-4, atol=1e-4)


def test_noise_is_of_what_the_second_stage_is_shown_and_of_training():
    ids, labels = batch()
    keys = noise.keys(5, torch.arange(6))
    plain, noisy = (
        trained(priors.build(config_of(NAME, num_clusters=5, class_dropout=0.0, coarse_noise=x))) for x in (0.0, 0.5)
    )
    assert torch.equal(noisy(ids, labels).nats_B, plain(ids, labels).nats_B)
    noisy.train(), plain.train()
    one, other = noisy(ids, labels, keys), plain(ids, labels, keys)
    assert one.parts["coarse"] == other.parts["coarse"]
    assert one.parts["fine"] != other.parts["fine"]
    torch.testing.assert_close(noisy(ids[2:4], labels[2:4], keys[2:4]).nats_B, one.nats_B[2:4])
    many = torch.zeros(300, 3, 4).long()
    shown = noisy._noisy(many, noise.keys(1, torch.arange(300)))
    assert float((shown != 0).double().mean()) == pytest.approx(0.5 * 4 / 5, abs=0.03)


def test_the_second_stage_need_not_know_the_class():
    ids, labels = batch()
    prior = trained(priors.build(config_of(NAME, num_clusters=5, fine_condition=False)))
    one, other = prior(ids, labels), prior(ids, (labels + 1).clamp(max=3))
    assert one.parts["coarse"] != other.parts["coarse"]
    assert one.parts["fine"] == other.parts["fine"]
    with pytest.warns(SampleWarning, match="fine_guidance is 2.0, but the fine stage of this prior does not know"):
        prior.sample(labels, {"fine_guidance": 2.0}, numbers_B=torch.arange(6))


def test_guidance_of_the_fine_stage_leads_away_from_the_null_class():
    ids, labels = batch()
    prior = trained(priors.build(config_of(NAME, num_clusters=1)))
    h, null = (prior.states(ids * 0, prior.prefix(x)) for x in (labels, labels * 0 - 1))
    guided = ((null + 3 * (h - null)) @ prior.head.rows.t()).argmax(2)
    drawn = prior.sample(labels, {"fine_guidance": 3.0, "fine_temperature": 0.0}, numbers_B=torch.arange(6))
    assert torch.equal(drawn.flatten(1), guided)


def test_stages_that_were_trained_apart_are_joined(tmp_path):
    ids, labels = batch()
    two = {stage: trained(priors.build(config_of(NAME, num_clusters=5, stages=stage))) for stage in ("coarse", "fine")}
    joined = join(two["coarse"], two["fine"])
    joined.save(tmp_path / "out")
    loaded = Prior.load(tmp_path / "out")
    assert loaded.config.stages == "both"
    assert loaded.fingerprint == joined.fingerprint
    for prior in (joined, loaded):
        found = prior(ids, labels).parts
        for stage, part in two.items():
            assert found[stage] == part(ids, labels).parts[stage]
    with pytest.raises(ValueError, match=r"cannot be joined: coarse \(the stages"):
        join(two["fine"], two["fine"])
    two["fine"].clusters.take(two["fine"].clusters.cluster_k.flip(0))
    with pytest.raises(ValueError, match=r"other clusters of the codes: train both with the same prior\.clusters"):
        join(two["coarse"], two["fine"])


@pytest.mark.parametrize(
    ("stages", "settings"),
    [("coarse", {"fine_temperature": 0.9}), ("coarse", {"fine_top_k": 3}), ("fine", {"temperature": 0.9})],
)
def test_a_temperature_of_a_stage_that_is_not_there_is_an_error(stages, settings):
    prior = priors.build(config_of(NAME, stages=stages))
    [(key, value)] = settings.items()
    there = "coarse" if stages == "fine" else "fine"
    with pytest.raises(ValueError, match=f"{key} is {value}, and there is no {there} stage in this prior"):
        prior.sample(torch.arange(2), settings, numbers_B=torch.arange(2))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_clusters": 24}, "num_clusters is 24 and num_codes 23: each code is in one cluster"),
        ({"num_clusters": 0}, "num_clusters is 0 and num_codes 23"),
        ({"num_clusters": None}, "num_clusters: null is as"),
        ({"head": {"embedding": "rows"}}, "head.embedding: the second stage embeds no fine ids"),
        ({"coarse_noise": 1.0}, "coarse_noise is 1.0"),
        ({"fine_net": NET | STILL | {"width": 12, "num_heads": 2}}, "fine_net.num_heads: a head of 6 numbers"),
    ],
)
def test_what_cannot_be_built_is_said(keys, said):
    with pytest.raises(configuration.ConfigError, match=re.escape(said)):
        priors.build(config_of(NAME, **keys))


def test_the_cluster_loss_is_that_of_the_log_sum_exp_of_members():
    ids, labels = batch()
    more = {"label_smoothing": 0.1, "z_loss": 0.01, "class_dropout": 0.0, "num_clusters": 5}
    prior = trained(priors.build(config_of("autoregressive", cluster_weight=0.7, **more))).double().train()
    found = prior(ids, labels)
    found.loss.backward()
    got = {name: p.grad.clone() for name, p in prior.named_parameters()}
    prior.zero_grad()
    l_NK = (prior.states(ids, prior.prefix(labels)) @ prior.head.rows.t()).flatten(0, 1)
    cluster_K = prior.clusters.cluster_k
    members_NG = torch.stack([l_NK[:, cluster_K == g].logsumexp(1) for g in range(5)], 1)
    expected = F.cross_entropy(l_NK, ids.flatten(), label_smoothing=0.1)
    expected = expected + 0.01 * l_NK.logsumexp(1).square().mean()
    expected = expected + 0.7 * F.cross_entropy(members_NG, cluster_K[ids.flatten()])
    expected.backward()
    torch.testing.assert_close(found.loss, expected)
    for name, p in prior.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-6, atol=1e-9)
    with evaluating(prior):
        plain = prior(ids, labels)
    torch.testing.assert_close(plain.loss, F.cross_entropy(l_NK, ids.flatten()))
