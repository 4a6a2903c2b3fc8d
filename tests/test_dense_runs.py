"""Both stages of dense prediction as whole runs: a tokenizer with a context, a prior of ids encoded as they come."""

from __future__ import annotations

import json
import signal
from functools import partial

import dense_runs
import jobs
import pytest
import torch

from vqscale import priors
from vqscale.data.config import ImagesConfig
from vqscale.data.samples import SampleStream
from vqscale.data.tokens.format import open_ids
from vqscale.data.views import Source
from vqscale.parallel.mesh import Mesh
from vqscale.priors import Prior
from vqscale.programs import dense, encode, predict
from vqscale.programs.commands import evaluate
from vqscale.programs.sampling import draw as sample
from vqscale.programs.sampling.request import SampleRequest
from vqscale.tokenizer.model import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.dist]


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory, tiny_shards):
    """A tokenizer of colours, trained on one process."""
    return jobs.finish(dense_runs.tokenizer(tmp_path_factory.mktemp("stage 1"), tiny_shards))


@pytest.fixture(scope="module")
def stage_2(tmp_path_factory, tiny_shards, stage_1):
    """A prior given the gray image, trained on one process."""
    return jobs.finish(dense_runs.prior(tmp_path_factory.mktemp("stage 2"), tiny_shards, stage_1))


def val_of(shards):
    return ImagesConfig(str(shards / "val.tar"), image_size=jobs.SIDE, num_workers=0, index_dir=str(shards))


def held_out(shards):
    return next(SampleStream(val_of(shards), jobs.NUM_VAL, train=False).batches())


def test_a_tokenizer_with_a_context_trains_saves_loads_and_encodes(tmp_path, tiny_shards, stage_1):
    two = jobs.finish(dense_runs.tokenizer(tmp_path, tiny_shards), world=2)
    jobs.same_numbers(stage_1, two)
    tokenizer = Tokenizer.load(stage_1)
    assert tokenizer.no_code.any()
    again = Tokenizer.load(tokenizer.save(tmp_path / "saved"))
    samples = held_out(tiny_shards).samples
    entered, context = tokenizer.signal.enter(samples)
    ids = again.encode(entered, context)
    assert torch.equal(again.decode(ids, context), tokenizer.decode(ids, context))

    config = ImagesConfig(str(tiny_shards / "val.tar"), image_size=jobs.SIDE, num_workers=0, index_dir=str(tmp_path))
    made = encode.encode(tokenizer, Source(config, "center"), tmp_path / "cache", Mesh(), encode.Options(storage=8))
    assert (made.state, made.card.grid, made.card.num_codes) == ("encoded", dense_runs.GRID, dense_runs.CODES)
    assert torch.equal(torch.from_numpy(open_ids(tmp_path / "cache")[...])[:, 0].long(), ids)
    shards = f"shards: {tiny_shards / 'val.tar'}, image_size: {jobs.SIDE}, index_dir: {tmp_path}, num_workers: 1"
    cached = f"{{path: {tmp_path / 'cache'}, contexts: {{{shards}}}}}"
    path = dense_runs.prior(tmp_path / "prior", tiny_shards, stage_1, f"data.train={cached}", f"data.val={cached}")
    rows = (jobs.finish(path, world=2) / "metrics.jsonl").read_text().splitlines()
    prior, last = Prior.load(path.parent / "run"), json.loads(rows[-1])
    with torch.no_grad():
        assert prior(ids, context).loss.item() == pytest.approx(last["val/loss"], abs=1e-6)
    assert last["val/loss"] < json.loads(rows[0])["loss"]


