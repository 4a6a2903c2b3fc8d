"""A study from nothing to its page with real runs, one of which dies; interrupted and continued; what is refused."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import ROOT, write_config, write_shards

from vqscale import config as configuration
from vqscale.programs import study as studies
from vqscale.programs.study import StudyConfig
from vqscale.show import page


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return write_config(folder, write_shards(folder / "shards"))


def _write(base: Path, **keys) -> Path:
    study = {"base": base.name, "folder": str(base.parent / "study"), "jobs": 2, **keys}
    path = base.parent / "study.yaml"
    path.write_text(json.dumps(study))  # JSON is YAML
    return path


def _quantizers(*names):
    choices = [
        {"label": name, "set": [f"tokenizer.quantizer={{name: {name}, num_codes: 16, dim: 8}}"]} for name in names
    ]
    return {"name": "quantizer", "choices": choices}


K = {"name": "K", "key": "tokenizer.quantizer.num_codes", "values": [16, 32]}


def _expand(path):
    study = configuration.load(StudyConfig, path)
    return study, studies.expand(study, path)


def test_every_combination_is_a_run_of_its_own(base, tmp_path):
    _, members = _expand(_write(base, dials=[_quantizers("vq", "ema"), K], seeds=[0, 7], set=["run.steps=3"]))
    assert [member.name for member in members] == [
        f"{name}-{k}-seed{seed}" for name in ("vq", "ema") for k in (16, 32) for seed in (0, 7)
    ]
    last = members[-1].config
    assert (last.tokenizer.quantizer.name, last.tokenizer.quantizer.num_codes) == ("ema", 32)
    assert (last.run.seed, last.run.steps) == (7, 3)
    assert members[-1].labels == {"quantizer": "ema", "K": "32", "seed": "7"}
    assert len({member.config.run.folder for member in members}) == len(members)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"dials": []}, ["the study is empty", "at least one"]),
        ({"dials": [K], "seeds": []}, ["the study is empty", "seeds"]),
        ({"dials": [{"name": "K", "key": "run.steps"}]}, ["no positions", "give key and values"]),
        ({"dials": [K | {"key": "tokenizer.quantizer.num_code"}]}, ["unknown key", "tokenizer.quantizer.num_codes?"]),
        ({"dials": [K | {"values": [0]}]}, ["num_codes is 0"]),
        ({"dials": [K | {"values": [16, 16]}]}, ["several runs would be called 16-seed0"]),
        ({"dials": [K], "processes": 3}, ["does not divide by 3 processes"]),
        ({"dial": [K]}, ["unknown key", "dials"]),
    ],
)
def test_what_a_study_may_not_say(base, keys, words):
    with pytest.raises(ValueError, match=r"(?s).*") as caught:
        _expand(_write(base, **({"dials": [K]} | keys if "dial" not in keys else keys)))
    for word in words:
        assert word in str(caught.value)


def test_results_of_another_base_config_are_not_mixed(base):
    path = _write(base, dials=[K], folder=str(base.parent / "mixed"))
    study, members = _expand(path)
    studies.settle(study, members)
    before = members[0].file(study).read_text()
    study, members = _expand(_write(base, dials=[K], folder=str(base.parent / "mixed"), set=["optim.lr=0.5"]))
    with pytest.raises(
        ValueError, match=r"(?s)another base config.*optim\.lr: 0\.001 -> 0\.5.*change the study's folder"
    ):
        studies.settle(study, members)
    assert members[0].file(study).read_text() == before


def _tool(path, *words):
    return [sys.executable, str(ROOT / "tools" / "study.py"), str(path), *words]


def _results(base):
    with (base.parent / "study" / "results.csv").open() as file:
        return {line["run"]: line for line in csv.DictReader(file)}


@pytest.mark.slow
def test_from_nothing_to_the_page_with_one_run_that_dies(base):
    dies = {"label": "dies", "set": ["run.device=cuda"]}
    dial = _quantizers("vq", "fsq")
    dial["choices"][1]["set"] = ["tokenizer.quantizer={name: fsq, num_codes: 16}"]
    path = _write(base, dials=[dial | {"choices": [*dial["choices"], dies]}])
    done = subprocess.run(_tool(path), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = _results(base)
    assert {name: line["status"] for name, line in lines.items()} == {
        "vq-seed0": "done", "fsq-seed0": "done", "dies-seed0": "failed"
    }  # fmt: skip
    assert "cuda" in lines["dies-seed0"]["error"]
    assert lines["vq-seed0"]["quantizer"] == "vq"

    summary = json.loads((base.parent / "study" / "runs" / "vq-seed0" / "summary.json").read_text())
    assert float(lines["vq-seed0"]["psnr"]) == summary["psnr"]
    text = (base.parent / "study" / "index.html").read_text()
    assert text.count("data:image/png;base64,") >= len(page.FIGURES) + 2
    assert "dies-seed0" in text
    assert "http" not in text.replace("http-equiv", "")
    # again: what is done stays as it is, the one that died is tried again
    stamp = (base.parent / "study" / "runs" / "vq-seed0" / "summary.json").stat().st_mtime_ns
    again = subprocess.run(_tool(path), capture_output=True, text=True, timeout=300)
    assert again.returncode == 1
    assert (base.parent / "study" / "runs" / "vq-seed0" / "summary.json").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_interrupted_and_continued(base):
    path = _write(
        base,
        dials=[K],
        folder=str(base.parent / "long"),
        set=["run.steps=80", "run.checkpoint_every=80", "run.eval_every=80"],
    )
    process = subprocess.Popen(_tool(path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    _, members = _expand(path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not all(studies.last_row(member.folder) for member in members):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "the same command goes on" in said
    for member in members:
        assert not (member.folder / "summary.json").exists()
        assert os.listdir(member.folder / "checkpoints")
    done = subprocess.run(_tool(path), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for member in members:
        rows = [json.loads(line) for line in (member.folder / "metrics.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in rows if "loss" in row]
        assert steps == list(range(1, 81))


def test_a_collapse_is_told_with_what_was_measured():
    used = {"usage": 0.9, "perplexity": 90.0, "num_codes": 128, "codes/saturation": 1.0}
    assert studies.verdict(used) == "in use"
    dead = used | {"usage": 0.02, "perplexity": 2.0, "codes/latent_norm": 0.125}
    assert studies.verdict(dead) == "collapsed: usage 2%, perplexity 2 of 128; saturation 1, latent_norm 0.125"
    assert studies.verdict({}) == ""


def test_curves_take_the_dial_of_numbers_and_keep_the_seeds_apart():
    lines = [
        {"quantizer": q, "K": str(k), "seed": str(s), "psnr": k + s + (q == "vq")}
        for q in ("vq", "ema") for k in (16, 32) for s in (0, 1)
    ]  # fmt: skip
    assert page.numeric_dial(lines, ["quantizer", "K"]) == "K"
    assert page.numeric_dial(lines, ["quantizer"]) is None
    curves = page.series(lines, "psnr", "K", ["quantizer", "K"])
    assert curves == {"vq": {16.0: [17, 18], 32.0: [33, 34]}, "ema": {16.0: [16, 17], 32.0: [32, 33]}}
