"""DeepSpeed at every stage against the plain twin, to the bit where the arithmetic is the same.

Several checks in one call, because a process takes seconds to start.
"""

from __future__ import annotations

import os
import subprocess
import sys

import engines
import pytest
import torch
from torch import nn

from vqscale.engine.config import EngineConfig, OptimConfig
from vqscale.engine.engine import Engine
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh

KINDS = [{"name": "torch"}, *({"name": "deepspeed", "stage": stage} for stage in range(4))]


def _all_kinds(options):
    """The twin and every stage, one after the other in the same processes, which leave and join groups in between."""
    return [engines.train(1, 2, **options, **kind) for kind in KINDS]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"accumulation": 2}, {"precision": "bf16"}], ids=str)
def test_every_stage_equals_the_twin(ranks, options):
    for twin, *stages in ranks(2, _all_kinds, options, timeout_s=120):
        # a forward pass in bf16 is far from one in float64, and the same in both engines all the same
        tolerance = 2e-5 if "precision" not in options else 1.0
        engines.compare(twin, engines.reference(2, options.get("accumulation", 1)), tolerance)
        for stage, history in enumerate(stages):
            # Stages 2 and 3 average every micro-batch, the others their sum: the same up to rounding.
            engines.compare(history, twin, 5e-6 if "accumulation" in options and stage >= 2 else 1e-14)


@pytest.mark.dist
@pytest.mark.slow
def test_every_stage_skips_what_is_not_finite_on_any_rank(ranks):
    for histories in ranks(2, engines.poisoned, KINDS[1:], timeout_s=120):
        for history in histories:
            engines.check_poisoned(history, 2e-5)


def _resumed(data, codes, kinds):
    """For each kind of engine: its state after two steps and after five; and after five when resumed from each kind."""
    first, final = [], []
    for kind in kinds:
        engine = engines.make(Mesh(data, codes), **kind)
        for step in range(2):
            engines.take_step(engine, step)
        first.append(engines.state(engine))
        for step in range(2, engines.STEPS):
            engines.take_step(engine, step)
        final.append(engines.state(engine))
    resumed = {}
    for i, kind in enumerate(kinds):
        for j, state in enumerate(first):
            engine = engines.make(Mesh(data, codes), **kind)
            engines.take_step(engine, 4)  # to be overwritten, buffers and moments too
            engines.load(engine, *state)
            again = engines.state(engine)
            for step in range(2, engines.STEPS):
                engines.take_step(engine, step)
            resumed[i, j] = (
                engines.largest_difference(again, state),
                engines.largest_difference(engines.state(engine), final[i]),
            )
    return resumed, first[0]


@pytest.mark.dist
@pytest.mark.slow
def test_any_engine_continues_what_any_other_saved(ranks):
    for resumed, _ in ranks(2, _resumed, 2, 1, KINDS, timeout_s=120):
        assert len(resumed) == 25
        for pair, (loaded, continued) in resumed.items():
            assert loaded == 0, pair
            assert continued == 0, pair


