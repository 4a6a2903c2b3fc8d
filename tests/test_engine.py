"""Both engines against a slow reference on one process, and against each other: step by step, on any mesh.

The network has what makes engines differ: matrices and vectors (two groups of weight decay), sizes that do not divide,
one parameter large enough for ZeRO-3 to take apart, one without a gradient, one that is frozen, recomputed activations,
running statistics, and rows that are split over the code axis. Every rank has its own data.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vqscale.parallel import ops
from vqscale.parallel.config import EngineConfig, OptimConfig, check_engine
from vqscale.parallel.engine import Engine
from vqscale.parallel.mesh import Mesh

K, DIM, STEPS = 12, 5, 5
# eps keeps Adam from blowing the rounding of near-zero gradients up to whole steps
OPTIM = {"lr": 1e-2, "eps": 1e-4, "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 2, "rows_lr_factor": 3.0}


@dataclass
class Out:
    """As a tokenizer's: DeepSpeed does not look inside."""

    z: torch.Tensor


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.wide = nn.Linear(3, 401)
        self.deep = nn.Linear(401, 255)  # 102255 elements: above ZeRO-3's threshold, and odd
        self.norm = nn.BatchNorm1d(255)
        self.last = nn.Linear(255, DIM)
        self.unused = nn.Parameter(torch.ones(7, 3))
        self.frozen = nn.Parameter(torch.full((3,), 0.5), requires_grad=False)
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        for p in self.parameters():
            if p.requires_grad and p is not self.unused:
                p.data = torch.randn(p.shape, generator=generator) * 0.1

    def forward(self, x):
        h = torch.relu(self.wide(x * self.frozen))
        h = checkpoint(lambda h: torch.tanh(self.deep(h)), h, use_reentrant=False)
        return Out(self.last(self.norm(h)))


def _whole_rows():
    return torch.randn(K, DIM, generator=torch.Generator().manual_seed(6))


def _batch(step, micro, rank):
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(1000 * step + 100 * micro + rank)) * (1 + rank)


def _loss(z, rows):
    """Big enough for the clipping to act; every row gets a gradient."""
    return 3 * ((z @ rows.T).square().mean() + (z - 1).square().mean())


def _reference(world, accumulation=1, clip=0.5, steps=STEPS, skip=()):
    """The same training on one process with plain torch in float64; returns (norm, lr, tensors) after each step."""
    net, rows = Net().double(), nn.Parameter(_whole_rows().double())
    named = dict(net.named_parameters())
    learned = {n: p for n, p in named.items() if p.requires_grad}
    buffers = [{n: b.clone() for n, b in net.named_buffers()} for _ in range(world)]
    matrices = [p for p in learned.values() if p.ndim > 1]
    vectors = [p for p in learned.values() if p.ndim == 1]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors}, {"params": [rows], "rows": 3.0}],
        betas=(0.9, 0.95),
        eps=1e-4,
        weight_decay=0.0,
    )
    history = []
    for step in range(steps):
        for p in [*learned.values(), rows]:
            p.grad = torch.zeros_like(p)
        for rank in range(world):
            for micro in range(accumulation):
                out = torch.func.functional_call(net, {**named, **buffers[rank]}, _batch(step, micro, rank).double())
                (_loss(out.z, rows) / accumulation / world).backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in [*learned.values(), rows]))
        warm = step - 2
        lr = 1e-2 * (step + 1) / 3 if warm < 0 else 1e-2 * (1 + math.cos(math.pi * warm / (STEPS - 3))) / 2
        for group in adam.param_groups:
            group["lr"] = lr * group.get("rows", 1.0)
        if step not in skip:
            for p in [*learned.values(), rows]:
                p.grad *= min(1.0, clip / norm) if clip else 1.0
            adam.step()
        for name in buffers[0]:
            mean = sum(b[name].double() for b in buffers) / world
            for b in buffers:
                b[name] = mean.to(b[name].dtype, copy=True)
        state = {f"parameter/{n}": p.detach().clone() for n, p in named.items()}
        for key in ("exp_avg", "exp_avg_sq"):
            state |= {f"{key}/{n}": adam.state[p].get(key, torch.zeros_like(p)).clone() for n, p in learned.items()}
            state[f"rows {key}"] = adam.state[rows].get(key, torch.zeros_like(rows)).clone()
        state |= {f"buffer/{n}": b.clone() for n, b in buffers[0].items() if n != "table"}
        state["rows parameter"] = rows.detach().clone()
        history.append((norm, lr, state))
    return history


