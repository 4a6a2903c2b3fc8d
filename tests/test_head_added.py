"""A head is one file and one line: with one that is added a prior learns, draws, is saved, is cut over ranks."""

from __future__ import annotations

import pair_head
import pytest
import torch
from whole import CODES, close, mine, normal

from vqscale import priors
from vqscale.codes.heads import HEADS, build
from vqscale.codes.heads.base import Vocabulary
from vqscale.codes.heads.config import FlatConfig, HeadConfig
from vqscale.codes.rows import set_aside
from vqscale.config import describe, parse, to_dict
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.priors import Prior
from vqscale.priors.config.autoregressive import AutoregressiveConfig
from vqscale.tokenizer.export import _identity

CODES_OF_ALL, DIM = 12, 8
TINY = {"width": DIM, "num_heads": 2, "num_layers": 1, "num_prefix": 1}
SETTINGS = {"name": "autoregressive", "num_codes": CODES_OF_ALL, "grid": [2, 2], "num_classes": 2, "net": TINY}


@pytest.fixture(autouse=True)
def added(monkeypatch):
    """The line, in this process."""
    for name, settings in pair_head.LINE.items():
        monkeypatch.setitem(HEADS, name, settings)


def pair(mesh=None, **head) -> Prior:
    return priors.build({**SETTINGS, "head": {"name": "pair", **head}}, mesh, seed=1)


def test_a_config_without_a_name_is_the_flat_head():
    for head in ({}, {"head": {"products": "bf16"}}, {"head": {"name": "flat", "products": "bf16"}}):
        config = parse(AutoregressiveConfig, {**SETTINGS, **head})
        assert config.head == FlatConfig(**head.get("head", {}))
        assert to_dict(config)["head"]["name"] == "flat"


def test_the_fingerprint_of_a_flat_head_is_that_of_when_it_had_no_name():
    assert _identity(FlatConfig(products="bf16", neighbours=0)) == {"products": "bf16"}  # as a run settles it
    assert _identity(pair_head.PairConfig()) == {"name": "pair"}


def test_help_and_errors_know_it():
    assert "head.name=pair" in describe(AutoregressiveConfig)
    with pytest.raises(ValueError, match="did you mean pair"):
        priors.build({**SETTINGS, "head": {"name": "pear"}})
    with pytest.raises(ValueError, match=r"embedding.*belongs to flat"):
        pair(embedding="tied")
    with pytest.raises(ValueError, match=r"scan_mib is 0"):
        pair(scan_mib=0)


def test_its_losses_are_those_of_a_distribution_and_its_draws_follow_it():
    head = build(parse(HeadConfig, {"name": "pair"}), CODES_OF_ALL, DIM, Mesh(), seed=1)
    assert isinstance(head, Vocabulary)
    for parameter in head.parameters():
        parameter.data = normal(*parameter.shape, seed=len(parameter)).float()
    h_D, every = 0.5 * normal(DIM, seed=3).float(), torch.arange(CODES_OF_ALL)
    p_K = torch.exp(-head.losses(h_D.expand(CODES_OF_ALL, -1), every).whole_N).detach()
    close(p_K.sum(), torch.tensor(1.0), 1e-5)
    drawn = head.sample(h_D.expand(20000, -1), torch.arange(20000))
    share_K = torch.bincount(drawn, minlength=CODES_OF_ALL) / 20000
    assert float((share_K - p_K).abs().max()) < 4 * (0.25 / 20000) ** 0.5
    assert head.embed(torch.tensor([[3, -1]])).shape == (1, 2, DIM)
    assert not head.embed(torch.tensor([-1])).any()


def test_its_tables_are_set_aside_and_drawn_on_no_device():
    with torch.device("meta"):
        prior = pair()
    tables = set_aside(prior)
    digits = {"head.high": CODES_OF_ALL // 4, "head.low": 4}
    assert {name: table.num_codes for name, table in tables.items()} == {
        f"{head}.{part}": size for head, size in digits.items() for part in ("inputs", "outputs")
    }
    assert not any("head" in name for name, _ in prior.named_parameters())


def test_a_prior_learns_with_it_draws_from_it_and_is_saved(tmp_path):
    prior = pair().train()
    ids, labels = torch.tensor([[[0, 5], [7, 11]], [[3, 2], [1, 8]]]), torch.tensor([0, 1])
    optimiser = torch.optim.AdamW(prior.parameters(), lr=0.02)
    seen = []
    for step in range(150):
        found = prior.loss(ids, labels, torch.arange(2) + 2 * step)
        found.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        seen.append(float(found.loss.detach()))
    assert seen[0] == pytest.approx(float(torch.tensor(CODES_OF_ALL).log()), rel=1e-4)
    assert seen[-1] < 0.5
    options = {"temperature": 0.0, "guidance": 1.5}
    assert torch.equal(prior.sample(labels, options, numbers_B=torch.arange(2)), ids)
    prior.eval().save(tmp_path / "prior")
    again = Prior.load(tmp_path / "prior")
    assert type(again.head) is pair_head.Pair
    assert again.fingerprint == prior.fingerprint
    many = torch.arange(6) % 2
    first, second = (one.sample(many, numbers_B=torch.arange(6), seed=4) for one in (prior, again))
    assert torch.equal(first, second)


def _on(codes):
    pair_head.register()
    try:
        mesh = Mesh(1, codes)
        prior = pair(mesh).double().eval()
        for name, parameter in prior.named_parameters():
            if "head" in name:  # the output rows begin at zero
                whole = torch.arange(12 * DIM, dtype=torch.float64).view(12, DIM).sin()
                table = prior.get_submodule(name.rpartition(".")[0])
                parameter.data = whole[table.layout.start : table.layout.stop].clone()
        ids, labels = (torch.arange(16).view(4, 2, 2) * 5) % CODES_OF_ALL, torch.tensor([0, 1, 1, 0])
        found = prior.loss(mine(ids, mesh), mine(labels, mesh))
        found.loss.backward()
        grads = [p.grad for name, p in sorted(prior.named_parameters()) if "head" not in name]
        return (
            found.nats_B,
            prior.sample(mine(labels, mesh), numbers_B=mine(torch.arange(4), mesh), seed=2),
            [ops.sum_over(grad, mesh.world) / codes for grad in grads],
        )
    finally:
        del HEADS["pair"]


@pytest.mark.slow
@pytest.mark.parametrize("codes", CODES[1:2])
def test_it_computes_and_draws_the_same_on_two_processes(ranks, codes, monkeypatch):
    results = ranks(codes, _on, codes)
    nats, drawn, grads = _on(1)
    monkeypatch.setitem(HEADS, *next(iter(pair_head.LINE.items())))
    close(torch.cat([result[0] for result in results]), nats)
    assert torch.equal(torch.cat([result[1] for result in results]), drawn)
    for got, expected in zip(results[0][2], grads, strict=True):
        close(got, expected)
