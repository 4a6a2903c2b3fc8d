"""The moving average of weights: its recursion at every stage; evaluated, saved, taken up again."""

from __future__ import annotations

import engines
import jobs
import pytest
import torch

from vqscale import config as configuration
from vqscale.data.samples import SampleStream
from vqscale.engine.average import Average
from vqscale.engine.config import AverageConfig
from vqscale.metrics.reconstruction import Reconstruction
from vqscale.parallel.mesh import Mesh
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.config import Run
from vqscale.train.tokenizer import train

KINDS = [{"name": "torch"}, {"name": "deepspeed", "stage": 2}, {"name": "deepspeed", "stage": 3}]


def _live(engine):
    """Every parameter and all rows, whole."""
    state = engines.gathered(engine)[0]
    return {name.removeprefix("parameter/"): x for name, x in state.items() if "parameter" in name}


def _averaged(data, codes, kinds, warmup):
    """For each kind of engine: (weights at the start and after each step, the average, what `applied` shows)."""
    out = []
    for kind in kinds:
        engine = engines.make(Mesh(data, codes), **kind)
        average = Average(engine, AverageConfig(0.8, warmup))
        history = [_live(engine)]
        for step in range(3):
            engines.take_step(engine, step)
            average.update(step + 1)
            history.append(_live(engine))
        own = [x.clone() for x in (*engine.dense.parts().values(), *engine.rows.values())]
        with average.applied():
            shown = {name.removeprefix("parameter/"): x for name, x in _shown(engine).items()}
            with torch.no_grad():
                answer = engine(torch.ones(4, 3)).z
        after = [*engine.dense.parts().values(), *engine.rows.values()]
        assert all(torch.equal(x, y) for x, y in zip(own, after, strict=True))
        replicated, rows, facts = engines.state(average)
        assert facts == {}
        again = Average(engine, AverageConfig(0.8, warmup))
        engines.load(again, replicated, rows, facts)
        assert all(torch.equal(x, engines.state(again)[0][name]) for name, x in replicated.items())
        assert all(torch.equal(x, engines.state(again)[1][name]) for name, x in rows.items())
        engines.take_step(engine, 3)  # training goes on from its own weights
        history.append(_live(engine))
        out.append((history, replicated, rows, shown, answer))
    return out


def _shown(engine):
    """What the module and the rows are now: DeepSpeed's own copies for the optimiser are not looked at."""
    whole = {name: engine.dense.join(name, x).clone() for name, x in engine.dense.parts().items()}
    return whole | {name: x.detach().clone() for name, x in engine.rows.items()}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("warmup", [False, True])
def test_it_is_its_recursion_at_every_stage(ranks, warmup):
    found = ranks(2, _averaged, 1, 2, KINDS[:1] if warmup else KINDS, warmup, timeout_s=120)
    for kind, ((history, replicated, _, shown, answer), other) in enumerate(zip(*found, strict=True)):
        rows = torch.cat([part[2]["codes"] for part in (found[0][kind], found[1][kind])])
        assert replicated.keys() == history[0].keys() - {"rows parameter", "frozen"}
        for name, x in [*replicated.items(), ("rows parameter", rows)]:
            expected = history[0][name].double()
            for step in range(1, 4):
                decay = min(0.8, (1 + step) / (10 + step)) if warmup else 0.8
                expected = decay * expected + (1 - decay) * history[step][name].double()
            torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-6)
            if name not in ("rows parameter", "unused"):
                assert not torch.equal(x, history[3][name]), name
                assert torch.equal(shown[name], x), name
                assert torch.equal(other[1][name], x), name
        first = found[0][0]
        for name, x in first[0][-1].items():  # averaging has not touched the training, whatever the engine
            torch.testing.assert_close(history[-1][name], x)
        torch.testing.assert_close(answer, first[4])  # and computing with averages is the same at every stage


def test_renewed_rows_begin_again_and_no_decay_is_no_average():
    engine = engines.make(Mesh())
    average, none = Average(engine, AverageConfig(0.9)), Average(engine, AverageConfig())
    rows = engine.rows["codes"]
    before = rows.detach().clone()
    with torch.no_grad():
        rows += 1
        rows[[2, 5]] = 7.0
    average.forget(rows, torch.tensor([2, 5]))
    average.update(1)
    none.update(1)
    kept = engines.state(average)[1]["codes"]
    assert (kept[[2, 5]] == 7).all()
    torch.testing.assert_close(kept[0], before[0] + 0.1)
    assert engines.state(none) == ({}, {}, {})
    with none.applied():
        assert (rows[2] == 7).all()


def _fail_with_averages(engine, average, error, weights):
    with average.applied():
        assert not all(torch.equal(x, weights[name]) for name, x in _shown(engine).items())
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_the_weights_are_their_own_again(error):
    engine = engines.make(Mesh())
    average = Average(engine, AverageConfig(0.8))
    for step in range(2):
        engines.take_step(engine, step)
        average.update(step + 1)
    before = _shown(engine)
    with pytest.raises(error):
        _fail_with_averages(engine, average, error, before)
    assert all(torch.equal(x, before[name]) for name, x in _shown(engine).items())


@pytest.mark.slow
def test_a_run_evaluates_and_saves_its_average(tmp_path, tiny_shards):
    """Averages of a run are those of its checkpoints' weights, and its scores are those of the averages."""
    more = ["average.decay=0.5", "run.checkpoint_every=1", "run.steps=3", "run.eval_every=3"]
    more += ["tokenizer.quantizer.revive_every=0", "tokenizer.quantizer.init=uniform", "optim.lr=0.02"]
    path = jobs.write_config(tmp_path / "1", tiny_shards, *more)
    scores = train(configuration.load(Run, path), Mesh())
    run = tmp_path / "1" / "run"
    saved = [jobs.tensors(run, step) for step in (1, 2, 3)]
    names = [name for name in saved[0] if "average/" in name]
    weights = [name for name in saved[0] if "parameter/" in name]
    assert {name.replace("average/", "parameter/") for name in names} == set(weights)
    assert "rows/average/quantizer.codebook.rows" in names
    for name in names:
        own = name.replace("average/", "parameter/")
        for old, new in ((saved[0], saved[1]), (saved[1], saved[2])):
            torch.testing.assert_close(new[name], 0.5 * old[name] + 0.5 * new[own], rtol=1e-5, atol=1e-7)
    plain = jobs.write_config(tmp_path / "2", tiny_shards, *more, "average.decay=0")
    own_scores = train(configuration.load(Run, plain), Mesh())
    assert all("average/" not in name for name in jobs.tensors(tmp_path / "2" / "run", 3))
    for name in weights:
        assert torch.equal(saved[2][name], jobs.tensors(tmp_path / "2" / "run", 3)[name])
    assert scores["psnr"] == pytest.approx(_psnr(run), rel=1e-6)
    assert abs(scores["psnr"] - own_scores["psnr"]) > 1e-3


def _psnr(run):
    """Of the tokenizer that is loaded from a run, over the held-out images."""
    config = configuration.load(Run, run / "run.yaml")
    tokenizer, scores = Tokenizer.load(run), Reconstruction(torch.device("cpu"))
    for batch in SampleStream(config.data.val, 8, 0, 1, train=False).batches():
        with torch.no_grad():
            scores.add(batch.samples, tokenizer(batch.samples)[0], batch.valid)
    return Reconstruction.from_sums(scores.sums())["psnr"]
