"""Priors as folders that stand for themselves: without a training's moments, to the bit, on any number of processes."""

from __future__ import annotations

import itertools
import json
import shutil

import jobs
import numpy as np
import prior_runs
import pytest
import torch
from safetensors.torch import load_file
from saved_runs import IBQ, small, write_run
from slow_metrics import Small
from test_priors import CODES, batch, config_of, lively
from test_sample_tools import QUICK, tool

from vqscale import config as configuration
from vqscale import priors
from vqscale.disk import files, manifest
from vqscale.nets.mode import evaluating
from vqscale.parallel.mesh import Mesh
from vqscale.priors import PRIORS, Prior
from vqscale.tokenizer.export import CARD, WEIGHTS, entries
from vqscale.tokenizer.matching import tokenizer_of
from vqscale.tokenizer.model import Tokenizer

CODEBOOK = {**IBQ, "num_codes": prior_runs.CODES}
HEADS = {"rows": {}, "tied": {"head": {"embedding": "tied"}}}
HEADS["codebook"] = {"head": {"embedding": "codebook"}, "feature_dim": 5}


def same(one: Prior, other: Prior) -> None:
    """The same parameters, losses and samples to the bit, and so the same fingerprint."""
    left, right = entries(one), entries(other)
    assert list(left) == list(right)
    for name in left:
        assert torch.equal(left[name].tensor, right[name].tensor), name
    ids, labels = batch()
    with torch.no_grad(), evaluating(one), evaluating(other):
        assert torch.equal(one(ids, labels).nats_B, other(ids, labels).nats_B)
    drawn = [prior.sample(labels, numbers_B=torch.arange(6), settings={"guidance": 2.0}) for prior in (one, other)]
    assert torch.equal(*drawn)
    assert one.fingerprint == other.fingerprint


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", PRIORS)
def test_what_is_saved_is_loaded_to_the_bit(name, head, tmp_path):
    if name == "coarse_to_fine" and head != "tied":
        pytest.skip("its fine ids are not embedded")
    prior = lively(priors.build(config_of(name, **HEADS[head])))
    if head == "codebook":
        vectors = torch.randn(CODES, 5, generator=torch.Generator().manual_seed(2))
        prior.head.set_features(lambda ids: vectors[ids])
    assert prior.save(tmp_path / "out", {"tokenizer": "f00d"}) == tmp_path / "out"
    loaded = Prior.load(tmp_path / "out")
    assert not any(part.training for part in loaded.modules())
    assert (loaded.config, loaded.card) == (prior.config, {"tokenizer": "f00d"})
    same(prior, loaded)

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [CARD, WEIGHTS]
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert {name: tuple(x.shape) for name, x in found.items()} == {n: e.shape for n, e in entries(prior).items()}
    card = json.loads((tmp_path / "out" / CARD).read_text())
    assert (card["format"], card["fingerprint"]) == ("vqscale prior", prior.fingerprint)
    assert card["config"] == configuration.to_dict(prior.config)
    assert card["weights"] == {"file": WEIGHTS, **manifest.seal(tmp_path / "out" / WEIGHTS)}


