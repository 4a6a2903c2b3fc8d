"""PatchGAN: its published size and names, three norms, statistics over ranks; its losses."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from vqscale import config as configuration
from vqscale.nets import discriminators
from vqscale.nets.config.discriminators import Objective, PatchGANConfig
from vqscale.nets.discriminators import Answer, alone
from vqscale.nets.patchgan import PatchGAN, SyncBatchNorm
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.train import adversarial_losses as losses


def test_the_published_size_names_and_patches():
    with torch.device("meta"):
        net = PatchGAN(PatchGANConfig())
        (answer,) = net(torch.empty(2, 3, 256, 256))
        assert answer.values.shape == (2, 1, 30, 30)
    assert sum(p.numel() for p in net.parameters()) == 2_765_633  # 2.77 M
    numbers = {name.split(".")[1] for name in net.state_dict()}
    assert numbers == {"0", "2", "3", "5", "6", "8", "9", "11"}
    assert net.state_dict()["main.8.weight"].shape == (512, 256, 4, 4)
    assert [m.stride[0] for m in net.main if isinstance(m, nn.Conv2d)] == [2, 2, 2, 1, 1]
    assert "main.2.bias" not in net.state_dict()


def test_the_initialisation_is_the_published_one():
    net = PatchGAN(PatchGANConfig(channels=32))
    for number, mean in ((5, 0.0), (8, 0.0), (9, 1.0)):
        weight = net.main[number].weight
        assert weight.mean().item() == pytest.approx(mean, abs=0.01)
        assert weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert (net.main[9].bias == 0).all()


@pytest.mark.parametrize("norm", ["batch", "group", "sync"])
def test_norms(norm):
    config = PatchGANConfig(channels=8, num_layers=2, norm=norm, num_groups=4)
    net = PatchGAN(config)
    images = torch.randn(4, 3, 16, 16)
    answers = net(images)[0].values
    assert answers.shape == (4, 1, 2, 2)
    assert torch.equal(net.eval()(images)[0].values, answers)
    assert not dict(net.named_buffers())
    alone = net(images[:1])[0].values
    if norm == "group":  # an image's answer does not depend on the others
        torch.testing.assert_close(alone, answers[:1])
    else:
        assert (alone - answers[:1]).abs().max() > 1e-3
    answers.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_sync_is_batch_on_one_process():
    one, other = nn.BatchNorm2d(5, track_running_stats=False), SyncBatchNorm(5)
    with torch.no_grad():
        for norm in (one, other):
            norm.weight.copy_(torch.linspace(0.5, 2, 5))
            norm.bias.copy_(torch.linspace(-1, 1, 5))
    x = (torch.randn(3, 5, 4, 2) + 10).requires_grad_()
    grads = []
    for norm in (one, other):
        grads.append(torch.autograd.grad((norm(x) ** 3).sum(), [x, norm.weight, norm.bias]))
        assert norm(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(one(x), other(x))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


def _whole():
    return torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _net(gather=alone):
    torch.manual_seed(2)
    return discriminators.build(PatchGANConfig(channels=4, num_layers=2, norm="sync"), gather)


def _synchronised(world):
    """A rank's part of answers and image gradients, and the mean over ranks of its parameters' gradients."""
    mesh = Mesh(1, world)
    net, images = (
        _net(partial(ops.gather, axis=mesh.world)),
        _whole().float().chunk(world)[mesh.world.rank].requires_grad_(),
    )
    answers = net(images)[0].values
    (answers**3).mean().backward()
    return answers.detach(), images.grad, {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.slow
@pytest.mark.dist
def test_synchronised_statistics_make_one_batch_of_all_ranks(ranks):
    world = 3
    net, images = _net(), _whole().float().requires_grad_()
    answers = net(images)[0].values
    (answers**3).mean().backward()
    found = ranks(world, _synchronised, world)
    torch.testing.assert_close(torch.cat([part for part, _, _ in found]), answers.detach())
    # each rank's loss is a mean over its own images: that of the whole batch is their mean
    torch.testing.assert_close(torch.cat([grad for _, grad, _ in found]) / world, images.grad)
    for name, p in net.named_parameters():
        torch.testing.assert_close(sum(grads[name] for _, _, grads in found) / world, p.grad, msg=name)


def test_a_config_that_builds_nothing_is_refused():
    with pytest.raises(configuration.ConfigError, match="3 groups do not divide 128 channels"):
        configuration.parse(PatchGANConfig, {"norm": "group", "num_groups": 3})
    with pytest.raises(configuration.ConfigError, match="num_layers is 0"):
        configuration.parse(PatchGANConfig, {"num_layers": 0})
    for layers in (1, 2, 3):
        config = PatchGANConfig(channels=4, num_layers=layers)
        assert PatchGAN(config)(torch.zeros(2, 3, config.least_side, config.least_side))[0].values.shape == (2, 1, 1, 1)
        with pytest.raises(RuntimeError):
            PatchGAN(config)(torch.zeros(2, 3, config.least_side - 2, config.least_side - 2))


REAL = [Answer(torch.tensor([[2.0, -1.0], [0.5, 0.5]]).view(2, 1, 1, 2))]
FAKE = [Answer(torch.tensor([[-3.0, 1.0], [0.0, 2.0]]).view(2, 1, 1, 2))]


def alike(kind, mean, count=1):
    """The objectives of so many answers of the same weight."""
    its = "nonsaturating" if kind == "clipped_hinge" else kind
    return [Objective(its, kind, 1 / count, 1 / count, mean, mean)] * count


def test_adversarial_losses_are_their_formulas():
    def soft(*values):
        return sum(torch.log1p(torch.exp(torch.tensor(x))).item() for x in values) / len(values)

    expected = {
        ("hinge", "after"): 0.5 * ((0 + 2 + 0.5 + 0.5) / 4 + (0 + 2 + 1 + 3) / 4),
        ("hinge", "before"): 0.5 * ((0.5 + 0.5) / 2 + (0 + 2) / 2),
        ("nonsaturating", "after"): 0.5 * (soft(-2.0, 1.0, -0.5, -0.5) + soft(-3.0, 1.0, 0.0, 2.0)),
        ("nonsaturating", "before"): 0.5 * (soft(-0.5, -0.5) + soft(-1.0, 1.0)),
        ("least_squares", "after"): 0.5 * ((1 + 4 + 0.25 + 0.25) / 4 + (9 + 1 + 0 + 4) / 4),
    }
    for (kind, mean), value in expected.items():
        assert losses.discriminator(REAL, FAKE, alike(kind, mean))[kind].item() == pytest.approx(value)
    generated = {
        ("hinge", "before"): 0.0,
        ("hinge", "after"): 0.0,
        ("nonsaturating", "after"): soft(3.0, -1.0, 0.0, -2.0),
        ("nonsaturating", "before"): soft(1.0, -1.0),
        ("clipped_hinge", "after"): (4 + 0 + 1 + 0) / 4,
        ("least_squares", "after"): (16 + 0 + 1 + 1) / 4,
        ("least_squares", "before"): (4 + 0) / 2,
    }
    for (kind, mean), value in generated.items():
        assert losses.generator(FAKE, alike(kind, mean)).item() == pytest.approx(value)
    half = [Answer(FAKE[0].values.bfloat16())]
    assert losses.generator(half, alike("hinge", "after")).dtype == torch.float32


def test_lecam_and_the_adaptive_ratio():
    averages = torch.tensor([[0.6], [-0.2]])
    squares = [(2 + 0.2) ** 2, 0.0, 0.7**2, 0.7**2], [3.6**2, 0.0, 0.6**2, 0.0]
    assert losses.lecam(REAL, FAKE, averages).item() == pytest.approx(sum(map(sum, squares)) / 4)
    main, other = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])
    assert losses.adaptive_ratio(main, other, 1e4).item() == pytest.approx(5 / 2.0001)
    assert losses.adaptive_ratio(main, other, 2.0).item() == 2.0
    assert losses.adaptive_ratio(main, torch.zeros(2), 1e4).item() == 1e4


def test_losses_of_several_answers_are_the_means_of_theirs():
    """Of each answer as if it were alone: other numbers of patches, another weight of none."""
    other = [Answer(torch.linspace(-2, 2, 6).view(2, 3))], [Answer(torch.linspace(-1, 3, 6).view(2, 3))]
    real, fake = [*REAL, *other[0]], [*FAKE, *other[1]]
    for kind in ("hinge", "nonsaturating"):
        for mean in ("before", "after"):
            each = [losses.discriminator(*pair, alike(kind, mean))[kind] for pair in ((REAL, FAKE), other)]
            both = losses.discriminator(real, fake, alike(kind, mean, 2))
            assert both[kind].item() == pytest.approx(sum(each).item() / 2)
            each = [losses.generator(answers, alike(kind, mean)) for answers in (FAKE, other[1])]
            assert losses.generator(fake, alike(kind, mean, 2)).item() == pytest.approx(sum(each).item() / 2)
    averages = torch.tensor([[0.6, 0.1], [-0.2, -0.5]])
    each = [losses.lecam(*pair, averages[:, [i]]) for i, pair in enumerate(((REAL, FAKE), other))]
    assert losses.lecam(real, fake, averages).item() == pytest.approx(sum(each).item() / 2)
    assert losses.mean_values(real).tolist() == pytest.approx([0.5, 0.0])