def _continue(data, codes, kinds, whole):
    """Load a state saved by other processes (rows put together) and take a step with each kind."""
    out = []
    for kind in kinds:
        engine = engines.make(Mesh(data, codes), **kind)
        replicated, rows, facts = whole
        axis = engine.mesh.codes
        mine = slice(engines.K * axis.rank // axis.size, engines.K * (axis.rank + 1) // axis.size)
        engines.load(engine, replicated, {name: tensor[mine] for name, tensor in rows.items()}, facts)
        before = engines.gathered(engine)[0]
        report = engines.take_step(engine, 2)
        out.append((report.lr, before, engines.gathered(engine)[0]))
    return out


@pytest.mark.dist
@pytest.mark.slow
def test_another_number_of_processes_continues(ranks):
    parts = [state for _, state in ranks(2, _resumed, 1, 2, KINDS[:1])]
    rows = {name: torch.cat([part[1][name] for part in parts]) for name in parts[0][1]}
    saved = {**parts[0][0], **{f"rows {name.split('/')[0]}": tensor for name, tensor in rows.items()}}
    whole = (parts[0][0], rows, parts[0][2])
    for world, codes in ((1, 1), (2, 1), (3, 3)):
        for answers in ranks(world, _continue, world // codes, codes, KINDS, whole, timeout_s=120):
            for lr, before, after in answers:
                assert lr == 1e-2
                assert all(torch.equal(before[name], tensor) for name, tensor in saved.items())
                for name, tensor in answers[0][2].items():  # thirds are rounded, halves are not
                    torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-7 if world == 3 else 0)


class Judge(nn.Module):
    """A small discriminator with running statistics and a parameter that ZeRO-3 takes apart."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(9)
        self.first, self.norm, self.second = nn.Linear(engines.DIM, 331), nn.BatchNorm1d(331), nn.Linear(331, 311)
        self.last = nn.Linear(311, 1)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.1

    def forward(self, z):
        return self.last(torch.tanh(self.second(self.norm(self.first(z)))))


def _two_engines(kinds, adaptive):
    """Generator and discriminator as in VQGAN: each has an engine, the discriminator is frozen while it judges."""
    out = []
    for kind in kinds:
        mesh = Mesh(1, 2)
        engine = engines.make(mesh, **kind)
        config = EngineConfig(name=kind["name"], zero_stage=kind.get("stage", 0), clip_norm=0.5)
        judge = Engine(Judge(), {}, config, OptimConfig(**engines.OPTIM, **engines.DECAYS), mesh, engines.STEPS)
        norms = []
        for step in range(engines.STEPS):
            z = engine(engines.batch(step, 0, mesh.world.rank)).z
            judge.module.requires_grad_(False)
            main = engines.loss(z, ops.gather(engine.rows["codes"], mesh.codes))
            adversarial = -judge(z).mean()
            weight = 0.3
            if adaptive:
                last = engine.module.last.weight
                of_main, of_other = (
                    torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (main, adversarial)
                )
                weight = (of_main.norm() / (of_other.norm() + 1e-4)).clamp(0, 100).detach()
            engine.backward(main + weight * adversarial)
            norms.append(engine.step().grad_norm)
            judge.module.requires_grad_(True)
            real = torch.randn(6, engines.DIM, generator=torch.Generator().manual_seed(step + 50 * mesh.world.rank))
            judge.backward(torch.relu(1 - judge(real)).mean() + torch.relu(1 + judge(z.detach())).mean())
            norms.append(judge.step().grad_norm)
        judged = {f"judge {name}": tensor for name, tensor in engines.state(judge)[0].items()}
        out.append((norms, {**engines.gathered(engine)[0], **judged}))
    return out


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [False, True])
def test_two_engines_at_every_stage(ranks, adaptive):
    kinds = KINDS[:4] if adaptive else KINDS  # ZeRO-3 takes the last layer's weight away before its gradient is asked
    for (norms, truth), *others in ranks(2, _two_engines, kinds, adaptive, timeout_s=120):
        assert len(truth) == 64
        for other_norms, state in others:
            assert other_norms == pytest.approx(norms, rel=1e-14)
            for name, tensor in truth.items():
                assert torch.equal(state[name], tensor), name


ALONE = """
import torch, vqscale.parallel.mesh as mesh, engines as t
linear = torch.nn.functional.linear
engine = t.make(mesh.Mesh(), name="deepspeed", stage=STAGE)
twin = t.make(mesh.Mesh())
for step in range(3):
    one, other = t.take_step(engine, step), t.take_step(twin, step)
    assert (one.stepped, one.lr) == (other.stepped, other.lr)
    assert abs(one.grad_norm / other.grad_norm - 1) < 1e-14  # summed group by group, and name by name
assert t.largest_difference(t.state(engine), t.state(twin)) == 0
assert torch.nn.functional.linear is linear, "DeepSpeed has replaced it for every network of the process"
mesh.disconnect()
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_alone_is_quiet_and_needs_no_compiler(tmp_path, stage):
    """One process, started as a plain script: no group, no tools on the PATH, nothing said."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    env = {**clean, "PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "ext"), "PYTHONPATH": "tests/lib"}
    script = ALONE.replace("STAGE", str(stage))
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)
    assert not (tmp_path / "ext").exists()