def on_two(folder, source, codes):
    mesh = Mesh(data=2 // codes, codes=codes)
    prior = Prior.load(source, mesh=mesh)
    prior.save(folder)
    assert len(prior.head.rows) == prior.head.layout.count <= -(-CODES // codes)
    labels = batch()[1]
    return prior.fingerprint, prior.sample(labels, numbers_B=torch.arange(6), settings={"guidance": 2.0})


@pytest.mark.dist
@pytest.mark.parametrize("codes", [1, 2])
def test_two_processes_save_and_load_the_same(ranks, tmp_path, codes):
    prior = lively(priors.build(config_of("autoregressive")))
    prior.save(tmp_path / "one", {"tokenizer": "f00d"})
    ids = prior.sample(batch()[1], numbers_B=torch.arange(6), settings={"guidance": 2.0})
    for fingerprint, drawn in ranks(2, on_two, tmp_path / "two", tmp_path / "one", codes):
        assert fingerprint == prior.fingerprint
        assert torch.equal(drawn, ids)
    for name in (WEIGHTS, CARD):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.fixture
def prior():
    return priors.build(config_of("autoregressive"))


def test_a_prior_is_written_over_nothing(prior, tmp_path):
    saved, tokenizer = prior.save(tmp_path / "prior"), small().save(tmp_path / "tokenizer")
    run = write_run(tmp_path / "run", small())
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / CARD).write_text('{"format": "vqscale token cache"}')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for there, what in (
        (saved, "prior"),
        (tokenizer, "tokenizer"),
        (tmp_path / "cache", "token cache"),
    ):
        with pytest.raises(
            ValueError, match=f"has the card of a 'vqscale {what}', and a prior is not written over it: give"
        ):
            prior.save(there)
    with pytest.raises(ValueError, match="holds a run or a checkpoint, and a prior is saved in a folder of its own"):
        prior.save(run)
    with pytest.raises(ValueError, match="has the card of a 'vqscale prior', and a tokenizer is not written over it"):
        small().save(saved)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    small().save(tokenizer)  # one tokenizer takes the place of another


def refused_everywhere(folder, file):
    prior = priors.build(config_of("autoregressive"), Mesh(codes=2))
    with pytest.raises(ValueError, match="is not written over it"):
        prior.save(folder)
    with pytest.raises(RuntimeError, match=r"the prior was not written to .*NotADirectoryError"):
        prior.save(file / "out")
    return True


@pytest.mark.dist
def test_what_cannot_be_saved_is_an_error_on_all_ranks(ranks, prior, tmp_path):
    prior.save(tmp_path / "prior")
    (tmp_path / "file").write_text("")
    assert ranks(2, refused_everywhere, tmp_path / "prior", tmp_path / "file") == [True, True]


def test_a_save_that_fails_in_the_middle_leaves_no_prior(prior, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(RuntimeError, match=r"the prior was not written to .*No space left on device"):
        prior.save(tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"has neither card\.json.*or a folder that a prior was saved to"):
        Prior.load(tmp_path / "out")
    prior.save(tmp_path / "out")
    same(prior, Prior.load(tmp_path / "out"))


def test_what_is_no_prior_is_refused(prior, tmp_path):
    saved, tokenizer = prior.save(tmp_path / "prior"), small().save(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="is the card of 'vqscale tokenizer' and not of a 'vqscale prior': give"):
        Prior.load(tokenizer)
    with pytest.raises(ValueError, match="is the card of 'vqscale prior' and not of a 'vqscale tokenizer': give"):
        Tokenizer.load(saved)
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"as sha256, and .* exchanged after it was written; copy the folder again"):
        Prior.load(saved)
    (saved / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="does not exist: put it back, or save the prior again"):
        Prior.load(saved)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tokenizer, the run of a prior over its ids, and that prior exported. Not to be changed."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = small(quantizer=CODEBOOK)
    tokenizer.save(folder / "tokenizer")
    for split in ("train", "val"):
        prior_runs.write_cache(folder / split, 12, 1, tokenizer=tokenizer.fingerprint)
    jobs.finish(prior_runs.write_config(folder, folder, "run.steps=4", "optim.lr=0.03"))
    Prior.load(folder / "run").save(folder / "prior")
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The run of a tokenizer, whose averages are others than its parameters, and the fingerprints of the two."""
    run = write_run(tmp_path_factory.mktemp("two") / "run", small(quantizer=CODEBOOK, seed=3), average=0.25)
    return run, [Tokenizer.load(run, weights=weights).fingerprint for weights in ("average", "parameters")]


@pytest.mark.dist
def test_the_prior_of_a_run_is_exported(place, tmp_path):
    trained, exported = Prior.load(place / "run"), Prior.load(place / "prior")
    assert exported.card == trained.card
    assert exported.card["tokenizer"] == Tokenizer.load(place / "tokenizer").fingerprint
    assert exported.card["origin"] == "run/checkpoints/0000000004, average"
    assert exported.fingerprint == trained.fingerprint
    raw = Prior.load(place / "run", weights="parameters")
    assert Prior.load(raw.save(tmp_path / "raw")).fingerprint == raw.fingerprint != exported.fingerprint
    assert json.loads((tmp_path / "raw" / CARD).read_text())["origin"].endswith(", parameters")


def draw(place, out, *words, prior="prior"):
    command = (place / prior, place / "tokenizer", out, *QUICK, "--per-class", 2, "--guidance", 2, *words)
    return tool("sample", *command)


@pytest.mark.slow
@pytest.mark.dist
def test_an_exported_prior_draws_what_its_run_draws(place, tmp_path, ranks):
    status, said = draw(place, tmp_path / "one")
    assert status == 0, said
    for codes in (1, 2):
        answers = ranks(2, draw, place, tmp_path / f"codes{codes}", "--codes", codes)
        assert [status for status, _ in answers] == [0, 0], answers
        with np.load(tmp_path / "one" / "samples.npz") as one, np.load(tmp_path / f"codes{codes}/samples.npz") as two:
            for key in one.files:
                np.testing.assert_array_equal(one[key], two[key])
    prior = Prior.load(place / "run")
    labels = torch.arange(10) % 5
    with np.load(tmp_path / "one" / "samples.npz") as file:
        np.testing.assert_array_equal(file["ids"], prior.sample(labels, {"guidance": 2.0}, numbers_B=torch.arange(10)))
    assert "10 images of 5 classes are in" in draw(place, tmp_path / "one", prior="run")[1]  # to the tools they are one


@pytest.mark.slow
@pytest.mark.dist
def test_a_sweep_takes_an_exported_prior(place, two, tmp_path):
    np.savez(tmp_path / "reference.npz", np.random.default_rng(0).integers(0, 256, (20, 4, 6, 3), dtype=np.uint8))
    (tmp_path / "small.pth").touch()  # `tool` puts a network in its place
    files = ["--reference", tmp_path / "reference.npz", "--inception", tmp_path / "small.pth"]
    more = [*files, "--num-images", 10, *QUICK]
    words = [place / "tokenizer", tmp_path / "out", *more, "--guidance", "1,2"]
    status, said = tool("sweep", place / "prior", *words, network=Small())
    assert status == 0, said
    table = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert table["prior"]["fingerprint"] == Prior.load(place / "run").fingerprint
    assert [row["guidance"] for row in table["rows"]] == [1, 2]
    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/result.json")}
    assert tool("sweep", place / "run", *words, network=Small())[0] == 0
    assert {path: path.stat().st_mtime_ns for path in results} == results  # measured already: to the tools they are one
    run, (_, parameters) = two
    prior = Prior.load(place / "run").save(tmp_path / "prior", {"tokenizer": parameters})
    assert tool("sweep", prior, run, tmp_path / "other", *more, network=Small())[0] == 0
    assert json.loads((tmp_path / "other" / "sweep.json").read_text())["tokenizer"]["fingerprint"] == parameters


def found(path, prints):
    """The fingerprints of what is taken for each, and what is said where there is none."""
    mesh = Mesh(codes=2) if torch.distributed.is_initialized() else Mesh()
    taken = [tokenizer_of(path, made_by, mesh).fingerprint for made_by in prints]
    with pytest.raises(ValueError, match="were made by the one with f00d: give that tokenizer, or encode") as caught:
        tokenizer_of(path, "f00d", mesh)
    return taken, str(caught.value)


@pytest.mark.slow
@pytest.mark.dist
def test_of_a_runs_two_weights_those_that_made_the_ids_are_taken(two, ranks, tmp_path):
    run, (average, parameters) = two
    assert average != parameters
    taken, said = found(run, [average, parameters, None])
    assert taken == [average, parameters, average]
    assert f"has the fingerprint {average} (averages) or {parameters} (parameters), and" in said
    assert ranks(2, found, run, [average, parameters, None], timeout_s=180.0) == [(taken, said)] * 2
    exported = Tokenizer.load(run).save(tmp_path / "out")
    assert f"has the fingerprint {average}, and" in found(exported, [average])[1]


@pytest.mark.slow
@pytest.mark.dist
def test_weights_are_those_of_the_prior_alone(place, two, tmp_path):
    """Ids that the tokenizer's parameters made are decoded by them, whichever weights of the prior are asked for."""
    run, (average, parameters) = two
    notes = place / "run" / "tokens.json"
    of_another = tmp_path / "run"
    shutil.copytree(place / "run", of_another)
    for number, (made_by, weights) in enumerate(itertools.product((average, parameters), ("average", "parameters"))):
        (of_another / "tokens.json").write_text(json.dumps(json.loads(notes.read_text()) | {"tokenizer": made_by}))
        out = tmp_path / str(number)
        status, said = tool("sample", of_another, run, out, *QUICK, "--num-images", 5, "--weights", weights)
        assert status == 0, said
        facts = json.loads((out / "sample.json").read_text())
        assert facts["tokenizer"]["fingerprint"] == made_by
        assert facts["prior"]["fingerprint"] == Prior.load(of_another, weights=weights).fingerprint
    status, said = tool("sample", place / "run", run, tmp_path / "none", *QUICK)
    made_by = json.loads(notes.read_text())["tokenizer"]
    assert status == 2
    assert all(fingerprint in said for fingerprint in (average, parameters, made_by))
    assert not (tmp_path / "none").exists()


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("which", [0, 1])
def test_a_prior_learns_from_the_vectors_of_the_codes_that_made_its_ids(two, tmp_path, which, world):
    run, prints = two
    for split in ("train", "val"):
        prior_runs.write_cache(tmp_path / split, 12, 1, tokenizer=prints[which])
    features = ("prior.head.embedding=codebook", "prior.feature_dim=4", f"tokenizer={run}", "run.steps=1")
    trained = jobs.finish(prior_runs.write_config(tmp_path, tmp_path, *features), world=world)
    tokenizer = Tokenizer.load(run, weights=("average", "parameters")[which])
    vectors_KF = tokenizer.quantizer.decode(torch.arange(prior_runs.CODES))
    rows = Prior.load(trained).head.inputs.rows
    torch.testing.assert_close(rows, vectors_KF / vectors_KF.square().mean().sqrt())
