"""Whole runs of priors: what they leave behind, that mesh and engine do not change what is computed, that a run which
was killed and continued on other processes ends like one that nothing happened to.
"""

from __future__ import annotations

import json
import math
import re
import signal
from functools import partial

import jobs
import prior_runs
import pytest
import torch
from prior_runs import CODES, GRID, NUM_TRAIN, NUM_VAL, TOKENIZER

from vqscale import config as configuration
from vqscale.codes import noise, tally
from vqscale.data.config_tokens import TokensConfig
from vqscale.data.tokens.stream import Cache, TokenStream
from vqscale.metrics import unigram
from vqscale.nets.config import ConvConfig
from vqscale.parallel.mesh import Mesh
from vqscale.priors import Prior
from vqscale.quantizers.config.tables import VQConfig
from vqscale.run import folder
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.config import PriorRun, Run

pytestmark = [pytest.mark.slow, pytest.mark.dist]


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return prior_runs.write_caches(tmp_path_factory.mktemp("caches"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory, caches):
    """The run that others are compared with: plain torch, one process."""
    return jobs.finish(prior_runs.write_config(tmp_path_factory.mktemp("alone"), caches))


def test_what_a_run_leaves_behind(alone, caches):
    config = configuration.load(Run, alone / "run.yaml")
    assert isinstance(config, PriorRun)
    rows = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert all(math.isfinite(x) for row in rows for x in row.values())
    assert {"loss", "perplexity", "lr", "grad_norm", "skipped", "time/tokens_per_s", "time/memory_mib"} <= rows[
        0
    ].keys()
    first = {"cross_entropy": math.log(CODES), "z_loss": 1e-3 * math.log(CODES) ** 2}
    assert {name: rows[0][f"loss/{name}"] for name in first} == pytest.approx(first, rel=1e-5)
    assert rows[0]["loss"] == pytest.approx(sum(first.values()), rel=1e-6)
    assert rows[0]["perplexity"] == pytest.approx(CODES, rel=1e-5)
    smoothing = rows[-2]["loss"] - sum(rows[-2][f"loss/{name}"] for name in first)
    assert smoothing > 1e-3  # of ids that are told apart
    assert rows[-2]["loss"] < rows[0]["loss"] - 0.05
    assert rows[4]["val/images"] == 8  # run.eval_images; the last evaluation takes all
    last = rows[-1]
    assert last["val/images"] == NUM_VAL
    assert last["val/perplexity"] == pytest.approx(math.exp(last["val/loss"]))
    assert last["val/uniform"] == pytest.approx(math.log(CODES))
    ids = torch.from_numpy(Cache(caches / "val").ids[:, 0]).flatten()
    shares = torch.bincount(ids, minlength=CODES) / len(ids)
    seen = torch.bincount(torch.from_numpy(Cache(caches / "train").ids[:]).flatten(), minlength=CODES)
    assert (shares > 0).sum() < (seen > 0).sum() < CODES  # of two views, and there are codes that it has not
    nats = ((NUM_TRAIN * 2 * 6 + CODES) / (seen + 1.0)).log()
    assert last["val/unigram"] == pytest.approx(float(shares @ nats), abs=1e-5)
    assert last["val/usage"] == pytest.approx(float((shares > 0).float().mean()))

    summary = json.loads((alone / "summary.json").read_text())
    assert (summary["num_codes"], summary["steps"], summary["prior"]) == (CODES, 8, "autoregressive")
    assert summary["loss"] == last["val/loss"]
    assert summary["tokens_per_s"] == pytest.approx(6 * summary["images_per_s"])
    found = json.loads((alone / "tokens.json").read_text())
    assert found["tokenizer"] == TOKENIZER
    assert found["tokens"]["num_images"] == NUM_TRAIN
    assert jobs.steps_saved(alone) == [2, 4, 6, 8]


def loaded(path, weights, codes):
    """(nats of every held-out image, a sample, card, fingerprint) of the prior in `path`, on this many processes."""
    mesh = Mesh(codes=codes)
    prior = Prior.load(path, mesh=mesh, weights=weights)
    assert not prior.training
    ids, labels = torch.arange(12).view(2, *GRID), torch.tensor([1, -1])
    with torch.no_grad():
        nats = prior(ids, labels).nats_B
    sample = prior.sample(labels, {"guidance": 2.0}, numbers_B=torch.arange(2))
    return nats, sample, prior.card, prior.fingerprint


def test_a_trained_prior_is_loaded(alone, caches, ranks):
    prior, summary = Prior.load(alone), json.loads((alone / "summary.json").read_text())
    stream = TokenStream(TokensConfig(str(caches / "val")), NUM_VAL, train=False)
    [batch] = stream.batches()
    with torch.no_grad():
        mean = prior(batch.ids, batch.labels).loss.item()
        best = (prior.states(batch.ids, prior.prefix(batch.labels)) @ prior.head.rows.t()).argmax(2)
    assert mean == pytest.approx(summary["loss"], abs=1e-6)  # of the average
    right = (best == batch.ids.flatten(1)).double().mean().item()
    assert 0.05 < right < 0.95
    assert summary["accuracy"] == pytest.approx(right)
    assert prior.card["tokenizer"] == TOKENIZER
    assert (prior.num_codes, prior.num_classes, prior.condition.dropout) == (CODES, 5, 0.3)
    one = loaded(alone, "average", 1)
    assert not torch.allclose(one[0], loaded(alone, "parameters", 1)[0])
    assert not torch.allclose(one[0], loaded(alone / "checkpoints" / "0000000004", "average", 1)[0])
    for other in ranks(2, loaded, alone, "average", 2):
        torch.testing.assert_close(other[0], one[0])
        assert torch.equal(other[1], one[1])
        assert other[2:] == one[2:]


def test_the_parts_of_a_loss_are_for_the_eye(alone):
    prior = Prior.load(alone).train()
    ids, labels, keys = torch.arange(36).view(6, *GRID), torch.arange(6) - 1, noise.keys(1, torch.arange(6))
    logits = prior.states(ids, prior.prefix(labels, keys)) @ prior.head.rows.t()
    found = prior(ids, labels, keys)
    expected = {
        "cross_entropy": torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()),
        "z_loss": 1e-3 * logits.logsumexp(2).square().mean(),
    }
    torch.testing.assert_close(found.parts, {name: x.detach() for name, x in expected.items()})
    assert found.right_B is None
    assert prior.eval()(ids, labels).right_B.shape == (6,)
    with tally.silent():
        quiet = prior(ids, labels)
    assert (quiet.parts, quiet.right_B) == ({}, None)


