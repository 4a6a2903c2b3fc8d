"""Every prior of PRIORS keeps the contract of base.py: losses, samples and gradients, on one rank and on two."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from dataclasses import dataclass, fields

import pytest
import torch
from torch.nn import functional as F
from whole import engine_gradient

from vqscale import config as configuration
from vqscale import priors
from vqscale.codes import noise
from vqscale.codes.heads import dense
from vqscale.codes.rows import Table, set_aside
from vqscale.config import load_class
from vqscale.config.schema import doc_lines
from vqscale.nets.decoding import OneToken
from vqscale.nets.transformer import KVCache, Transformer, rotary
from vqscale.parallel.mesh import Mesh
from vqscale.priors import PRIORS
from vqscale.priors.autoregressive import Incremental
from vqscale.priors.base import SampleWarning
from vqscale.priors.config import SampleConfig
from vqscale.priors.config.autoregressive import AutoregressiveSampleConfig
from vqscale.priors.guidance import guidance_scales
from vqscale.seed import derive

CODES, GRID, CLASSES, BATCH = 23, (3, 4), 4, 6
NET = {"width": 24, "num_layers": 2, "num_heads": 2, "ffn_multiple": 8, "adaln": True, "qk_norm": True}
STILL = {"dropout_token": 0.0, "dropout_residual": 0.0, "dropout_ffn": 0.0}
CONFIGS = {"autoregressive": {"net": NET | STILL}, "masked": {"net": NET | STILL}}
CONFIGS["coarse_to_fine"] = {"net": NET | STILL, "fine_net": NET | STILL | {"width": 32}, "num_clusters": 2}
PARALLEL = [1, pytest.param(2, marks=pytest.mark.dist)]


def config_of(name: str, **more) -> dict:
    return {"name": name, "num_codes": CODES, "grid": list(GRID), "num_classes": CLASSES, **CONFIGS[name], **more}


def lively(prior):
    """Values of a trained one's size, the same on any number of ranks; first values make all ids equally likely."""
    whole = torch.randn(CODES, prior.head.dim, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(6)
    rows = {id(p) for part in prior.modules() if isinstance(part, Table) for p in part.parameters()}
    with torch.no_grad():
        for p in prior.parameters():
            if id(p) not in rows:
                p.add_(0.2 * torch.randn(p.shape))
        prior.head.rows.copy_(whole[prior.head.layout.start : prior.head.layout.stop])
    return prior


def batch():
    ids = torch.randint(CODES, (BATCH, *GRID), generator=torch.Generator().manual_seed(1))
    return ids, torch.tensor([0, 1, 2, 3, -1, 0])


def part(x, mesh):
    return x.chunk(mesh.world.size)[mesh.world.rank]


def untrained_loss(name, codes):
    mesh = Mesh(codes=codes)
    prior = priors.build(config_of(name), mesh)
    ids, labels = batch()
    modelled = prior(part(ids, mesh), part(labels, mesh))
    return modelled.loss.item(), modelled.nats_B.tolist()


def first_nats(name, ids):
    """log K; of coarse to fine log 2, for a cluster, and the logarithm of the 12 or 11 codes in it."""
    each = torch.full(ids.shape, math.log(CODES)).double()
    if name == "coarse_to_fine":
        each = math.log(2) + torch.tensor([12.0, 11.0]).double().log()[ids * 2 // CODES]
    return each.flatten(1).mean(1)


@pytest.mark.parametrize("world", PARALLEL)
@pytest.mark.parametrize("name", PRIORS)
def test_the_first_loss_is_log_k(ranks, name, world):
    results = [untrained_loss(name, 1)] if world == 1 else ranks(world, untrained_loss, name, world)
    nats_B = first_nats(name, batch()[0])
    for (loss, nats), expected in zip(results, nats_B.chunk(world), strict=True):
        assert [loss, *nats] == pytest.approx([float(expected.mean()), *expected.tolist()], abs=1e-6)


def gradients(name, codes):
    """(loss, dense gradients, gradients of this rank's rows) of this rank's part of the batch."""
    mesh = Mesh(codes=codes)
    prior = lively(priors.build(config_of(name, label_smoothing=0.1, z_loss=1e-3, class_dropout=0.5), mesh)).double()
    tables = set_aside(prior)
    ids, labels = batch()
    keys = noise.keys(1, torch.arange(BATCH))
    loss = prior(part(ids, mesh), part(labels, mesh), part(keys, mesh)).loss
    loss.backward()
    dense = {n: p.grad for n, p in prior.named_parameters()}
    return loss.detach(), dense, {n: p.grad for n, table in tables.items() for p in table.parameters()}


@pytest.mark.dist
@pytest.mark.parametrize("name", PRIORS)
def test_gradients_do_not_depend_on_how_the_head_is_split(ranks, name):
    loss, dense, rows = gradients(name, 1)
    results = ranks(2, gradients, name, 2)
    torch.testing.assert_close(sum(other for other, _, _ in results) / 2, loss)
    for key, expected in dense.items():
        got = sum(found[key] for _, found, _ in results) / 2
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")
    for key, expected in rows.items():
        got = engine_gradient([found[key] for _, _, found in results], 2)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIORS)
def test_it_learns_one_batch_by_heart(name):
    prior = priors.build(config_of(name, class_dropout=0.0), seed=1)
    ids, _ = batch()
    ids, labels = ids[:CLASSES], torch.arange(CLASSES)
    adam = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for _ in range(60):
        loss = prior(ids, labels).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert loss < 0.05
    greedy = {key: 0.0 for key in priors.sampling(name).dials() if key.endswith("temperature")}
    again = prior.sample(labels, greedy, numbers_B=torch.arange(CLASSES))
    assert torch.equal(again, ids)
    assert prior.training


def draws(name, order, options, codes):
    mesh = Mesh(codes=codes)
    prior = lively(priors.build(config_of(name), mesh))
    _, labels = batch()
    order = torch.tensor(order)
    return prior.sample(part(labels[order], mesh), options, numbers_B=part(100 + order, mesh), seed=3)


OPTIONS = [{}, {"guidance": 2.0, "temperature": 0.9}, {"guidance": 3.0, "schedule": "cosine", "top_k": 7, "top_p": 0.9}]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", PRIORS)
def test_samples_are_legal_and_follow_from_their_number(name, options):
    there = draws(name, range(BATCH), options, 1)
    assert there.shape == (BATCH, *GRID)
    assert there.dtype == torch.int64
    assert there.min() >= 0
    assert there.max() < CODES
    assert len(there.unique(dim=0)) >= BATCH - 1  # two are of one class
    order = [4, 1, 5, 0, 2, 3]
    assert torch.equal(draws(name, order, options, 1), there[order])
    assert torch.equal(draws(name, order[:2], options, 1), there[order[:2]])
    for one in fields(priors.sampling(name)):
        if "off" in one.metadata:
            assert torch.equal(draws(name, range(BATCH), {**options, one.name: False}, 1), there)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", PRIORS)
def test_samples_are_the_same_on_two_processes(ranks, name):
    for options in OPTIONS[1:]:
        results = ranks(2, draws, name, list(range(BATCH)), options, 2)
        assert torch.equal(torch.cat(results), draws(name, range(BATCH), options, 1))


@pytest.mark.parametrize("name", [name for name in PRIORS if not load_class(PRIORS[name])().bound])
def test_a_sample_has_its_probability(name):
    """All 3^2 images of two ids: the losses are those of a distribution, and images are drawn from it."""
    prior = priors.build(config_of(name, num_codes=3, grid=[1, 2]), seed=2).eval()
    torch.manual_seed(7)
    with torch.no_grad():
        prior.head.rows.normal_()
    every = torch.tensor(list(itertools.product(range(3), repeat=2)))[:, None]
    nats = prior(every, torch.full((9,), 1)).nats_B * 2
    p = (-nats).exp()
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-5)
    num = 3000
    drawn = prior.sample(torch.full((num,), 1), numbers_B=torch.arange(num))
    counts = torch.bincount((drawn.flatten(1) * torch.tensor([3, 1])).sum(1), minlength=9)
    statistic = float(((counts - num * p).square() / (num * p)).sum())
    assert statistic < 8 + 4.5 * math.sqrt(2 * 8), counts  # chi-square of 8 degrees of freedom