def _engine(
    mesh, name="torch", stage=0, accumulation=1, clip=0.5, precision="fp32", max_skipped=3, dtype=torch.float32
):
    start, stop = K * mesh.codes.rank // mesh.codes.size, K * (mesh.codes.rank + 1) // mesh.codes.size
    config = EngineConfig(
        name=name,
        zero_stage=stage,
        accumulation=accumulation,
        clip_norm=clip,
        precision=precision,
        max_skipped=max_skipped,
    )
    rows = nn.Parameter(_whole_rows()[start:stop].to(dtype, copy=True))
    net = Net().to(dtype)
    if mesh.world.rank:  # only rank 0's and the first replica's are to count
        rows.data += mesh.data.rank
        for p in net.parameters():
            p.data += 1
    return Engine(net, {"codes": rows}, config, OptimConfig(**OPTIM), mesh, STEPS)


def _step(engine, step, accumulation=1, poison=False):
    for micro in range(accumulation):
        x = _batch(step, micro, engine.mesh.world.rank).to(engine.rows["codes"].dtype)
        if poison and engine.mesh.world.rank == engine.mesh.world.size - 1:
            x[0, 0] = math.nan
        out = engine(x)
        rows = ops.gather(engine.rows["codes"], engine.mesh.codes)
        engine.backward(_loss(out.z, rows))
        report = engine.step()
        assert report.boundary == (micro == accumulation - 1)
    assert all(p.grad is None for p in [*engine.module.parameters(), *engine.rows.values()])
    return report


def _gathered(engine):
    """The state with rows put together, named as the reference names it."""
    replicated, rows, facts = engine.state()
    whole = {f"rows {n.split('/')[0]}": torch.cat(ops.gather_objects(t, engine.mesh.codes)) for n, t in rows.items()}
    return {**replicated, **whole}, facts


def _train(data, codes, steps=STEPS, poison=(), **options):
    engine = _engine(Mesh(data, codes), **options)
    history = []
    for step in range(steps):
        report = _step(engine, step, options.get("accumulation", 1), step in poison)
        assert report.stepped == (step not in poison)
        history.append((report.grad_norm, report.lr, _gathered(engine)[0]))
    return history


def _compare(got, expected, tolerance=1e-9):
    assert len(got) == len(expected)
    for step, ((norm, lr, state), (true_norm, true_lr, truth)) in enumerate(zip(got, expected, strict=True)):
        assert norm == pytest.approx(true_norm, rel=tolerance), step
        assert lr == pytest.approx(true_lr), step
        assert state.keys() == truth.keys()
        for name, tensor in truth.items():
            error = (state[name].double() - tensor.double()).abs().max().item()
            scale = tensor.abs().max().item()
            assert error <= tolerance * max(scale, 1e-3), f"step {step}: {name} is off by {error} of {scale}"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_twin_equals_the_reference_on_one_process(accumulation):
    expected = _reference(1, accumulation)
    assert all(norm > 0.5 for norm, _, _ in expected), "clipping does not act in this test"
    _compare(_train(1, 1, accumulation=accumulation, dtype=torch.float64), expected)
    assert expected[-1][2]["parameter/frozen"].tolist() == [0.5] * 3


def test_clipping_off_still_reports_the_norm():
    _compare(_train(1, 1, clip=0.0, dtype=torch.float64), _reference(1, clip=0.0))


@pytest.mark.dist
@pytest.mark.parametrize(("data", "codes", "accumulation"), [(1, 2, 1), (2, 1, 2), (2, 2, 1)])
def test_the_twin_equals_the_reference_on_any_mesh(ranks, data, codes, accumulation):
    answers = ranks(data * codes, _train_with, data, codes, {"accumulation": accumulation, "dtype": torch.float64})
    for answer in answers:
        _compare(answer, _reference(data * codes, accumulation))


def _train_with(data, codes, options):
    return _train(data, codes, **options)


def test_forgotten_rows_start_again():
    engine = _engine(Mesh())
    _step(engine, 0)
    _step(engine, 1)
    before, rows = engine.state()[1], engine.rows["codes"]
    engine.forget(rows, torch.tensor([2, 7]))
    after = engine.state()[1]
    for key in ("exp_avg/codes", "exp_avg_sq/codes"):
        assert before[key].abs().min() > 0
        assert after[key].abs().sum(1).nonzero().flatten().tolist() == [i for i in range(K) if i not in (2, 7)]
    assert torch.equal(after["parameter/codes"], before["parameter/codes"])


def test_bf16_is_autocast_around_the_forward_pass():
    engine = _engine(Mesh(), precision="bf16")
    assert engine(_batch(0, 0, 0)).z.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in engine.module.parameters())
    with engine.autocast():
        assert engine.module.last(torch.ones(1, 255)).dtype == torch.bfloat16
    assert _engine(Mesh())(_batch(0, 0, 0)).z.dtype == torch.float32