def test_what_is_no_prior_is_not_loaded(alone, tmp_path):
    with pytest.raises(ValueError, match="neither"):
        Prior.load(tmp_path)
    (tmp_path / "run.yaml").write_text((alone / "run.yaml").read_text().replace("task: prior", "task: tokenizer"))
    (tmp_path / "checkpoints").symlink_to(alone / "checkpoints")
    with pytest.raises(ValueError, match="task 'tokenizer', and a prior comes from a run with task 'prior'"):
        Prior.load(tmp_path / "checkpoints" / "0000000008")


@pytest.mark.parametrize(
    ("world", "more"),
    [
        (2, ()),
        (4, ("mesh.data=2",)),
        (2, ("engine.accumulation=2",)),
        (2, ("engine.name=deepspeed", "engine.zero_stage=2")),
        (2, ("engine.name=deepspeed", "engine.zero_stage=3", "prior.net.checkpointing=true")),
    ],
    ids=["codes 2", "data 2 codes 2", "accumulation", "stage 2", "stage 3"],
)
def test_a_global_batch_gives_the_same_run(tmp_path, caches, alone, world, more):
    run = jobs.finish(prior_runs.write_config(tmp_path, caches, *more), world=world)
    jobs.same_numbers(alone, run)


def test_killed_and_stopped_and_continued_on_others(tmp_path, caches, alone):
    """Killed in step 4 (the second of an epoch of three) on two processes, stopped in step 6 on one, ended on two."""
    path = prior_runs.write_config(tmp_path, caches)
    backward = "vqscale.engine.engine:Engine.backward"
    kill = partial(jobs.at_call, backward, 4, partial(jobs.hear, signal.SIGKILL), 1)
    assert jobs.start(path, world=2, before=partial(jobs.saved_at_once, kill)).wait() == [1, -9]
    run = tmp_path / "run"
    assert jobs.steps_saved(run) == [2]
    stop = partial(jobs.at_call, backward, 3, partial(jobs.hear, signal.SIGTERM), 0)
    job = jobs.start(path, before=stop)
    assert job.wait() == [jobs.STOPPED], job.output
    assert jobs.steps_saved(run) == [2, 4, 5]
    jobs.same_numbers(alone, jobs.finish(path, "engine.name=deepspeed", world=2))