EACH = [
    {"temperature": 0.5},
    {"top_k": 2},
    {"top_p": 0.6},
    {"guidance": 2.0, "top_k": 3},
    {"guidance": 3.0, "schedule": "linear"},
    {"guidance": 3.0, "schedule": "cosine", "temperature": 1.5, "top_p": 0.8},
]


@pytest.mark.parametrize("options", EACH, ids=str)
@torch.no_grad()
def test_every_option_of_sampling_does_what_it_says(options):
    """Each id is the Gumbel maximum of the dense distribution given the class and the ids before it, with the noise of
    its seed, image and position; in float64, where two are hardly ever within rounding. Nothing is dropped out."""
    net = NET | dict.fromkeys(STILL, 0.3)
    prior = lively(priors.build(config_of("autoregressive", class_dropout=0.5, net=net))).double()
    labels, numbers = torch.arange(40) % CLASSES, torch.arange(7, 47)
    scales = guidance_scales(options.get("guidance", 1.0), options.get("schedule", "constant"), math.prod(GRID))
    rule = {key: x for key, x in options.items() if key in ("temperature", "top_k", "top_p")}
    found = []
    for seed in (0, 3):
        ids = prior.train().sample(labels, options, numbers_B=numbers, seed=seed)
        given = (labels, torch.full_like(labels, -1))
        h_BTD, null_BTD = (prior.eval().states(ids, prior.prefix(classes)) for classes in given)
        for at, (scale, drawn_B) in enumerate(zip(scales, ids.flatten(1).t(), strict=True)):
            p_BK = dense.distribution(
                h_BTD[:, at], prior.head.rows, unguided_ND=null_BTD[:, at], guidance=scale, **rule
            )
            g_BK = noise.gumbel(noise.keys(derive(seed, "sample"), numbers, at), 0, CODES, torch.float64)
            assert torch.equal(drawn_B, (p_BK.log() + g_BK).argmax(1))
        found += [ids, prior.sample(labels, numbers_B=numbers, seed=seed)]
    for one, other in itertools.combinations(found, 2):
        assert not torch.equal(one, other)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_a_prior_of_no_numbers_draws_nothing(options):
    prior = priors.build(config_of("autoregressive"))
    with torch.no_grad():
        prior.net.norm.weight[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"6 of the 6 tokens .*\(token 0, 1, 2, 3, 4 \.\.\.\).*checkpoint"):
        prior.sample(torch.arange(6) % CLASSES, numbers_B=torch.arange(6), settings=options)


