"""The context as a condition: published counts, the prefix against its definition, every prior, ranks and guidance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_priors import BATCH, CONFIGS, batch, config_of, lively, part
from torch.nn import functional as F

from vqscale import config as configuration
from vqscale import priors
from vqscale.codes import noise
from vqscale.nets.config.vit import ImageEncoderConfig
from vqscale.nets.vit import ImageEncoder
from vqscale.parallel.mesh import Mesh
from vqscale.plan import prior as planned
from vqscale.priors import PRIORS
from vqscale.priors.config import PriorConfig
from vqscale.train.config import Run

SHIPPED = Path(__file__).parents[1] / "configs"
CONDITION = {"name": "context", "image_size": 8, "patch": 2, "pool": 2, "dropout": 0.5}
CONDITION |= {"width": 12, "num_layers": 1, "num_heads": 2, "mlp_width": 16}
GREEDY = {"autoregressive": {"temperature": 0.0}, "masked": {"temperature": 0.0, "steps": 4, "order_noise": 0.0}}
GREEDY["coarse_to_fine"] = {"temperature": 0.0, "fine_temperature": 0.0}


def asked(name, condition=CONDITION, **more):
    nets = {key: value | {"num_prefix": 4} for key, value in CONFIGS[name].items() if key.endswith("net")}
    return config_of(name, **{"num_classes": 0, "condition": condition, **nets, **more})


def prior_of(name, mesh=None, **more):
    return lively(priors.build(asked(name, **more), mesh))


def contexts(count=BATCH):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    ("size", "patches", "blocks"),
    [
        ({}, 787_456, 302_311_424 + 1024 * 1024),
        ({"width": 768, "num_layers": 12, "num_heads": 12, "mlp_width": 3072}, 590_592, 85_056_000 + 1024 * 768),
    ],
    ids=["large", "base"],
)
def test_the_published_counts_of_the_image_encoder(size, patches, blocks):
    with torch.device("meta"):
        encoder = ImageEncoder(ImageEncoderConfig(**size))
    count = {name: sum(p.numel() for p in child.parameters()) for name, child in encoder.named_children()}
    assert count == {"patches": patches, "blocks": blocks}


def test_the_config_of_uvims_second_stage_has_its_image_encoder():
    config = configuration.load(Run, SHIPPED / "prior" / "uvim_depth_fsq.yaml")
    with torch.device("meta"):
        prior = priors.build(config.prior)
    count = {name: sum(p.numel() for p in child.parameters()) for name, child in prior.named_children()}
    assert count["context"] == 787_456 + 1_048_576 + 302_311_424 + 1024 * 1024  # and the learned prefix
    assert count["net"] == 308_331_520


def test_the_prefix_is_the_pooled_tokens_of_a_vision_transformer():
    condition, images = prior_of("autoregressive").condition.eval(), contexts()
    encoder = condition.image_encoder
    patches = F.unfold(images, 2, stride=2).transpose(1, 2)  # 4 x 4 of them, row by row
    dense = encoder.patches.dense
    x = patches @ dense.weight.flatten(1).T + dense.bias + encoder.blocks.positions
    x = F.layer_norm(encoder.blocks.blocks[0](x), (12,), encoder.blocks.norm.weight, encoder.blocks.norm.bias, 1e-6)
    pooled = torch.stack([x[:, [8 * r + 2 * c + d for d in (0, 1, 4, 5)]].mean(1) for r in (0, 1) for c in (0, 1)], 1)
    wanted = F.linear(pooled, condition.project.weight, condition.project.bias)
    torch.testing.assert_close(condition(images), wanted)
    torch.testing.assert_close(condition.summary(wanted), wanted.mean(1))
    null = torch.tensor([True, *[False] * (BATCH - 1)])
    assert torch.equal(condition(images, null)[0], condition.null)
    assert torch.equal(condition(images, null)[1:], condition(images)[1:])


def losses(name, codes):
    mesh = Mesh(codes=codes)
    prior, keys = prior_of(name, mesh).double(), noise.keys(1, torch.arange(BATCH))
    given = [part(x, mesh) for x in (batch()[0], contexts().double(), keys)]
    nats = prior.eval()(*given).nats_B
    loss = prior.train()(*given).loss
    loss.backward()
    dense = {n: p.grad for n, p in prior.condition.named_parameters()}
    drawn = prior.sample(
        given[1], GREEDY[name] | {"temperature": 1.0, "guidance": 2.0}, numbers_B=part(torch.arange(BATCH), mesh)
    )
    return nats.tolist(), loss.item(), dense, drawn.tolist()


@pytest.mark.dist
@pytest.mark.parametrize("name", PRIORS)
def test_every_prior_takes_it_and_ranks_do_not_show(ranks, name):
    nats, loss, dense, drawn = losses(name, 1)
    assert all(gradient is not None and gradient.any() for gradient in dense.values())
    results = ranks(2, losses, name, 2)
    assert [x for result in results for x in result[0]] == pytest.approx(nats)
    assert sum(result[1] for result in results) / 2 == pytest.approx(loss)
    for key, expected in dense.items():
        torch.testing.assert_close(sum(result[2][key] for result in results) / 2, expected)
    assert [ids for result in results for ids in result[3]] == drawn


@pytest.mark.parametrize("name", PRIORS)
@torch.no_grad()
def test_an_image_has_its_own_ids_and_a_dropped_one_those_of_none(name):
    prior, (ids, _), images, keys = prior_of(name), batch(), contexts(), noise.keys(1, torch.arange(BATCH))
    other = images.roll(1, 0)
    dropped = prior.train().condition.dropped(images, keys)
    assert 0 < dropped.sum() < BATCH
    same = prior(ids, images, keys).nats_B == prior(ids, other, keys).nats_B
    assert torch.equal(same, dropped)
    numbers = torch.arange(BATCH)
    greedy = prior.eval().sample(images, GREEDY[name], numbers_B=numbers, seed=3)
    assert torch.equal(prior.sample(images, GREEDY[name], numbers_B=numbers, seed=4), greedy)  # no chance in it
    assert torch.equal(prior.sample(images[2:4], GREEDY[name], numbers_B=numbers[2:4]), greedy[2:4])
    assert not torch.equal(prior.sample(other, GREEDY[name], numbers_B=numbers), greedy)
    guided = prior.sample(images, GREEDY[name] | {"guidance": 0.0}, numbers_B=numbers)
    if name != "coarse_to_fine":  # whose fine ids are guided apart
        assert (guided == guided[:1]).all()


def test_what_is_no_context_is_refused():
    prior = prior_of("autoregressive")
    for wrong in (contexts()[:, :, :4], torch.zeros(BATCH, dtype=torch.int64)):
        with pytest.raises(
            ValueError, match=r"is a context, floats \(B, 3, 8, 8\) .* give what the tokenizer's signal"
        ):
            prior.sample(wrong, numbers_B=torch.arange(BATCH))
    for change, said in (
        ({"num_classes": 5}, "which knows no classes: use num_classes: 0"),
        ({"condition": CONDITION | {"pool": 1}}, r"makes 16 vectors, .* transformer net has num_prefix 4: use"),
        ({"condition": CONDITION | {"pool": 3}}, r"cannot be cut into squares of 6 pixels \(patch 2 x pool 3\)"),
        ({"condition": CONDITION | {"dropout": 1.0}}, "use a share from 0 to below 1"),
    ):
        with pytest.raises(configuration.ConfigError, match=said):
            configuration.parse(PriorConfig, asked("autoregressive", **change))


def test_a_prior_of_contexts_is_saved_and_loaded(tmp_path):
    prior = prior_of("masked").eval()
    again = priors.Prior.load(prior.save(tmp_path / "saved"))
    ids, images = batch()[0], contexts()
    with torch.no_grad():
        assert torch.equal(again(ids, images).nats_B, prior(ids, images).nats_B)


def test_a_plan_counts_the_image_encoder():
    with torch.device("meta"):
        prior = priors.build(asked("autoregressive"))
    found = planned.operations(prior, {})
    block, patches, project = 2 * 16 * 12 * (4 * 12 + 2 * 16) + 4 * 16 * 16 * 12, 2 * 16 * 12 * 12, 2 * 4 * 12 * 24
    assert found["sampling: image encoder"] == block + patches + project
    assert found["training: image encoder"] == 3 * found["sampling: image encoder"]