def test_accumulation_may_change_on_the_way(tmp_path, caches, alone):
    """Two processes, then one with two micro-batches of the same images, then one with four."""
    path = prior_runs.write_config(tmp_path, caches)
    for step, world, accumulation in ((3, 2, 1), (2, 1, 2)):
        stop = partial(jobs.at_call, "vqscale.engine.engine:Engine.backward", 1 + step * accumulation)
        stop = partial(stop, partial(jobs.hear, signal.SIGTERM), 0)
        job = jobs.start(path, f"engine.accumulation={accumulation}", world=world, before=stop)
        assert job.wait() == [jobs.STOPPED] * world, job.output
    assert jobs.steps_saved(tmp_path / "run") == [2, 4, 6, 7]
    jobs.same_numbers(alone, jobs.finish(path, "engine.accumulation=4", "engine.name=deepspeed"))


def test_a_tokenizer_keeps_its_accumulation(tmp_path):
    path = jobs.write_config(tmp_path, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text(configuration.dump(configuration.load(Run, path)))
    folder.check(configuration.load(Run, path, ["mesh.codes=1"]))
    with pytest.raises(ValueError, match=r"engine\.accumulation: 1 -> 2"):
        folder.check(configuration.load(Run, path, ["engine.accumulation=2"]))


def test_a_run_does_not_go_on_with_another_cache(tmp_path, alone):
    other = prior_runs.write_cache(tmp_path / "other", NUM_TRAIN, 1, storage=8)
    before = jobs.contents(alone)
    job = jobs.start(alone.parent / "run.yaml", f"data.train.path={other}", "run.steps=9")
    assert job.wait() == [2]
    assert re.search(r"trained on data with fingerprint \w+, data.train.path now has \w+: .*same cache", job.output)
    assert jobs.contents(alone) == before


def test_with_dropout_to_the_bit(tmp_path, caches):
    dropout = ("prior.net.dropout_ffn=0.2", "prior.net.dropout_token=0.1", "engine.precision=bf16")
    whole = jobs.finish(prior_runs.write_config(tmp_path / "1", caches, *dropout))
    path = prior_runs.write_config(tmp_path / "2", caches, *dropout)
    kill = partial(jobs.at_call, "vqscale.engine.engine:Engine.backward", 6, partial(jobs.hear, signal.SIGKILL), 0)
    assert jobs.start(path, before=kill).wait() == [-9]
    jobs.same_bits(whole, jobs.finish(path), 8)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("prior.num_codes=38", r"does not fit:\n  it has 37 codes, but expected are 38"),
        ("prior.grid=[3,2]", r"it has \[2, 3\] positions along the sides \(grid\), but expected are \[3, 2\]"),
        ("prior.num_classes=3", r"labels up to 4, and prior.num_classes is 3: use at least prior.num_classes=5"),
        ("data.train.tokenizer=beef", "the one in use has beef"),
        ("data.val.path=OTHER", f"with fingerprint {'e' * 64}.*the one in use has {TOKENIZER}"),
        ("prior.head.embedding=codebook", "tokenizer is None, and the prior takes vectors of its codes or contexts"),
        ("prior.nett.width=3", "prior.nett.*did you mean prior.net"),
        ("task=priors", "did you mean prior"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_is_written(tmp_path, caches, override, said):
    if "OTHER" in override:
        other = prior_runs.write_cache(tmp_path / "other", 4, 1, tokenizer="e" * 64)
        override = override.replace("OTHER", str(other))
    path = prior_runs.write_config(tmp_path, caches, override)
    job = jobs.start(path)
    assert job.wait() == [2]
    assert re.search(said, job.output, re.DOTALL), job.output
    assert not (tmp_path / "run").exists()


def test_labels_that_are_not_known_are_spoken_of(tmp_path):
    """None of them is an error, some are a note, and a prior without classes looks at none."""
    for name, unknown in (("none", NUM_TRAIN), ("some", 7), ("all", 0)):
        prior_runs.write_cache(tmp_path / name / "train", NUM_TRAIN, 1, unknown)
        prior_runs.write_cache(tmp_path / name / "val", NUM_VAL, 2, unknown=NUM_VAL if name == "none" else 0)
    for cache, said in (("train", "label of none of its 24"), ("val", "label of none of its 10")):
        mixed = f"data.{cache}.path={tmp_path / 'none' / cache}"
        job = jobs.start(prior_runs.write_config(tmp_path / f"{cache} refused", tmp_path / "all", mixed))
        assert job.wait() == [2]
        assert re.search(f"{said} images, and prior.num_classes is 5.*num_classes=0", job.output), job.output
    job = jobs.start(prior_runs.write_config(tmp_path / "1", tmp_path / "some", "run.steps=1"), world=2)
    assert job.wait() == [0, 0], job.output
    assert job.output.count(f"7 of the 24 images in {tmp_path / 'some' / 'train'} have no label") == 1

    plain = ("prior.num_classes=0", "run.steps=4")
    labelled = jobs.finish(prior_runs.write_config(tmp_path / "2", tmp_path / "all", *plain))
    jobs.same_bits(labelled, jobs.finish(prior_runs.write_config(tmp_path / "3", tmp_path / "none", *plain)), 4)


def test_frequencies_are_of_a_bounded_number_of_shards(caches, monkeypatch):
    monkeypatch.setattr(unigram, "COUNTED_SHARDS", 4)
    stream = TokenStream(TokensConfig(str(caches / "train"), views="first"), 8)
    assert (stream.card.num_shards, stream.card.storage) == (6, 4)
    chosen = torch.from_numpy(Cache(caches / "train").ids[:, 0]).view(6, -1)[[0, 1, 3, 4]]
    assert torch.equal(unigram.count(stream, Mesh())[0], torch.bincount(chosen.flatten(), minlength=CODES))


def save_tokenizer(folder, seed):
    """A tokenizer that nobody trained, of CODES codes of 8 numbers; returns its fingerprint."""
    config = TokenizerConfig(
        net=ConvConfig(channels=8, multipliers=(1, 1), num_blocks=1, z_channels=8, attention_levels=(), num_groups=4),
        quantizer=VQConfig(num_codes=CODES, dim=8),
    )
    tokenizer = Tokenizer.from_config(config, seed=seed)
    tokenizer.save(folder)
    return tokenizer.fingerprint


def test_ids_look_like_the_vectors_of_their_codes(tmp_path):
    made_by = save_tokenizer(tmp_path / "tokenizer", 1)
    caches = tmp_path / "caches"
    for name, num in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        prior_runs.write_cache(caches / name, num, 1, tokenizer=made_by)
    features = ("prior.head.embedding=codebook", "prior.feature_dim=8", f"tokenizer={tmp_path / 'tokenizer'}")
    one = jobs.finish(prior_runs.write_config(tmp_path / "1", caches, *features))
    path = prior_runs.write_config(tmp_path / "2", caches, *features)
    jobs.same_numbers(one, jobs.finish(path, world=2))
    vectors_KF = Tokenizer.load(tmp_path / "tokenizer").quantizer.decode(torch.arange(CODES))
    head = Prior.load(one).head
    torch.testing.assert_close(head.inputs.rows, vectors_KF / vectors_KF.square().mean().sqrt())

    save_tokenizer(tmp_path / "other", 2)
    job = jobs.start(prior_runs.write_config(tmp_path / "3", caches, *features), f"tokenizer={tmp_path / 'other'}")
    assert job.wait() == [2]
    assert re.search(f"has the fingerprint .*made by the one with {made_by}", job.output), job.output
    assert not (tmp_path / "3" / "run").exists()


def test_a_dry_run_counts_and_writes_nothing(tmp_path, caches, alone):
    path = prior_runs.write_config(tmp_path, caches)
    job = jobs.start(path, "data.batch=12", "--dry-run", "--world", "6")
    assert job.wait() == [0], job.output
    assert "8 steps of 12 images, data 1 x codes 6 = 6 processes, 12 tokens per rank" in job.output
    prior = Prior.load(alone)
    total = sum(p.numel() for p in prior.parameters())
    assert f"in all {total:,}" in " ".join(job.output.split())
    assert not (tmp_path / "run").exists()