@pytest.mark.parametrize("net", [{}, {"num_prefix": 2}, {"num_prefix": 3, "prefix_rotary": "zero", "adaln": False}])
@torch.no_grad()
def test_the_cache_gives_the_logits_of_the_whole_sequence(net):
    prior = lively(priors.build(config_of("autoregressive", net=NET | STILL | net))).eval().double()
    ids, labels = batch()
    halves = [prior.prefix(labels), prior.prefix(labels, null=True)]
    logits = {}
    for cached in (True, False):
        sequence = Incremental(prior, halves, AutoregressiveSampleConfig(cached=cached))
        steps = [sequence.advance(), *(sequence.advance(one) for one in ids.flatten(1).t()[:-1])]
        logits[cached] = torch.stack(steps, 1) @ prior.head.rows.t()
    torch.testing.assert_close(logits[True], logits[False], rtol=1e-5, atol=1e-5)
    whole = torch.cat([prior.states(ids, half) for half in halves]) @ prior.head.rows.t()
    torch.testing.assert_close(logits[True], whole, rtol=1e-5, atol=1e-5)
    nats = F.cross_entropy(whole[:BATCH].flatten(0, 1), ids.flatten())
    assert float(prior(ids, labels).loss) == pytest.approx(float(nats), rel=1e-5)


