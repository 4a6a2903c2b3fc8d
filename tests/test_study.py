"""Studies of tokenizers and of priors, from nothing to the page with real runs; what stops them; what is refused."""

from __future__ import annotations

import csv
import html
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import prior_runs
import pytest
import yaml
from jobs import ROOT, write_config, write_shards
from saved_runs import IBQ, small

from vqscale import config as configuration
from vqscale.config.schema import classes_of, fields_of
from vqscale.disk import owner
from vqscale.plan import costs_of
from vqscale.programs.commands import evaluate
from vqscale.programs.commands import study as command
from vqscale.programs.commands.evaluate import options
from vqscale.programs.studies import after as study_after
from vqscale.programs.studies import launchers
from vqscale.programs.studies import measured as study_measured
from vqscale.programs.studies import report as study_report
from vqscale.programs.studies import runner as study_runner
from vqscale.programs.studies import samples as study_samples
from vqscale.programs.studies import study as studies
from vqscale.programs.studies.config import StudyConfig
from vqscale.programs.studies.launchers import Launcher, State
from vqscale.programs.studies.launchers.local import Local
from vqscale.run import checkout
from vqscale.show import page, study_page
from vqscale.show.study_page import Results
from vqscale.train.config import Run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return write_config(folder, write_shards(folder / "shards"))


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """A base run of another task, on caches that are there already, beside the tokenizer that made them."""
    folder = tmp_path_factory.mktemp("prior-study")
    tokenizer = small(quantizer={**IBQ, "num_codes": prior_runs.CODES})
    tokenizer.save(folder / "tokenizer")
    for split, number in (("train", prior_runs.NUM_TRAIN), ("val", prior_runs.NUM_VAL)):
        prior_runs.write_cache(folder / "caches" / split, number, 1, tokenizer=tokenizer.fingerprint)
    return prior_runs.write_config(folder, folder / "caches")


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
RATE = {"name": "rate", "key": "optim.lr", "values": [0.001, 1e-2]}


def _expand(path):
    study = configuration.load(StudyConfig, path)
    return study, studies.expand(study, path)


def test_every_combination_is_a_run_of_its_own(base):
    _, trials = _expand(_write(base, dials=[_quantizers("vq", "ema"), K], seeds=[0, 7], set=["run.steps=3"]))
    assert [trial.name for trial in trials] == [
        f"{name}-{k}-seed{seed}" for name in ("vq", "ema") for k in (16, 32) for seed in (0, 7)
    ]
    last = trials[-1].config
    assert (last.tokenizer.quantizer.name, last.tokenizer.quantizer.num_codes) == ("ema", 32)
    assert (last.run.seed, last.run.steps) == (7, 3)
    assert trials[-1].labels == {"quantizer": "ema", "K": "32", "seed": "7"}
    assert len({trial.config.run.folder for trial in trials}) == len(trials)


def test_the_base_may_be_a_run_of_any_task(prior):
    dials = [{"name": "layers", "key": "prior.net.num_layers", "values": [1, 2]}, RATE]
    _, trials = _expand(_write(prior, dials=dials))
    assert [trial.config.task for trial in trials] == ["prior"] * 4
    assert [trial.config.prior.net.num_layers for trial in trials] == [1, 1, 2, 2]
    assert [trial.config.optim.lr for trial in trials] == [0.001, 0.01] * 2


def test_every_task_has_what_a_study_shows_of_it():
    assert set(study_page.TASKS) == {fields_of(run)["task"].default for run in classes_of(Run)}


