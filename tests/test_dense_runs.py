"""Both stages of dense prediction as whole runs: a tokenizer with a context, a prior of ids encoded as they come."""

from __future__ import annotations

import json
import signal
from functools import partial

import dense_runs
import jobs
import pytest
import torch

from vqscale.data.config import ImagesConfig
from vqscale.data.samples import SampleStream
from vqscale.data.tokens.format import open_ids
from vqscale.data.views import Source
from vqscale.parallel.mesh import Mesh
from vqscale.priors import Prior
from vqscale.programs import encode
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


def held_out(shards):
    config = ImagesConfig(str(shards / "val.tar"), image_size=jobs.SIDE, num_workers=0, index_dir=str(shards))
    return next(SampleStream(config, jobs.NUM_VAL, train=False).batches())


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
    refused = jobs.start(
        dense_runs.prior(tmp_path, tiny_shards, stage_1, f"data.train={{path: {tmp_path / 'cache'}}}", "data.val=null")
    )
    assert refused.wait() == [2]
    assert "prior.condition is context, and data.train is a token cache, which has ids and no contexts" in (
        " ".join(refused.output.split())
    )


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