def test_a_prior_learns_from_samples_that_are_encoded_as_they_come(tiny_shards, stage_1, stage_2):
    rows = [json.loads(line) for line in (stage_2 / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(torch.tensor(27.0).log().item(), rel=1e-5)
    assert {"val/loss", "val/unigram", "val/accuracy"} <= rows[-1].keys()
    tokenizer, batch = Tokenizer.load(stage_1), held_out(tiny_shards)
    whose = json.loads((stage_2 / "tokens.json").read_text())
    assert (whose["tokenizer"], whose["tokens"]["num_images"]) == (tokenizer.fingerprint, jobs.NUM_TRAIN)
    prior = Prior.load(stage_2)
    assert (prior.num_codes, prior.grid) == (dense_runs.CODES, dense_runs.GRID)
    entered, context = tokenizer.signal.enter(batch.samples)
    with torch.no_grad():
        found = prior(tokenizer.encode(entered, context), context)
    assert found.loss.item() == pytest.approx(rows[-1]["val/loss"], abs=1e-6)  # of the average


def drawn(stage_1, stage_2, shards, codes):
    """(ids by each way of drawing, what was measured) of the held-out samples, on this many processes."""
    mesh = Mesh(codes=codes)
    tokenizer, prior = Tokenizer.load(stage_1, mesh=mesh), Prior.load(stage_2, mesh=mesh)
    batch = held_out(shards)
    context = tokenizer.signal.enter(batch.samples)[1]
    draws = predict.draws(prior, tokenizer, seed=5)
    mine = slice(mesh.world.rank * 5, mesh.world.rank * 5 + 10 // codes)
    ids = {way: draw(context[mine], batch.numbers[mine]) for way, draw in draws.items()}
    stream = SampleStream(val_of(shards), 2 * codes, mesh.world.rank, codes, train=False)
    return ids, dense.measure(tokenizer, stream, mesh, draws=draws).rows


def test_what_a_prior_predicts_is_measured_beside_true_codes_and_none(tiny_shards, stage_1, stage_2, ranks):
    ids, rows = drawn(stage_1, stage_2, tiny_shards, 1)
    assert list(ids) == [predict.GREEDY, predict.SAMPLED]  # it cannot draw all ids in one pass
    tokenizer, prior, batch = Tokenizer.load(stage_1), Prior.load(stage_2), held_out(tiny_shards)
    context = tokenizer.signal.enter(batch.samples)[1]
    greedy = torch.zeros(10, 0, dtype=torch.int64)
    with torch.no_grad():
        for place in range(4):  # the likeliest id of each place, given those before it
            before = torch.cat([greedy, torch.zeros(10, 4 - place, dtype=torch.int64)], 1).view(10, 2, 2)
            logits = prior.states(before, prior.prefix(context))[:, place] @ prior.head.rows.T
            greedy = torch.cat([greedy, logits.argmax(1, keepdim=True)], 1)
    assert torch.equal(ids["greedy"].flatten(1), greedy)
    error = (tokenizer.decode(ids["greedy"], context).clamp(-1, 1) - batch.samples).square().mean((1, 2, 3))
    assert rows["greedy"]["psnr"] == pytest.approx((10 * (4 / error).log10()).mean().item(), rel=1e-4)
    assert {dense.CEILING, dense.NO_CODE, "greedy", "sampled"} <= rows.keys()
    results = ranks(2, drawn, stage_1, stage_2, tiny_shards, 2)
    for way, expected in ids.items():
        assert torch.equal(torch.cat([found[way] for found, _ in results]), expected)
    assert results[0][1]["sampled"] == pytest.approx(rows["sampled"], rel=1e-5)


def test_the_command_draws_with_the_guidance_that_is_asked_for(tmp_path, stage_1, stage_2, tiny_shards, capsys):
    asked = ["dense", stage_1, "--prior", stage_2, "--training-images", 0, "--device", "cpu", "--batch", 5, "--json"]
    tokenizer, prior, told = Tokenizer.load(stage_1), Prior.load(stage_2), {}
    for guidance in (0.0, 1.0, 60.0):
        assert evaluate.main([*map(str, asked), "--guidance", str(guidance)]) == 0
        told[guidance] = json.loads(capsys.readouterr().out)
        draws = predict.draws(prior, tokenizer, more={"guidance": guidance})
        expected = dense.measure(tokenizer, SampleStream(val_of(tiny_shards), 5, train=False), Mesh(), draws=draws).rows
        for way in draws:
            assert told[guidance]["rows"][way] == pytest.approx(expected[way], rel=1e-6)
        assert told[guidance]["protocol"]["guidance of what is drawn"] == guidance
    assert told[60.0]["rows"]["sampled"] != told[1.0]["rows"]["sampled"]
    assert evaluate.main([*map(str, asked)]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == told[1.0]["rows"]


@pytest.mark.parametrize("given", [("--prior", "x", "--guidance", "-1"), ("--guidance", "2")])
def test_guidance_is_of_what_a_prior_draws(given, capsys):
    assert evaluate.main(["dense", "runs/x", *given]) == 2
    assert "--guidance is of what a prior draws and 0 or more; it is" in capsys.readouterr().err


def test_a_masked_prior_can_draw_all_ids_in_one_pass(tiny_shards, stage_1):
    tokenizer, batch = Tokenizer.load(stage_1), held_out(tiny_shards)
    asked = {"num_codes": dense_runs.CODES, "grid": list(dense_runs.GRID), "num_classes": 0}
    asked |= {"name": "masked", "net": dense_runs.NET}
    prior = priors.build(asked | {"condition": dense_runs.CONDITION})
    context = tokenizer.signal.enter(batch.samples)[1]
    calls = []
    prior.net.register_forward_hook(lambda *_: calls.append(1))
    steps = {}
    for way, draw in predict.draws(prior, tokenizer).items():
        assert draw(context, batch.numbers).shape == (10, *dense_runs.GRID)
        steps[way], calls[:] = len(calls), []
    assert steps == {"greedy": 4, "sampled": 4, "one pass": 1}
    classes = priors.build(asked | {"num_codes": 30, "net": {"width": 16, "num_layers": 1, "num_heads": 2}})
    with pytest.raises(ValueError, match=r"the prior has 30 codes and the tokenizer 27.*condition is classes"):
        predict.draws(classes, tokenizer)
    with pytest.raises(
        ValueError, match=r"is context, an image, and classes are drawn here: .* vqscale evaluate dense"
    ):
        sample.check(prior, tokenizer, SampleRequest(4, (-1,), prior.sample_config({"steps": 4})))


def test_stage_1_goes_on_alike_on_two_processes(tmp_path, tiny_shards, stage_1):
    """With a context, dropped codes and their vector."""
    stop = partial(jobs.at_call, "vqscale.engine.engine:Engine.backward", 3, partial(jobs.hear, signal.SIGTERM), 0)
    path = dense_runs.tokenizer(tmp_path, tiny_shards)
    assert jobs.start(path, before=stop).wait() == [jobs.STOPPED]
    assert jobs.steps_saved(path.parent / "run") == [2, 3]
    jobs.same_numbers(stage_1, jobs.finish(path, world=2))


def test_stage_2_is_the_same_on_two_processes_and_when_it_goes_on_there(tmp_path, tiny_shards, stage_1, stage_2):
    path = dense_runs.prior(tmp_path / "two", tiny_shards, stage_1)
    jobs.same_numbers(stage_2, jobs.finish(path, world=2))
    stop = partial(jobs.at_call, "vqscale.engine.engine:Engine.backward", 3, partial(jobs.hear, signal.SIGTERM), 0)
    path = dense_runs.prior(tmp_path / "parts", tiny_shards, stage_1)
    assert jobs.start(path, before=stop).wait() == [jobs.STOPPED]
    assert jobs.steps_saved(path.parent / "run") == [2, 3]
    jobs.same_numbers(stage_2, jobs.finish(path, world=2))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("tokenizer=null",), "tokenizer is null, and data.train is images of 3 x 16 x 16 numbers"),
        (("prior.num_codes=30", "prior.grid=[4, 4]"), "change prior.num_codes: 30 -> 27, prior.grid: [4, 4] -> [2, 2]"),
        (("data.train.image_size=32", "data.val.image_size=32"), "learned positions for samples of 16 x 16"),
        (("data.val=null", "data.train={medium: depth, shards: x.tar}"), "is of color, made of images, and data.train"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_starts(tmp_path, tiny_shards, stage_1, overrides, said):
    job = jobs.start(dense_runs.prior(tmp_path, tiny_shards, stage_1, *overrides))
    assert job.wait() == [2], job.output
    assert said in " ".join(job.output.split())


def test_a_prior_of_contexts_wants_a_tokenizer_that_has_one(tmp_path, tiny_shards):
    plain = jobs.finish(jobs.write_config(tmp_path / "plain", tiny_shards, "run.steps=2"))
    job = jobs.start(dense_runs.prior(tmp_path / "prior", tiny_shards, plain))
    assert job.wait() == [2], job.output
    assert "encodes without a context (its net and signal know none)" in " ".join(job.output.split())