@pytest.mark.parametrize(
    ("how", "tokens", "single"),
    [({}, [1], 11), ({"cached": False}, list(range(1, 13)), 0), ({"packed": False}, [1] * 12, 0)],
    ids=str,
)
def test_without_the_cache_every_position_is_computed_from_the_beginning(how, tokens, single, monkeypatch):
    prior, seen, steps = priors.build(config_of("autoregressive")), [], []
    call = OneToken.__call__
    monkeypatch.setattr(OneToken, "__call__", lambda self, x_BD: steps.append(len(x_BD)) or call(self, x_BD))
    prior.net.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    prior.sample(torch.arange(2), numbers_B=torch.arange(2), settings=how)
    assert seen == tokens
    assert steps == [2] * single


@torch.no_grad()
def test_unpacked_a_token_passes_through_the_network_to_the_bit():
    """The arithmetic of samples that were begun before there was another."""
    prior = lively(priors.build(config_of("autoregressive", net=NET | STILL))).eval()
    ids, labels = batch()
    prefix_BPD = prior.prefix(labels)
    sequence = Incremental(prior, [prefix_BPD], AutoregressiveSampleConfig(packed=False))
    net, turns = prior.config.net, rotary(prior.config.net, prior.grid)
    cache, adapt = KVCache(net, BATCH, len(turns), prefix_BPD), prior.net.adapt(prefix_BPD[:, 0])
    given, x_BTD = None, prefix_BPD
    for one in [*ids.flatten(1).t()[:-1], None]:
        first = cache.filled
        h_BTD = prior.net(x_BTD, turns[first : first + x_BTD.shape[1]], adapt, cache=cache)
        assert torch.equal(sequence.advance(given), h_BTD[:, -1])
        given, x_BTD = one, one if one is None else prior.head.embed(one)[:, None]


@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_bf16_rounds_the_transformer_and_not_the_head(cached):
    prior = lively(priors.build(config_of("autoregressive", net=NET | STILL))).eval()
    ids, labels = batch()
    found = {}
    for precision in ("fp32", "bf16"):
        how = AutoregressiveSampleConfig(cached=cached, precision=precision)
        sequence = Incremental(prior, [prior.prefix(labels)], how)
        found[precision] = torch.stack(
            [sequence.advance(), *(sequence.advance(one) for one in ids.flatten(1).t()[:-1])]
        )
    assert found["bf16"].dtype == torch.float32
    distance = (found["bf16"] - found["fp32"]).norm() / found["fp32"].norm()
    assert 1e-5 < distance < 2e-2
    assert not torch.is_autocast_enabled("cpu")
    numbers, kinds = torch.arange(BATCH), []
    sample = prior.head.sample
    prior.head.sample = lambda h, *a, **b: (
        kinds.append((h.dtype, torch.is_autocast_enabled("cpu"))) or sample(h, *a, **b)
    )
    there = prior.sample(labels, {"cached": cached, "precision": "bf16"}, numbers_B=numbers)
    assert set(kinds) == {(torch.float32, False)}
    assert torch.equal(prior.sample(labels, {"cached": cached, "precision": "bf16"}, numbers_B=numbers), there)


def test_no_guidance_costs_nothing_and_guidance_0_is_the_null_class(monkeypatch):
    prior = lively(priors.build(config_of("autoregressive")))
    _, labels = batch()
    numbers, seen = torch.arange(BATCH), []
    forward = Transformer.forward

    def watched(self, x, *args, **more):
        h = forward(self, x, *args, **more)
        seen.append(len(x))
        assert not h.requires_grad
        return h

    monkeypatch.setattr(Transformer, "forward", watched)
    plain = prior.sample(labels, numbers_B=numbers)
    assert set(seen) == {BATCH}
    assert torch.equal(prior.sample(labels, {"guidance": 1.0, "schedule": "linear"}, numbers_B=numbers), plain)
    assert set(seen) == {BATCH}
    null = prior.sample(torch.full_like(labels, -1), numbers_B=numbers)
    assert torch.equal(prior.sample(labels, {"guidance": 0.0}, numbers_B=numbers), null)
    assert set(seen) == {BATCH, 2 * BATCH}