def test_a_checkpoint_of_another_model_is_refused():
    engine = _engine(Mesh())
    replicated, rows, facts = engine.state()
    missing = {name: tensor for name, tensor in replicated.items() if name != "buffer/norm.running_var"}
    with pytest.raises(ValueError, match=r"replicated tensors .* missing \['buffer/norm.running_var'\], unknown \[\]"):
        engine.load(missing, rows, facts)
    with pytest.raises(ValueError, match=r"rows .* of another shape \['exp_avg/codes'\]"):
        engine.load(replicated, {**rows, "exp_avg/codes": torch.zeros(3, DIM)}, facts)


def test_a_module_without_rows_and_rows_that_do_not_learn(tmp_path):
    rows = nn.Parameter(torch.ones(4, 2), requires_grad=False)
    net = nn.Linear(2, 2)
    engine = Engine(net, {"fixed": rows}, EngineConfig(name="torch"), OptimConfig(), Mesh(), 3)
    engine.backward(engine(rows).square().mean())
    assert engine.step().stepped
    assert list(engine.state()[1]) == ["parameter/fixed"]
    assert torch.equal(rows, torch.ones(4, 2))


def test_what_the_machine_lacks_is_said_before_anything_starts(monkeypatch):
    check_engine(EngineConfig(), "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device cuda needs a GPU .* use device: cpu"):
        check_engine(EngineConfig(), "cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package deepspeed, .* pip install deepspeed, or use engine.name"):
        check_engine(EngineConfig(), "cpu")
    check_engine(EngineConfig(name="torch"), "cpu")


# ---- DeepSpeed: several checks in one call, because a process takes seconds to start


def _all_stages(accumulation):
    """The twin and every stage, one after the other in the same processes, which leave and join groups in between."""
    twin = _train(1, 2, accumulation=accumulation)
    return twin, [_train(1, 2, name="deepspeed", stage=stage, accumulation=accumulation) for stage in range(4)]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_stage_equals_the_twin(ranks, accumulation):
    for twin, stages in ranks(2, _all_stages, accumulation, timeout_s=120):
        _compare(twin, _reference(2, accumulation), 2e-5)
        for stage, history in enumerate(stages):
            # Stages 2 and 3 average every micro-batch, the others their sum: the same up to rounding.
            _compare(history, twin, 1e-14 if accumulation == 1 or stage < 2 else 5e-6)


def _poisoned(engines):
    """The last rank has a batch that is not a number at step 1, and from step 3 on until the engine gives up."""
    out = []
    for options in engines:
        engine = _engine(Mesh(1, 2), max_skipped=1, **options)
        history = []
        for step in range(STEPS):
            message = ""
            try:
                report = _step(engine, step, options.get("accumulation", 1), poison=step in (1, 3, 4))
            except FloatingPointError as error:
                message = str(error)
            history.append((report.stepped, report.grad_norm, *_gathered(engine), message))
        out.append(history)
    return out


def _check_poisoned(history, tolerance):
    truth = _reference(2, skip=(1, 3, 4))
    assert [stepped for stepped, *_ in history[:4]] == [True, False, True, False]
    for (_, _, state, _, _), (_, _, expected) in zip(history, truth, strict=True):
        for name, tensor in expected.items():
            assert state[name].isfinite().all(), name
            if not name.startswith("buffer/"):  # the reference has no remedy for its statistics
                torch.testing.assert_close(state[name].double(), tensor, rtol=tolerance, atol=tolerance)
    assert not math.isfinite(history[1][1])
    assert [facts for *_, facts, _ in history][-1] == {"boundaries": 5, "skipped": 3, "in_a_row": 2}
    assert [bool(message) for *_, message in history] == [False] * 4 + [True]
    assert "2 steps in a row had gradients that are not finite" in history[4][4]
    assert "engine.max_skipped allows 1: lower optim.lr" in history[4][4]


@pytest.mark.dist
def test_the_twin_skips_what_is_not_finite_on_any_rank(ranks):
    for (history,) in ranks(2, _poisoned, [{"dtype": torch.float64}]):
        _check_poisoned(history, 1e-9)


@pytest.mark.dist
@pytest.mark.slow
def test_every_stage_skips_what_is_not_finite_on_any_rank(ranks):
    engines = [{"name": "deepspeed", "stage": stage} for stage in range(4)]
    for histories in ranks(2, _poisoned, engines, timeout_s=120):
        for history in histories:
            _check_poisoned(history, 2e-5)


KINDS = [{"name": "torch"}, *({"name": "deepspeed", "stage": stage} for stage in range(4))]


