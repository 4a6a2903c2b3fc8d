"""tools/evaluate.py prior: what a run says of its held-out ids, said of any cache, on any number of processes."""

from __future__ import annotations

import importlib
import json

import forks
import jobs
import prior_runs
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.dist]


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return prior_runs.write_caches(tmp_path_factory.mktemp("caches"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, caches):
    return jobs.finish(prior_runs.write_config(tmp_path_factory.mktemp("run"), caches))


def evaluate(*words, world=1):
    return forks.program("tools/evaluate.py", "prior", "--device", "cpu", "--batch", 4, *words, world=world)


def numbers(folder):
    return json.loads((folder / "result.json").read_text())["numbers"]


def test_the_numbers_are_those_of_the_run(run, caches, tmp_path):
    summary = json.loads((run / "summary.json").read_text())
    options = [run, "--cache", caches / "val", "--training", caches / "train", "--out"]
    assert evaluate(*options, tmp_path / "one").returncode == 0
    done = evaluate(*options, tmp_path / "two", "--codes", 2, world=2)
    assert done.returncode == 0, done.stderr
    names = ("loss", "perplexity", "accuracy", "unigram", "uniform", "usage")
    for folder in ("one", "two"):
        found = numbers(tmp_path / folder)
        assert found.pop("images") == prior_runs.NUM_VAL
        assert found == pytest.approx({name: summary[name] for name in names}, rel=1e-5)
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    assert result["data"]["tokenizer"] == prior_runs.TOKENIZER
    assert (result["processes"], result["notes"]) == (2, [])
    assert (tmp_path / "two" / "index.html").exists()


def test_other_weights_fewer_images_and_no_training_cache(run, caches, tmp_path):
    done = evaluate(run, "--cache", caches / "val", "--weights", "parameters", "--images", 5, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = numbers(tmp_path)
    assert found["images"] == 8  # two whole batches
    assert "unigram" not in found
    assert "note: the first 8 of 10 images alone were looked at" in done.stdout
    assert found["loss"] != pytest.approx(json.loads((run / "summary.json").read_text())["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--cache", "nowhere"), "nowhere"),
        (
            ("--cache", "{caches}/val", "--images", "-1", "--batch", "0"),
            "--images is -1: give 0 (all) or more; --batch",
        ),
        (("--cache", "{other}"), "tokenizer"),
        (("--cache", "{caches}/val", "--codes", "2"), "--codes 2 does not divide the 1 processes"),
    ],
)
def test_what_does_not_fit_is_said(run, caches, tmp_path, monkeypatch, capsys, words, said):
    other = prior_runs.write_cache(tmp_path / "other", 8, 3, tokenizer="beef" * 16)
    words = [word.format(caches=caches, other=other) for word in words]
    asked = ["prior", str(run), "--device", "cpu", *words, "--out", str(tmp_path / "out")]
    assert importlib.import_module("vqscale.programs.commands.evaluate").main(asked) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
