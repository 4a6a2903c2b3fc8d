"""Muon for matrices beside AdamW for the rest: against loops written out, resumed, on two processes, and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import engines
import pytest
import torch
from torch import nn

from vqscale import config as configuration
from vqscale.config import ConfigError
from vqscale.engine import optimisers
from vqscale.engine.config import EngineConfig, LrFactor, OptimConfig
from vqscale.engine.engine import Engine
from vqscale.parallel.mesh import Mesh
from vqscale.train.config import Run

CONFIGS = Path(__file__).parents[1] / "configs"
LR, DECAY, MOMENTUM, STEPS = 0.02, 0.1, 0.9, 4
OPTIM = OptimConfig(
    name="muon", lr=LR, eps=1e-4, weight_decay=DECAY, rows_weight_decay=0.3, momentum=MOMENTUM, schedule="constant"
)
SLOW = LrFactor("tall", 0.25)


class Net(nn.Module):
    """A tall matrix, a wide one, vectors, an embedding and a convolution."""

    def __init__(self):
        super().__init__()
        self.kinds = nn.Embedding(8, 6)
        self.tall, self.wide = nn.Linear(6, 20), nn.Linear(20, 5)
        self.conv = nn.Conv1d(1, 2, 3)

    def forward(self, x_N):
        h = self.wide(torch.tanh(self.tall(self.kinds(x_N))))
        return self.conv(h[:, None]).flatten(1)


def engine(seed=0, optim=OPTIM, name="torch", mesh=None):
    torch.manual_seed(seed)
    config = EngineConfig(name=name, zero_stage=0, clip_norm=0.0)
    rows = nn.Parameter(torch.ones(3, 2))
    return Engine(Net(), {"codes": rows}, config, optim, mesh or Mesh(), STEPS)


def take_step(made, step, images=16):
    x_N = torch.arange(images) % 8
    aim = torch.randn(images, 6, generator=torch.Generator().manual_seed(step))
    share = slice(None) if made.mesh.world.size == 1 else slice(made.mesh.world.rank, None, made.mesh.world.size)
    made.backward((made(x_N[share]) - aim[share]).square().mean() + made.rows["codes"].square().mean())
    gradients = {name: p.grad.clone() for name, p in made.module.named_parameters()}
    made.step()
    return gradients


def orthogonal(x):
    """torch's five rounds of Newton and Schulz in bfloat16, written out for a matrix that is not taller than wide."""
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.T).T
    y = x.bfloat16() / x.bfloat16().norm()
    for _ in range(5):
        square = y @ y.T
        y = 3.4445 * y + (-4.775 * square + 2.0315 * square @ square) @ y
    return y.float()


def test_matrices_follow_a_loop_written_out_and_the_rest_adamw():
    made = engine()
    weights = {name: p.detach().clone() for name, p in made.module.named_parameters()}
    matrices = {"tall.weight": 0.0, "wide.weight": 0.0}
    rest = {name: nn.Parameter(p) for name, p in weights.items() if name not in matrices}
    decays = {"kinds.weight": 0.3, "conv.weight": DECAY}
    groups = [{"params": [p], "weight_decay": decays.get(name, 0.0)} for name, p in rest.items()]
    adam = torch.optim.AdamW(groups, lr=LR, betas=OPTIM.betas, eps=OPTIM.eps)
    for step in range(STEPS):
        gradients = take_step(made, step)
        for name, p in rest.items():
            p.grad = gradients[name]
        adam.step()
        for name in matrices:
            g = gradients[name]
            matrices[name] = MOMENTUM * matrices[name] + (1 - MOMENTUM) * g
            update = orthogonal((1 - MOMENTUM) * g + MOMENTUM * matrices[name])
            size = 0.2 * max(g.shape) ** 0.5  # of AdamW's updates
            weights[name] = weights[name] * (1 - LR * DECAY) - LR * size * update
        for name, p in made.module.named_parameters():
            near = {"rtol": 0, "atol": 0.1 * LR} if name in matrices else {"rtol": 1e-5, "atol": 1e-7}
            torch.testing.assert_close(p.detach(), weights[name] if name in matrices else rest[name].detach(), **near)


def test_an_update_turns_a_matrix_by_as_much_in_all_directions():
    made = engine(optim=replace(OPTIM, weight_decay=0.0))
    before = made.module.tall.weight.detach().clone()
    take_step(made, 0)
    singular = torch.linalg.svdvals(made.module.tall.weight.detach() - before) / (LR * 0.2 * 20**0.5)
    assert 0.5 < singular.min() < singular.max() < 1.3