def _resumed(data, codes, kinds):
    """For each kind of engine: its state after two steps and after five; and after five when resumed from each kind."""
    first, final = [], []
    for kind in kinds:
        engine = _engine(Mesh(data, codes), **kind)
        for step in range(2):
            _step(engine, step)
        first.append(engine.state())
        for step in range(2, STEPS):
            _step(engine, step)
        final.append(engine.state())
    resumed = {}
    for i, kind in enumerate(kinds):
        for j, state in enumerate(first):
            engine = _engine(Mesh(data, codes), **kind)
            _step(engine, 4)  # to be overwritten, buffers and moments too
            engine.load(*state)
            again = engine.state()
            for step in range(2, STEPS):
                _step(engine, step)
            resumed[i, j] = (_largest_difference(again, state), _largest_difference(engine.state(), final[i]))
    return resumed, first[0]


def _largest_difference(one, other):
    assert one[2] == other[2]
    pairs = [(one[part][name], other[part][name]) for part in (0, 1) for name in one[part] | other[part]]
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


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
        engine = _engine(Mesh(data, codes), **kind)
        replicated, rows, facts = whole
        axis = engine.mesh.codes
        mine = slice(K * axis.rank // axis.size, K * (axis.rank + 1) // axis.size)
        engine.load(replicated, {name: tensor[mine] for name, tensor in rows.items()}, facts)
        before = _gathered(engine)[0]
        report = _step(engine, 2)
        out.append((report.lr, before, _gathered(engine)[0]))
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
        self.first, self.norm, self.second = nn.Linear(DIM, 331), nn.BatchNorm1d(331), nn.Linear(331, 311)
        self.last = nn.Linear(311, 1)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * 0.1

    def forward(self, z):
        return self.last(torch.tanh(self.second(self.norm(self.first(z)))))


def _two_players(kinds, adaptive):
    """Generator and discriminator as in VQGAN: each has an engine, the discriminator is frozen while it judges."""
    out = []
    for kind in kinds:
        mesh = Mesh(1, 2)
        engine = _engine(mesh, **kind)
        config = EngineConfig(name=kind["name"], zero_stage=kind.get("stage", 0), clip_norm=0.5)
        judge = Engine(Judge(), {}, config, OptimConfig(**OPTIM), mesh, STEPS)
        norms = []
        for step in range(STEPS):
            z = engine(_batch(step, 0, mesh.world.rank)).z
            judge.module.requires_grad_(False)
            main = _loss(z, ops.gather(engine.rows["codes"], mesh.codes))
            play = -judge(z).mean()
            weight = 0.3
            if adaptive:
                last = engine.module.last.weight
                of_main, of_play = (torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (main, play))
                weight = (of_main.norm() / (of_play.norm() + 1e-4)).clamp(0, 100).detach()
            engine.backward(main + weight * play)
            norms.append(engine.step().grad_norm)
            judge.module.requires_grad_(True)
            real = torch.randn(6, DIM, generator=torch.Generator().manual_seed(step + 50 * mesh.world.rank))
            judge.backward(torch.relu(1 - judge(real)).mean() + torch.relu(1 + judge(z.detach())).mean())
            norms.append(judge.step().grad_norm)
        out.append((norms, {**_gathered(engine)[0], **{f"judge {n}": t for n, t in judge.state()[0].items()}}))
    return out


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("adaptive", [False, True])
def test_two_players_at_every_stage(ranks, adaptive):
    kinds = KINDS[:4] if adaptive else KINDS  # ZeRO-3 takes the last layer's weight away before its gradient is asked
    for (norms, truth), *others in ranks(2, _two_players, kinds, adaptive, timeout_s=120):
        assert len(truth) == 61
        for other_norms, state in others:
            assert other_norms == pytest.approx(norms, rel=1e-14)
            for name, tensor in truth.items():
                assert torch.equal(state[name], tensor), name


ALONE = """
import torch, vqscale.parallel.mesh as mesh, test_engine as t
linear = torch.nn.functional.linear
engine = t._engine(mesh.Mesh(), name="deepspeed", stage=STAGE)
twin = t._engine(mesh.Mesh())
for step in range(3):
    assert t._step(engine, step) == t._step(twin, step)
assert t._largest_difference(engine.state(), twin.state()) == 0
assert torch.nn.functional.linear is linear, "DeepSpeed has replaced it for every network of the process"
mesh.disconnect()
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_alone_is_quiet_and_needs_no_compiler(tmp_path, stage):
    """One process, started as a plain script: no group, no tools on the PATH, nothing said."""
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    env = {**clean, "PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "ext"), "PYTHONPATH": "tests"}
    script = ALONE.replace("STAGE", str(stage))
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)
    assert not (tmp_path / "ext").exists()
