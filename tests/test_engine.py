"""The engine and its plain twin against a slow reference in float64, step by step, on any mesh."""

from __future__ import annotations

import engines
import pytest
import torch
from torch import nn

from vqscale.disk import checkpoint
from vqscale.disk.writer import Writer
from vqscale.engine.config import EngineConfig, OptimConfig, check_engine
from vqscale.engine.engine import Engine, _sum_of_squares
from vqscale.parallel.mesh import Mesh


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_twin_equals_the_reference_on_one_process(accumulation):
    expected = engines.reference(1, accumulation)
    assert all(norm > 0.5 for norm, _, _ in expected), "clipping does not act in this test"
    engines.compare(engines.train(1, 1, accumulation=accumulation, dtype=torch.float64), expected)
    assert expected[-1][2]["parameter/frozen"].tolist() == [0.5] * 3


@pytest.mark.parametrize(
    "decays",
    [{}, {"weight_decay": 0.2}, {"rows_weight_decay": 0.4, "final_weight_decay": 0.0}],
    ids=["none", "of matrices, constant", "of tables, falling to 0"],
)
def test_each_decay_acts_on_its_own(decays):
    engines.compare(
        engines.train(1, 1, dtype=torch.float64, decays=decays),
        engines.reference(1, decays=decays),
    )


def test_clipping_off_still_reports_the_norm():
    engines.compare(engines.train(1, 1, clip=0.0, dtype=torch.float64), engines.reference(1, clip=0.0))


@pytest.mark.dist
@pytest.mark.parametrize(("data", "codes", "accumulation"), [(1, 2, 1), (2, 1, 2), (2, 2, 1)])
def test_the_twin_equals_the_reference_on_any_mesh(ranks, data, codes, accumulation):
    answers = ranks(data * codes, engines.train_on, data, codes, {"accumulation": accumulation, "dtype": torch.float64})
    for answer in answers:
        engines.compare(answer, engines.reference(data * codes, accumulation))


def test_the_norm_is_that_of_float64_and_does_not_overflow():
    torch.manual_seed(0)
    long = torch.randn(2**18 + 3, 2)
    for scale in (1e-30, 1.0, 1e30):
        parts = [long * scale, (long[:1001] * scale).t(), torch.full((1,), scale), torch.empty(0)]
        expected = sum(part.double().square().sum().item() for part in parts)
        assert _sum_of_squares(parts, torch.device("cpu")).item() == pytest.approx(expected, rel=1e-13)
    for bad in (float("inf"), float("nan")):
        parts = [long, torch.tensor([1.0, bad])]
        assert not _sum_of_squares(parts, torch.device("cpu")).isfinite()
    assert _sum_of_squares([], torch.device("cpu")).item() == 0


def test_forgotten_rows_start_again():
    engine = engines.make(Mesh())
    engines.take_step(engine, 0)
    engines.take_step(engine, 1)
    before, rows = engines.state(engine)[1], engine.rows["codes"]
    engine.forget(rows, torch.tensor([2, 7]))
    after = engines.state(engine)[1]
    for key in ("exp_avg/codes", "exp_avg_sq/codes"):
        assert before[key].abs().min() > 0
        assert after[key].abs().sum(1).nonzero().flatten().tolist() == [i for i in range(engines.K) if i not in (2, 7)]
    assert torch.equal(after["parameter/codes"], before["parameter/codes"])


def test_bf16_is_autocast_around_the_forward_pass():
    engine = engines.make(Mesh(), precision="bf16")
    assert engine(engines.batch(0, 0, 0)).z.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in engine.module.parameters())
    with engine.autocast():
        assert engine.module.last(torch.ones(1, 255)).dtype == torch.bfloat16
    assert engines.make(Mesh())(engines.batch(0, 0, 0)).z.dtype == torch.float32


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    held, rows, facts = engines.make(Mesh()).held()
    rows = {name: (x, 0, engines.K) for name, x in rows.items()}
    before = {name: each.flat.clone() for name, each in held.items()}

    def fill(held_there, rows_there):
        writing = Writer(tmp_path, Mesh(), keep=1)
        writing.save(1, held_there, rows_there, facts)
        writing.wait()
        checkpoint.read(tmp_path / "0000000001").fill(held, rows)

    missing = {name: each for name, each in held.items() if name != "buffer/norm.running_var"}
    with pytest.raises(ValueError, match=r"replicated tensors .* missing \['buffer/norm.running_var'\], unknown \[\]"):
        fill(missing, rows)
    with pytest.raises(ValueError, match=r"rows .* of another shape \['exp_avg/codes'\]"):
        fill(held, {**rows, "exp_avg/codes": (torch.zeros(engines.K, 3), 0, engines.K)})
    assert all(torch.equal(each.flat, before[name]) for name, each in held.items())


def test_a_module_without_rows_and_rows_that_do_not_learn(tmp_path):
    rows = nn.Parameter(torch.ones(4, 2), requires_grad=False)
    net = nn.Linear(2, 2)
    engine = Engine(net, {"fixed": rows}, EngineConfig(name="torch"), OptimConfig(), Mesh(), 3)
    engine.backward(engine(rows).square().mean())
    assert engine.step().stepped
    assert list(engines.state(engine)[1]) == ["parameter/fixed"]
    assert torch.equal(rows, torch.ones(4, 2))


def test_what_the_machine_lacks_is_said_before_anything_starts(monkeypatch):
    check_engine(EngineConfig(), "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"run.device cuda needs a GPU .* use run.device=cpu or auto"):
        check_engine(EngineConfig(), "cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package deepspeed, .* pip install deepspeed, or use engine.name"):
        check_engine(EngineConfig(), "cpu")
    check_engine(EngineConfig(name="torch"), "cpu")


@pytest.mark.dist
def test_the_twin_skips_what_is_not_finite_on_any_rank(ranks):
    for (history,) in ranks(2, engines.poisoned, [{"dtype": torch.float64}]):
        engines.check_poisoned(history, 1e-9)