def test_first_values_follow_from_the_seed():
    one, again, other = (dict(priors.build(config_of("autoregressive"), seed=n).named_parameters()) for n in (1, 1, 2))
    drawn = [name for name, x in one.items() if x.unique().numel() > 1]
    assert {"head.inputs.rows", "classes.table.weight", "net.blocks.0.attention.qkv.weight"} <= set(drawn)
    for name in one:
        assert torch.equal(one[name], again[name])
        assert torch.equal(one[name], other[name]) == (name not in drawn), name


def test_guidance_over_the_positions():
    assert guidance_scales(3.0, "constant", 5) == [3.0] * 5
    assert guidance_scales(3.0, "linear", 5) == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0])
    assert guidance_scales(3.0, "cosine", 5) == pytest.approx([1.0, 1.29289, 2.0, 2.70711, 3.0], abs=1e-5)
    assert guidance_scales(2.0, "cosine", 1) == [1.0]
    with pytest.raises(ValueError, match=r"schedule is 'sine'.*constant, linear, cosine"):
        guidance_scales(2.0, "sine", 4)


@pytest.mark.parametrize("name", PRIORS)
def test_what_is_random_in_training_follows_from_the_keys(name):
    prior = lively(priors.build(config_of(name, class_dropout=0.5)))
    labels, keys = torch.arange(4000) % CLASSES, noise.keys(1, torch.arange(4000))
    dropped = prior.condition.dropped(labels, keys)
    assert abs(float(dropped.double().mean()) - 0.5) < 0.04
    assert torch.equal(prior.condition.dropped(labels[7:90], keys[7:90]), dropped[7:90])
    expected = prior.condition(torch.where(dropped, -1, labels))
    assert torch.equal(prior.prefix(labels, keys), expected)
    assert len(expected.unique(dim=0)) == CLASSES + 1
    assert torch.equal(prior.eval().prefix(labels, keys), prior.condition(labels))
    ids, few = batch()
    assert torch.equal(prior(ids, few).nats_B, prior(ids, few).nats_B)


SMOOTHED = [{"label_smoothing": 0.2}, {"z_loss": 0.1}]


@pytest.mark.parametrize("more", SMOOTHED, ids=str)
@pytest.mark.parametrize("name", PRIORS)
def test_smoothing_is_for_training(name, more):
    given = (*batch(), noise.keys(1, torch.arange(BATCH)))
    plain = lively(priors.build(config_of(name, class_dropout=0.0)))
    smooth = lively(priors.build(config_of(name, class_dropout=0.0, **more)))
    assert abs(smooth(*given).loss - plain(*given).loss) > 0.01
    assert torch.equal(smooth.eval()(*given).nats_B, plain.eval()(*given).nats_B)


@pytest.mark.parametrize("more", SMOOTHED, ids=str)
@torch.no_grad()
def test_the_loss_is_that_of_the_formulas(more):
    prior = lively(priors.build(config_of("autoregressive", class_dropout=0.0, **more)))
    ids, labels = batch()
    logits = prior.states(ids, prior.prefix(labels)).flatten(0, 1) @ prior.head.rows.t()
    expected = F.cross_entropy(logits, ids.flatten(), label_smoothing=more.get("label_smoothing", 0.0))
    expected += more.get("z_loss", 0.0) * logits.logsumexp(1).square().mean()
    assert float(prior(ids, labels).loss) == pytest.approx(float(expected), rel=1e-5)


def test_the_fingerprint_knows_every_weight():
    prior = priors.build(config_of("autoregressive"))
    before = prior.fingerprint
    assert before == priors.build(config_of("autoregressive")).fingerprint
    with torch.no_grad():
        prior.head.rows[-1, -1] += 1e-3
    assert prior.fingerprint != before