def test_a_part_of_the_model_learns_at_another_rate():
    with pytest.raises(ValueError, match=r"has the part tal, .* its parts are kinds, tall, wide, conv, and what is in"):
        engine(optim=replace(OPTIM, lr_factors=(LrFactor("tal", 0.25),)))
    made, plain = engine(optim=replace(OPTIM, lr_factors=(SLOW,))), engine()
    before = {name: p.detach().clone() for name, p in made.module.named_parameters()}
    for each in (made, plain):
        take_step(each, 0)
    for (name, slow), (_, fast) in zip(made.module.named_parameters(), plain.module.named_parameters(), strict=True):
        factor = 0.25 if name.startswith("tall.") else 1.0
        torch.testing.assert_close(slow - before[name], factor * (fast - before[name]), rtol=1e-4, atol=1e-7)


def test_a_resumed_run_goes_on_to_the_bit():
    whole = engine()
    for step in range(STEPS):
        take_step(whole, step)
    begun, resumed = engine(), engine(seed=1)
    for step in range(2):
        take_step(begun, step)
    replicated, rows, facts = engines.state(begun)
    assert {"momentum_buffer/tall.weight", "exp_avg/kinds.weight", "exp_avg/conv.weight"} <= replicated.keys()
    assert "exp_avg/tall.weight" not in replicated
    engines.load(resumed, replicated, rows, facts)
    for step in range(2, STEPS):
        take_step(resumed, step)
    for one, other in zip(engines.state(whole)[:2], engines.state(resumed)[:2], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert engines.state(engine(optim=replace(OPTIM, name="adamw")))[0].keys() != replicated.keys()


def _trained(names):
    histories = []
    for name in names:
        made = engine(name=name, mesh=Mesh(2, 1))
        for step in range(STEPS):
            if name == "torch":
                take_step(made, step)
            else:  # DeepSpeed has its gradients elsewhere
                share = slice(made.mesh.world.rank, None, 2)
                aim = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
                loss = (made((torch.arange(16) % 8)[share]) - aim[share]).square().mean()
                made.backward(loss + made.rows["codes"].square().mean())
                made.step()
        histories.append(engines.state(made)[0])
    return histories


@pytest.mark.dist
@pytest.mark.slow
def test_deepspeed_without_stages_is_the_twin_and_two_processes_are_one(ranks):
    alone = engine()
    for step in range(STEPS):
        take_step(alone, step)
    for twin, deepspeed in ranks(2, _trained, ["torch", "deepspeed"], timeout_s=120):
        assert twin.keys() == deepspeed.keys() == engines.state(alone)[0].keys()
        for name, tensor in engines.state(alone)[0].items():
            torch.testing.assert_close(twin[name], tensor, rtol=0, atol=0.1 * LR, msg=name)
            assert torch.equal(twin[name], deepspeed[name]), name


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("config", ["prior", "tokenizer"])
def test_stages_that_cut_matrices_are_refused_in_the_config(stage, config):
    path = CONFIGS / "quickstart" / f"{config}.yaml"
    given = ["optim.name=muon", f"engine.zero_stage={stage}"]
    with pytest.raises(
        ConfigError, match=f"muon takes whole matrices, and engine.zero_stage {stage} gives each process"
    ):
        configuration.load(Run, path, given)
    for other in (["engine.zero_stage=0"], ["engine.name=torch"]):
        configuration.load(Run, path, given + other)


def test_what_muon_has_nothing_to_do_in_is_refused():
    for net, told in ((nn.LayerNorm(4), "no matrix"), (nn.Linear(4, 4, bias=False), "nothing but matrices")):
        with pytest.raises(ValueError, match=f"optim.name is muon, and this network has {told}"):
            optimisers.build(net, OPTIM)
    ((key, _),) = replace(OPTIM, momentum=1.0).problems()
    assert key == "momentum"


def test_a_step_that_is_skipped_changes_nothing_and_rates_fall():
    made = engine(optim=replace(OPTIM, final_weight_decay=0.0, schedule="linear"))
    take_step(made, 0)
    before = {name: tensor.clone() for name, tensor in engines.state(made)[0].items()}
    made.backward(made(torch.arange(4)).sum() * torch.nan)
    assert not made.step().stepped
    assert all(torch.equal(before[name], tensor) for name, tensor in engines.state(made)[0].items())
    take_step(made, 2)
    take_step(made, 3)
    ((group,),) = [optimiser.param_groups for optimiser in [made.dense._adam._matrices]]
    assert (group["lr"], group["weight_decay"]) == (0.0, 0.0)  # of the last step


def test_the_other_engines_are_as_they_were():
    engines.compare(engines.train(1, 1, dtype=torch.float64), engines.reference(1))