def test_a_part_is_a_grid_of_its_own_over_the_same_dials(base):
    part = {"dials": [K | {"values": [64]}], "seeds": [3], "processes": 2, "set": ["mesh.codes=2", "run.steps=5"]}
    study = {"dials": [_quantizers("vq", "ema"), K], "seeds": [0, 7], "set": ["run.steps=3"], "parts": [part]}
    _, trials = _expand(_write(base, **study))
    assert [trial.name for trial in trials[8:]] == ["vq-64-seed3", "ema-64-seed3"]
    assert [trial.processes for trial in trials] == [1] * 8 + [2] * 2
    assert [trial.config.run.steps for trial in trials] == [3] * 8 + [5] * 2
    assert [trial.config.mesh.codes for trial in trials[7:9]] == [None, 2]
    assert trials[9].labels == {"quantizer": "ema", "K": "64", "seed": "3"}


def test_a_part_that_says_nothing_would_be_the_study_again(base):
    with pytest.raises(ValueError, match="several runs would be called 16-seed0, 32-seed0"):
        _expand(_write(base, dials=[K], parts=[{}]))


@pytest.mark.parametrize("name", ["sweep #1", "a: b", "g=h", "@x", "*x", "{x}", "[y", "%z", "2024", "~", "it's", '"q"'])
def test_a_folder_of_any_name_holds_its_own_runs(base, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    study, trials = _expand(_write(base, dials=[K], folder=name))
    assert [trial.folder for trial in trials] == [Path(name) / "runs" / run for run in ("16-seed0", "32-seed0")]
    studies.prepare(study, trials)
    kept = configuration.load(Run, trials[1].file)
    assert kept == trials[1].config
    assert [str(path) for path in sorted(tmp_path.iterdir())] == [str(tmp_path / name)]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"dials": []}, ["the study is empty", "at least one"]),
        ({"dials": [K], "seeds": []}, ["the study is empty", "seeds"]),
        ({"dials": [{"name": "K", "key": "run.steps"}]}, ["no positions", "give key and values"]),
        ({"dials": [K | {"key": "tokenizer.quantizer.num_code"}]}, ["unknown key", "tokenizer.quantizer.num_codes?"]),
        ({"dials": [K | {"values": [0]}]}, ["num_codes is 0"]),
        ({"dials": [K | {"values": [16, 16]}]}, ["several runs would be called 16-seed0"]),
        ({"dials": [K, K]}, ["2 dials are called K", "a name of its own"]),
        ({"dials": [K | {"name": "seed"}]}, ["a dial is called seed", "another name"]),
        ({"dials": [K], "parts": [{"dials": [RATE]}]}, ["parts.0.dials", "has the dial rate", "are K"]),
        ({"dials": [K], "parts": [{"seeds": []}]}, ["parts.0.seeds", "leave the key out"]),
        ({"dials": [K], "parts": [{"seeds": [9], "processes": 0}]}, ["parts.0.processes", "at least 1"]),
        ({"dials": [K], "parts": [{"seeds": [9], "processes": 3}]}, ["16-seed9", "does not divide by 3 processes"]),
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
    study, trials = _expand(path)
    studies.prepare(study, trials)
    before = trials[0].file.read_text()
    study, trials = _expand(_write(base, dials=[K], folder=str(base.parent / "mixed"), set=["optim.lr=0.5"]))
    with pytest.raises(
        ValueError, match=r"(?s)another base config.*optim\.lr: 0\.001 -> 0\.5.*change the study's folder"
    ):
        studies.prepare(study, trials)
    assert trials[0].file.read_text() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no STUDY.yaml is given"),
        (["STUDY", "other.yaml"], "other.yaml is neither an option nor key=value"),
        (["STUDY", "--dry-run", "--prepare"], "--dry-run and --prepare exclude each other"),
        (["STUDY", "--local", "--slurm"], "--local and --slurm exclude each other"),
        (["STUDY", "--prepare", "--time=2"], "--time=2 is for a launcher, and --prepare starts nothing"),
        (["STUDY", "--dryrun"], "launcher_options are --dryrun, and launcher local takes none"),
        (["STUDY", "launcher=slrm"], "launcher is slrm, and the launchers are local, slurm: did you mean slurm?"),
        (["STUDY", "--stop"], "stopped where it runs"),
        (["STUDY", "--out", "there"], "--out=there: --report --out FOLDER, once, says where"),
        (["STUDY", "--report", "--out"], "--out=: --report --out FOLDER"),
    ],
)
def test_a_command_that_says_nothing_starts_nothing(base, tmp_path, capsys, words, said):
    place = tmp_path / "study"
    path = _write(base, dials=[K], folder=str(place))
    assert command.main([str(path) if word == "STUDY" else word for word in words] or ["jobs=1"]) == 2
    assert said in capsys.readouterr().err
    assert not place.exists()


