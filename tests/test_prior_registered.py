"""A prior in one file (lib/bag_prior.py), and one line, is trained, planned and sampled by its own dials."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import jobs
import numpy as np
import prior_runs
import pytest
import torch
from bag_prior import LINE, BagConfig, BagSampleConfig, register
from saved_runs import IBQ, small
from test_sample_tools import QUICK, sweep, sweeping, tool

from vqscale import config as configuration
from vqscale import priors
from vqscale.priors import base
from vqscale.programs.sampling.request import SampleRequest
from vqscale.show import run_page
from vqscale.train.config.prior import PriorRun

NET = {"width": 16, "num_layers": 2, "num_heads": 2, "ffn_multiple": 16}
BAG = {"name": "bag", "num_codes": prior_runs.CODES, "grid": list(prior_runs.GRID), "num_classes": 5, "net": NET}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, path in LINE.items():
        monkeypatch.setitem(priors.PRIORS, name, path)


@pytest.fixture
def place(tmp_path):
    """A bag, an autoregressive prior and the tokenizer of their ids, saved."""
    tokenizer = small(quantizer={**IBQ, "num_codes": prior_runs.CODES})
    tokenizer.save(tmp_path / "tokenizer")
    for name in ("bag", "autoregressive"):
        prior = priors.build({**BAG, "name": name}, seed=1)
        with torch.no_grad():
            prior.head.rows.normal_(generator=torch.Generator().manual_seed(3))
        prior.save(tmp_path / name / "run", {"tokenizer": tokenizer.fingerprint})
    return tmp_path


def test_its_config_is_known_to_runs_and_to_their_help():
    data = {"task": "prior", "run": {"folder": "x", "steps": 3}, "data": {"train": {"path": "cache"}}}
    assert isinstance(configuration.parse(PriorRun, {**data, "prior": BAG}).prior, BagConfig)
    assert configuration.parse(PriorRun, data).prior.name == "autoregressive"  # as before there was another
    assert f"prior: {{name: {' | '.join(priors.PRIORS)}, ...}}" in configuration.describe(PriorRun)
    with pytest.raises(configuration.ConfigError, match="did you mean bag"):
        priors.build({**BAG, "name": "bug"})


def test_its_dials_are_options_of_the_sample_program(place):
    models = (place / "bag" / "run", place / "tokenizer")
    words = ("--num-images", 7, "--rounds", 3, "--choice-temperature", 1.5, "--seed", 4)
    status, said = tool("sample", *models, place / "out", *QUICK, *words)
    assert status == 0, said
    with np.load(place / "out" / "samples.npz") as file:
        labels, ids = file["arr_1"], file["ids"]
    prior, numbers = priors.Prior.load(models[0]), torch.arange(7)
    how = {"rounds": 3, "choice_temperature": 1.5}
    np.testing.assert_array_equal(ids, prior.sample(torch.from_numpy(labels), how, numbers_B=numbers, seed=4))
    assert not np.array_equal(ids, prior.sample(torch.from_numpy(labels), {"rounds": 3}, numbers_B=numbers, seed=4))
    facts = json.loads((place / "out" / "sample.json").read_text())
    assert facts["prior"]["name"] == "bag"
    assert facts["settings"].items() >= {**how, "direction": "forward", "seed": 4}.items()
    assert not facts["settings"].keys() & {"guidance", "temperature", "cached"}
    status, said = tool("sample", *models, place / "out", *QUICK, *words, "--rounds", 2)
    assert (status, "settings.rounds is 2, and was 3" in said) == (2, True)


@pytest.mark.parametrize(
    ("prior", "words", "message"),
    [
        (
            "bag",
            ("--top-k", 3, "--uncached"),
            "--top-k, --uncached does not go with {place}/bag/run, a prior of name bag",
        ),
        ("bag", ("--rounds", 0), "error: command line: rounds: rounds is 0: use at least 1"),
        ("bag", ("--direction", "up"), "direction: expected forward | backward, found the text 'up'"),
        (
            "autoregressive",
            ("--rounds", 2),
            "which has --guidance, --schedule, --temperature, --top-k, --top-p, --precision: leave it",
        ),
    ],
)
def test_options_of_another_prior_are_refused(place, prior, words, message):
    status, said = tool("sample", place / prior / "run", place / "tokenizer", place / "out", *QUICK, *words)
    assert (status, message.format(place=place) in said) == (2, True), said
    assert not (place / "out").exists()


def test_help_has_the_dials_of_every_prior_and_whose_they_are():
    status, said = tool("sample", "--help")
    assert status == 0
    mine = said[said.index("how ids are drawn (bag)") :]
    assert "--rounds ROUNDS" in mine
    assert "passes over the image (default: 2)" in mine
    assert "--direction {forward,backward}" in mine
    assert "--top-k" not in mine
    assert "--top-k TOP_K" in said[said.index("how ids are drawn (autoregressive") :]


@pytest.mark.slow
def test_its_dials_are_swept_and_are_the_table(place):
    words = sweeping(place, place, "--rounds", "1,2", "--choice-temperature", "0,4.5")
    words[0] = place / "bag" / "run"
    status, said = sweep(*words)
    assert status == 0, said
    table = json.loads((place / "out" / "sweep.json").read_text())
    assert table["dials"] == list(BagSampleConfig.dials()) == ["rounds", "choice_temperature", "direction"]
    assert [(row["choice_temperature"], row["rounds"]) for row in table["rows"]] == [(0, 1), (0, 2), (4.5, 1), (4.5, 2)]
    assert "\nrounds  choice_temperature  distance_other_inception" in f"\n{said}"
    assert sorted(path.parent.name for path in (place / "out").glob("*/result.json")) == [
        *("rounds1", "rounds1-choice_temperature4.5", "rounds2", "rounds2-choice_temperature4.5")
    ]
    status, said = sweep(*words, "--guidance", "1,2")
    assert (status, said.startswith("error: --guidance does not go with")) == (2, True)


def test_a_page_says_how_its_samples_were_drawn():
    facts = SampleRequest(4, (0,), BagSampleConfig(rounds=9), seed=3).facts()
    told = {**priors.sampling("bag").of(facts).unusual(), "seed": facts["seed"]}
    _, text = run_page.samples({}, {}, {}, told)
    assert "none chosen: rounds 9, seed 3." in text


def test_the_page_speaks_of_a_prior_without_network_and_classes():
    settings = SimpleNamespace(name="bag", num_codes=37, grid=(2, 3), num_classes=0)
    summary = {"steps": 8, "processes": 2, "loss": 3.5}
    _, text = run_page.prior(SimpleNamespace(prior=settings, data=SimpleNamespace(batch=8)), summary, [])
    assert "A model (<b>bag</b>) learns which of the 37 ids stand at the 2 x 3 places of a picture. Trained" in text


def drawn(path, codes):
    register()
    prior = priors.Prior.load(path, mesh=base.Mesh(codes=codes))
    return prior.sample(torch.tensor([0, 3, -1]), {"rounds": 3}, numbers_B=torch.arange(3)), prior.fingerprint


@pytest.mark.slow
@pytest.mark.dist
def test_it_is_trained_planned_and_sampled_on_one_process_and_two(tmp_path, ranks):
    caches = prior_runs.write_caches(tmp_path / "caches")
    net = f"prior.net={json.dumps(NET)}"
    paths = [prior_runs.write_config(tmp_path / str(n), caches, "prior.name=bag", net) for n in (1, 2)]
    one, two = (jobs.finish(path, world=n, before=register) for n, path in enumerate(paths, 1))
    jobs.same_numbers(one, two)  # also what is held out, whose halves follow from the numbers of images
    rows = jobs.rows(one)
    assert rows[-2]["loss"] < rows[0]["loss"] - 0.02
    assert rows[0]["loss"] == pytest.approx(math.log(prior_runs.CODES), abs=0.1)
    assert rows[-1]["val/accuracy"] > 0

    job = jobs.start(paths[0], "--dry-run", "--world", "2", before=register)
    assert job.wait() == [0], job.output
    assert "8 steps of 8 images, data 1 x codes 2 = 2 processes" in job.output

    ids, fingerprint = drawn(one, 1)
    assert ids.shape == (3, *prior_runs.GRID)
    for other in ranks(2, drawn, one, 2):
        assert torch.equal(other[0], ids)
        assert other[1] == fingerprint