@pytest.mark.parametrize("name", PRIORS)
def test_what_does_not_fit_is_said(name):
    prior = priors.build(config_of(name, class_dropout=0.0))
    ids, labels = batch()
    with pytest.raises(ValueError, match=r"classes must be in -1 \(none\) \.\. 3.*go from -1 to 4"):
        prior(ids, labels.clamp(max=2) + 2 * (labels == 3) + (labels == 2) * 2)
    with pytest.raises(ValueError, match=r"classes must be in"):
        prior.sample(torch.tensor([-2]), numbers_B=torch.tensor([0]))
    for wrong in (-1, CODES):
        with pytest.raises(ValueError, match=f"must be in .* {CODES - 1}, for there are {CODES} codes"):
            prior(ids.masked_fill(ids == ids[0, 0, 0], wrong), labels)
    with pytest.raises(ValueError, match=re.escape("ids have the shape [6, 4, 3]") + ".*one of 3 x 4 ids"):
        prior(ids.transpose(1, 2), labels)
    with pytest.raises(ValueError, match=r"conditions have the shape \[6\] and numbers_B \[5\]"):
        prior.sample(labels, numbers_B=torch.arange(5))
    with pytest.warns(SampleWarning, match=r"guidance is 2.0.*class_dropout 0: its null class has its first values"):
        prior.sample(labels, {"guidance": 2.0}, numbers_B=torch.arange(6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior.sample(labels, numbers_B=torch.arange(6))


@dataclass(frozen=True)
class OtherSampleConfig(SampleConfig):
    """Of no prior."""


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperatur": 1.0}, "settings: temperatur: unknown key; did you mean temperature"),
        ({"schedule": "sine"}, "expected constant | linear | cosine, found the text 'sine'"),
        ({"top_k": -1, "top_p": 0.0}, "top_k is -1: use at least 0"),
        (AutoregressiveSampleConfig(temperature=-1.0), "temperature is -1.0: use 0 (the likeliest id) or more"),
        (OtherSampleConfig(), "settings are OtherSampleConfig, and the prior autoregressive is sampled as its Auto"),
    ],
    ids=str,
)
def test_settings_that_are_not_those_of_the_prior_are_refused(settings, said):
    prior = priors.build(config_of("autoregressive"))
    with pytest.raises(ValueError, match=re.escape(said)):
        prior.sample(torch.arange(2), settings, numbers_B=torch.arange(2))


@pytest.mark.parametrize("name", PRIORS)
def test_settings_at_their_default_say_nothing_and_are_those_of_no_settings(name):
    kind = priors.sampling(name)
    assert kind().unusual() == {}
    assert list(kind().problems()) == []
    assert set(kind.dials()) <= set(doc_lines(kind))
    prior, numbers = lively(priors.build(config_of(name))), torch.arange(4)
    assert torch.equal(prior.sample(numbers, kind(), numbers_B=numbers), prior.sample(numbers, numbers_B=numbers))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_codes": 0}, "num_codes is 0"),
        ({"grid": [0, 3]}, r"grid is \[0, 3\]"),
        ({"class_dropout": 1.0}, "class_dropout is 1.0"),
        ({"head": {"embedding": "codebook"}}, "feature_dim: null is as .* a tokenizer says"),
        ({"num_codes": None, "grid": None}, r"2 problems:\n  prior: num_codes: null .*\n  prior: grid: null"),
        ({"feature_dim": 8}, "feature_dim is 8, and this head takes no vectors of codes"),
        ({"num_code": 8}, "did you mean num_codes"),
        ({"name": "autoregresive"}, "did you mean autoregressive"),
    ],
)
def test_what_cannot_be_built(keys, said):
    with pytest.raises(configuration.ConfigError, match=said):
        priors.build({"name": "autoregressive", **keys})


def test_every_prior_is_tested():
    assert set(CONFIGS) == set(PRIORS)