def test_a_plan_and_configs_without_a_run(base, prior, tmp_path, capsys):
    for task, dial in ((base, K), (prior, RATE)):
        place = tmp_path / task.parent.name
        path = _write(task, dials=[dial], folder=str(place))
        assert command.main([str(path), "--dry-run"]) == 0
        first, *rest = capsys.readouterr().out.splitlines()
        assert first == f"2 runs of 1 processes, 2 side by side, in {place}"
        assert all("parameters" in line and "MiB per rank, 8 steps" in line for line in rest)
        assert not place.exists()
        assert command.main([str(path), "--prepare"]) == 0
        listed = [Path(line) for line in capsys.readouterr().out.splitlines()]
        assert [configuration.load(Run, each).run.folder for each in listed] == [
            str(place / "runs" / each.stem) for each in listed
        ]
        assert not [*(place / "runs").iterdir()]


def _tool(path, *words):
    return [sys.executable, str(ROOT / "tools" / "study.py"), str(path), *words]


def _results(folder):
    with (folder / "results.csv").open() as file:
        return {line["run"]: line for line in csv.DictReader(file)}


@pytest.mark.slow
def test_from_nothing_to_the_page_with_one_run_that_dies(base):
    dies = {"label": "dies", "set": ["run.device=cuda"]}
    dial = _quantizers("vq", "fsq")
    dial["choices"][1]["set"] = ["tokenizer.quantizer={name: fsq, num_codes: 16}"]
    path = _write(base, dials=[dial | {"choices": [*dial["choices"], dies]}])
    done = subprocess.run(_tool(path), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = _results(base.parent / "study")
    assert {name: line["status"] for name, line in lines.items()} == {
        "vq-seed0": "done", "fsq-seed0": "done", "dies-seed0": "failed"
    }  # fmt: skip
    assert "cuda" in lines["dies-seed0"]["error"]
    assert lines["vq-seed0"]["quantizer"] == "vq"

    summary = json.loads((base.parent / "study" / "runs" / "vq-seed0" / "summary.json").read_text())
    assert float(lines["vq-seed0"]["psnr"]) == summary["psnr"]
    text = (base.parent / "study" / "index.html").read_text()
    assert text.count("data:image/png;base64,") == len(study_page.TASKS["tokenizer"].figures) + 2
    assert "dies-seed0" in text
    assert "http" not in text.replace("http-equiv", "")
    # again: what is done stays as it is, the one that died is tried again
    stamp = (base.parent / "study" / "runs" / "vq-seed0" / "summary.json").stat().st_mtime_ns
    again = subprocess.run(_tool(path), capture_output=True, text=True, timeout=300)
    assert again.returncode == 1
    assert (base.parent / "study" / "runs" / "vq-seed0" / "summary.json").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_a_study_of_a_prior_from_nothing_to_its_page(prior):
    place = prior.parent / "study"
    hot = {"label": "hot", "set": ["optim.lr=0.01"], "sample": ["--temperature=2"]}
    dial = {"name": "rate", "choices": [{"label": "cold", "set": ["optim.lr=0.001"]}, hot]}
    samples = {
        "tokenizer": str(prior.parent / "tokenizer"),
        "options": ["--num-images=10", "--batch=5", "--device=cpu"],
    }
    path = _write(prior, dials=[dial], set=["run.steps=4"], samples=samples)
    done = subprocess.run(_tool(path), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = _results(place)
    assert [line["rate"] for line in lines.values()] == ["cold", "hot"]
    for name, line in lines.items():
        summary = json.loads((place / "runs" / name / "summary.json").read_text())
        rows = [json.loads(row) for row in (place / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        assert (
            float(line["loss"]) == summary["loss"] == next(row["val/loss"] for row in rows[::-1] if "val/loss" in row)
        )
        assert float(line["training loss"]) == next(row["loss"] for row in rows[::-1] if "loss" in row)
        assert {"perplexity", "accuracy", "unigram", "tokens_per_s", "verdict"} <= {k for k, v in line.items() if v}
        assert 300 < float(line["memory_mib"]) < 3000, "resident memory of a process with torch in it"
        drawn = json.loads((place / "runs" / name / "samples" / "sample.json").read_text())
        assert float(line["samples_per_s"]) == drawn["made"]["images_per_s"] > 0
        assert drawn["settings"]["temperature"] == {"cold": 1.0, "hot": 2.0}[line["rate"]]
        planned = costs_of(configuration.load(Run, place / "configs" / f"{name}.yaml"), 1).operations
        trained = sum(planned[f"training: {part}"] for part in ("transformer", "head"))
        assert float(line["training_gflop"]) == pytest.approx(trained / 1e9)
        looked, head = (planned[f"sampling, 1 pass: {part}"] for part in ("transformer", "head"))
        guidance = drawn["settings"]["guidance"]
        assert float(line["sampling_gflop"]) == pytest.approx((looked * (1 if guidance == 1 else 2) + head) / 1e9)
    text = (place / "index.html").read_text()
    assert text.count("data:image/png;base64,") == len(study_page.TASKS["prior"].figures) - 1 + 2
    for key, figure in study_page.TASKS["prior"].figures.items():
        if key == "recognised":  # a classifier would say it, and there is none
            continue
        assert (place / "figures" / f"{key}.png").stat().st_size > 1000
        assert html.escape(figure.caption) in text
    assert "psnr" not in text
    assert "psnr" not in done.stdout
    # again: what is drawn stays as it is
    stamp = (place / "runs" / "hot-seed0" / "samples" / "samples.npz").stat().st_mtime_ns
    assert subprocess.run(_tool(path), capture_output=True, text=True, timeout=300).returncode == 0
    assert (place / "runs" / "hot-seed0" / "samples" / "samples.npz").stat().st_mtime_ns == stamp


def test_samples_are_drawn_anew_where_other_options_are_asked_for_and_judged_once(prior, tmp_path):
    asked = {"tokenizer": "tokenizer", "options": ["--num-images=10"], "classifier": "judge"}
    study, trials = _expand(_write(prior, dials=[RATE], folder=str(tmp_path / "study"), samples=asked))
    trial, samples = trials[0], study.samples
    assert study_after.missing(study, trials) == []  # no run is done
    (trial.folder / "samples").mkdir(parents=True)
    (trial.folder / "summary.json").write_text("{}")
    assert study_after.missing(study, trials) == [trial]
    draw, judge = study_samples.steps(samples, trial)
    given = [str(trial.folder), "tokenizer", str(trial.folder / "samples"), "--num-images=10"]
    assert draw == [str(ROOT / "tools" / "sample.py"), *given]
    assert options.parser(None).parse_args(judge[1:]).classifier == "judge"
    done = {"state": "done", "command": checkout.command("sample", given)}
    (trial.folder / "samples" / "sample.json").write_text(json.dumps(done))
    assert list(study_samples.steps(samples, trial)) == [judge]
    (trial.folder / "judged").mkdir()
    (trial.folder / "judged" / "result.json").write_text("{}")
    assert study_after.missing(study, trials) == []
    other = replace(trial, sample=("--num-images=20",))
    assert len(list(study_samples.steps(samples, other))) == 2


def test_a_position_may_have_ids_of_another_tokenizer(prior):
    choices = [{"label": "usual"}, {"label": "own", "tokenizer": "other"}]
    path = _write(prior, dials=[{"name": "ids", "choices": choices}], samples={"tokenizer": "tokenizer"})
    _, trials = _expand(path)
    assert [study_samples.words(trial)[1] for trial in trials] == ["tokenizer", "other"]
    with pytest.raises(ValueError, match=r"own say how samples are drawn, .* give samples.tokenizer"):
        _expand(_write(prior, dials=[{"name": "ids", "choices": choices}]))


def test_samples_are_of_priors_and_their_options_are_read_before_a_run_starts(base, prior, tmp_path, capsys):
    samples, folder = {"tokenizer": "tokenizer"}, str(tmp_path / "study")
    with pytest.raises(ValueError, match="samples are what priors draw, and its runs are of the task tokenizer"):
        _expand(_write(base, dials=[K], samples=samples))
    choices = [{"label": "slow", "sample": ["--temperature=2"]}]
    with pytest.raises(ValueError, match=r"slow say how samples are drawn, .* give samples.tokenizer"):
        _expand(_write(prior, dials=[{"name": "way", "choices": choices}]))
    with pytest.raises(SystemExit) as left:
        command.main([str(_write(prior, dials=[RATE], folder=folder, samples=samples | {"options": ["--guidence=2"]}))])
    assert left.value.code == 2
    assert "--guidence=2" in capsys.readouterr().err
    assert not Path(folder).exists()


@pytest.mark.slow
def test_interrupted_and_continued(base):
    place = base.parent / "long"
    num = 240  # steps, of which both are asked to stop after the first few
    more = [f"run.steps={num}", f"run.checkpoint_every={num}", f"run.eval_every={num}"]
    path = _write(base, dials=[K], folder=str(place), set=more)
    process = subprocess.Popen(
        _tool(path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )  # fmt: skip
    _, trials = _expand(path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not all(studies.last_row(trial.folder) for trial in trials):
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C goes to the whole group of a terminal
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "the same command goes on" in said
    stopped = [trial for trial in trials if not (trial.folder / "summary.json").exists()]
    assert stopped  # on a busy machine one may have come to its end before the other began
    found = {name: line["status"] for name, line in _results(place).items()}
    assert found == {trial.name: "stopped" if trial in stopped else "done" for trial in trials}
    for trial in stopped:
        assert os.listdir(trial.folder / "checkpoints")
    done = subprocess.run(_tool(path), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for trial in trials:
        rows = [json.loads(line) for line in (trial.folder / "metrics.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in rows if "loss" in row]
        assert steps == list(range(1, num + 1))


class Sleeping:
    """In place of a process: it ends when it is told."""

    pid, status = 0, None

    def poll(self):
        return self.status


def test_a_run_of_more_processes_takes_the_place_of_several_and_none_overtakes_it(base, monkeypatch):
    monkeypatch.setattr(Local, "_start", lambda self, trial: Sleeping())
    wide = {"processes": 4, "seeds": [5]}
    study, trials = _expand(_write(base, dials=[K], seeds=[0, 1], parts=[wide, {"seeds": [6]}], jobs=3))
    launcher = Local(study, trials)
    launcher.start(trials)
    seen = []
    while launcher.running:
        seen.append([name for name, _ in launcher.running.items()])
        next(iter(launcher.running.values()))[1].status = 0
        launcher.poll()
    assert seen == [
        ["16-seed0", "16-seed1", "32-seed0"],
        ["16-seed1", "32-seed0", "32-seed1"],
        ["32-seed0", "32-seed1"],
        ["32-seed1"],
        ["16-seed5"],
        ["32-seed5"],
        ["16-seed6", "32-seed6"],
        ["32-seed6"],
    ]


class Elsewhere(Launcher):
    """A launcher that is known nowhere: between two looks at its runs, one more has written its summary."""

    attached = True

    def __init__(self, study, trials):
        super().__init__(study, trials)
        self.given = []

    def check(self):
        if "--refuse" in self.study.launcher_options:
            raise ValueError("not here")

    def start(self, trials):
        self.given = list(trials)
        return [f"started {len(trials)}"]

    def poll(self):
        for trial in self.given[:1]:
            trial.folder.mkdir(parents=True)
            (trial.folder / "summary.json").write_text('{"loss": 1.5, "unigram": 2.0}')
        self.given = self.given[1:]
        return {trial.name: State("running", "elsewhere") for trial in self.given}

    def stop(self):
        return []


@pytest.mark.slow
def test_another_launcher_is_a_class_and_a_line(prior, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(launchers.LAUNCHERS, "elsewhere", Elsewhere)
    monkeypatch.setattr(study_runner, "POLL_S", 0.0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    path = _write(prior, dials=[RATE], folder=str(tmp_path / "study"), seeds=[0, 1])
    assert command.main([str(path), "--elsewhere", "--refuse"]) == 2
    assert "not here" in capsys.readouterr().err
    assert command.main([str(path), "--elsewhere"]) == 0
    assert "started 4" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "study" / "study.yaml").read_text())["launcher"] == "elsewhere"
    lines = _results(tmp_path / "study")
    assert [line["status"] for line in lines.values()] == ["done"] * 4
    assert {line["verdict"] for line in lines.values()} == {"0.5 nats below how often ids occur"}
    assert command.main([str(path), "--elsewhere"]) == 0
    assert "started 0" in capsys.readouterr().out


def test_a_report_elsewhere_leaves_the_study_as_it_is(prior, tmp_path, capsys):
    sizes = {"name": "width", "key": "optim.lr", "values": [0.001, 0.01, 0.1]}
    place, out = tmp_path / "study", tmp_path / "kept"
    path = _write(prior, dials=[sizes], folder=str(place), seeds=[0, 1])
    assert command.main([str(path), "--prepare"]) == 0
    _, trials = _expand(path)
    for number, trial in enumerate(trials[:5]):
        trial.folder.mkdir()
        loss, commit = float(trial.labels["width"]) ** 0.5, f"c{number % 2}"
        (trial.folder / "summary.json").write_text(json.dumps({"loss": loss, "commit": commit}))
        rows = [{"step": step, "loss": 1.0, "time/step_s": step / 8} for step in (1, 4, 5, 6, 7)]
        (trial.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trials[0].file.write_text(trials[0].file.read_text() + "# as older code wrote it\n")
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert command.main([str(path), "--report", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert {file: file.read_bytes() for file in place.rglob("*") if file.is_file()} == before
    assert "Of 6 runs are: 5 done, 1 waiting." in said
    assert "loss ~ width^b" in said
    assert {file.name for file in out.iterdir()} == {"results.csv", "laws.csv", "study.json", "figures", "index.html"}
    lines = _results(out)
    assert [line["process_s"] for line in lines.values()] == ["0.75"] * 5 + [""]
    with (out / "laws.csv").open() as file:
        law = next(line for line in csv.DictReader(file) if line["law"] == "loss ~ width^b")
    assert float(law["b"]) == pytest.approx(0.5)
    assert law["note"] == "without 0.1-seed1 (waiting)"
    card = json.loads((out / "study.json").read_text())
    assert card["command"] == f"vqscale study {path}"
    assert card["commits of the runs"] == {"c0": 3, "c1": 2}
    assert card["runs"] == {"done": 5, "waiting": 1}
    assert "torch" in card["versions"]
    assert card["machine of this report"]["cores"] >= 1
    # going on leaves a config as it is that an older version wrote
    assert command.main([str(path), "--prepare"]) == 0
    assert trials[0].file.read_bytes() == before[trials[0].file]


def test_a_report_remembers_what_had_failed_until_it_is_under_way_again(base, tmp_path, monkeypatch):
    path = _write(base, dials=[K], folder=str(tmp_path / "study"))
    study, trials = _expand(path)
    study_report.report(study, trials, {"16-seed0": State("failed", "no room")}, "vqscale study")
    for _ in range(2):
        assert command.main([str(path), "--report"]) == 0
        found = _results(tmp_path / "study")
        assert [(line["status"], line["error"]) for line in found.values()] == [("failed", "no room"), ("waiting", "")]
    monkeypatch.setattr(Local, "poll", lambda _: {"16-seed0": State("running", "process 7")})
    assert command.main([str(path), "--report"]) == 0
    assert [line["status"] for line in _results(tmp_path / "study").values()] == ["running", "waiting"]


def test_two_do_not_start_the_same_runs(base, tmp_path, capsys):
    path = _write(base, dials=[K], folder=str(tmp_path / "study"))
    with owner.own(tmp_path / "study", "runs"):
        assert command.main([str(path)]) == 2
    assert "another process is writing runs of the study in" in capsys.readouterr().err
    assert not [*(tmp_path / "study" / "logs").iterdir()]


def test_a_run_that_is_not_done_says_how_far_it_is(base, tmp_path):
    _, trials = _expand(_write(base, dials=[K], folder=str(tmp_path / "study")))
    trials[0].folder.mkdir(parents=True)
    (trials[0].folder / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n{"step": 4, "los')
    found = [study_report.result_line(trial) for trial in trials]
    assert [(line["status"], line.get("steps")) for line in found] == [("begun", 3), ("waiting", None)]
    failed = study_report.result_line(trials[0], State("failed", "out of memory"))
    assert (failed["status"], failed["steps"], failed["error"]) == ("failed", 3, "out of memory")
    assert "error" not in study_report.result_line(trials[0], State("running", "process 7"))


def test_what_was_said_of_samples_of_a_run_is_among_its_numbers(prior, tmp_path):
    _, trials = _expand(_write(prior, dials=[RATE], folder=str(tmp_path / "study")))
    (trials[0].folder / "judged").mkdir(parents=True)
    (trials[0].folder / "summary.json").write_text('{"loss": 1.5, "images": 1024}')
    said = {"recognised": 0.5, "recognised_real": 0.75, "images": 80}
    (trials[0].folder / "judged" / "result.json").write_text(json.dumps({"numbers": said}))
    line = study_report.result_line(trials[0])
    assert (line["loss"], line["recognised"], line["images"]) == (1.5, 0.5, 1024)
    assert "75.0%" in study_page.text(study_page.TASKS["prior"], [line])


def test_what_is_measured_of_tokenizers_stands_beside_their_psnr_and_is_measured_once(base, prior, tmp_path, capsys):
    asked = {"shards": "val.tar", "options": ["--agreement", "--swaps", "0.1"]}
    path = _write(base, dials=[K], folder=str(tmp_path / "study"), measured=asked)
    study, trials = _expand(path)
    trial = trials[0]
    assert study_after.missing(study, trials) == []  # no run is done
    (trial.folder / "measured").mkdir(parents=True)
    (trial.folder / "summary.json").write_text('{"psnr": 20.0, "images": 1024}')
    assert study_after.missing(study, trials) == [trial]
    (measure,) = study_after.left(study, trial)
    words_of = evaluate.arguments(measure[1:])
    assert (words_of.path, words_of.shards, words_of.swaps) == (str(trial.folder), "val.tar", [0.1])
    said = {"psnr": 20.0, "psnr_near_0.1": 18.25, "moved_bf16": 0.0625, "images": 10}
    result = {"numbers": said, "command": checkout.command("evaluate", measure[1:])}
    (trial.folder / "measured" / "result.json").write_text(json.dumps(result))
    assert study_after.missing(study, trials) == []
    assert study_measured.numbers(trial).keys() == {"psnr", "psnr_near_0.1", "moved_bf16"}
    line = study_report.result_line(trial)
    assert (line["psnr_near_0.1"], line["images"]) == (18.25, 1024)
    task = study_page.TASKS["tokenizer"]
    assert list(study_page.columns(task, [line, study_report.result_line(trials[1])])) == [
        "run", "status", "psnr", "psnr_near_0.1", "moved_bf16"
    ]  # fmt: skip
    assert "6.25%" in study_page.text(task, [line])
    with pytest.raises(ValueError, match="tokenizers are measured, and its runs are of the task prior"):
        _expand(_write(prior, dials=[RATE], measured=asked))
    wrong = str(_write(base, dials=[K], folder=str(tmp_path / "wrong"), measured=asked | {"options": ["--swaps=2"]}))
    assert command.main([wrong]) == 2
    assert "shares of ids, above 0 and at most 1" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


def test_a_collapse_is_told_with_what_was_measured():
    verdict = study_page.TASKS["tokenizer"].verdict
    used = {"usage": 0.9, "perplexity": 90.0, "num_codes": 128, "codes/saturation": 1.0}
    assert verdict(used) == "in use"
    dead = used | {"usage": 0.02, "perplexity": 2.0, "codes/latent_norm": 0.125}
    assert verdict(dead) == "collapsed: usage 2% of at most 100%, perplexity 2 of 128; saturation 1, latent_norm 0.125"
    assert verdict({}) == ""


def test_a_prior_that_knows_only_how_often_ids_occur_is_told():
    verdict = study_page.TASKS["prior"].verdict
    assert verdict({"loss": 5.25, "unigram": 8.0}) == "2.75 nats below how often ids occur"
    assert verdict({"loss": 8.125, "unigram": 8.0}).startswith("learnt nothing of the images: 8.125 nats")
    assert verdict({"loss": 5.0}) == ""


LINES = [
    {"run": f"{q}-{k}-{s}", "quantizer": q, "K": str(k), "seed": str(s), "psnr": k + s + (q == "vq")}
    for q in ("vq", "ema") for k in (16, 32) for s in (0, 1)
]  # fmt: skip


def test_curves_take_the_dial_of_numbers_and_keep_the_seeds_apart():
    assert page.numeric_dial(LINES, ["quantizer", "K"]) == "K"
    assert page.numeric_dial(LINES, ["quantizer"]) is None
    assert page.curve(LINES[0], "K", ["K"]) == "all"
    curves = page.series(LINES, "psnr", "K", ["quantizer", "K"])
    assert curves == {"vq": {16.0: [17, 18], 32.0: [33, 34]}, "ema": {16.0: [16, 17], 32.0: [32, 33]}}


@pytest.mark.parametrize("dials", [["quantizer"], ["quantizer", "K"], ["K"]], ids=str)
def test_a_number_is_drawn_over_choices_and_over_numbers(dials):
    figure = page.Figure("PSNR", log=True, from_zero=False)
    drawn = page.chart(figure, LINES, "psnr", dials)
    assert drawn is not None
    assert drawn[:4] == b"\x89PNG"
    assert page.chart(figure, LINES, "ssim", dials) is None


def test_nothing_that_a_study_is_called_becomes_part_of_its_page(tmp_path):
    bad = "<script>alert(1)</script>"
    lines = [{"run": bad, bad: bad, "status": "failed", "error": bad, "verdict": bad}]
    results = Results("a<b", study_page.TASKS["prior"], lines, [bad], {}, [f"study.py {bad}"])
    path = study_page.write(tmp_path, results)
    text = path.read_text()
    assert text.count("<script") == 1  # the page's own, by its hash in the policy of the page
    assert "<h1>Study a&lt;b</h1>" in text
    assert text.count(html.escape(bad)) == 6  # above and in the table, the verdict, run and error below, the command
