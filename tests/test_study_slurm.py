"""A study as an array of SLURM: what is asked of stand-ins for its commands, and a study on a real one."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jobs
import pytest
import slurm

from vqscale.programs.commands import study as command

ROOT = Path(__file__).resolve().parents[1]

# Each stand-in writes down what it was asked, in what folder, and answers as the real one would.
SBATCH = """
assert Path(words[-2]).read_text().startswith("#!/bin/bash")
told["configs"] = Path(words[-1]).read_text().splitlines()
assert all(Path(line).is_file() for line in told["configs"])
told["processes"] = os.environ["VQSCALE_PROCESSES"]
answer = f"{40 + len(asked)};cluster\\n"
"""
SQUEUE = """
queue = (here / "queue.txt").read_text()
answer = queue
if queue == "gone":
    sys.exit("slurm_load_jobs error: Invalid job id specified")
if queue == "away":
    sys.exit("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
"""
SACCT = """
answer = (here / "accounts.txt").read_text()
if not answer:
    sys.exit("Slurm accounting storage is disabled")
"""
COMMANDS = {"sbatch": SBATCH, "squeue": SQUEUE, "sacct": SACCT, "scancel": "answer = ''"}
AROUND = """#!{python}
import json, os, sys
from pathlib import Path
here, words, answer = Path({place!r}), sys.argv[1:], ""
file = here / "{name}.json"
asked = json.loads(file.read_text()) if file.exists() else []
told = {{"words": words, "folder": os.getcwd()}}
asked.append(told)
{body}
file.write_text(json.dumps(asked))
print(answer, end="")
"""


class Cluster:
    """The stand-ins, what they were asked, and what they answer."""

    def __init__(self, place: Path):
        self.place = place
        (place / "bin").mkdir(parents=True)
        for name, body in COMMANDS.items():
            path = place / "bin" / name
            path.write_text(AROUND.format(python=sys.executable, place=str(place), name=name, body=body))
            path.chmod(0o755)
        self.queue("")
        self.accounts("")

    def queue(self, *lines: str) -> None:
        (self.place / "queue.txt").write_text("\n".join(lines))

    def accounts(self, *lines: str) -> None:
        (self.place / "accounts.txt").write_text("\n".join(lines))

    def asked(self, name: str) -> list[dict]:
        path = self.place / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else []


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Stand-ins on PATH, in a checkout of its own."""
    made = Cluster(tmp_path / "cluster")
    monkeypatch.setenv("PATH", f"{made.place / 'bin'}{os.pathsep}{os.environ['PATH']}")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "launch").symlink_to(ROOT / "launch")
    monkeypatch.chdir(checkout)
    return made


@pytest.fixture
def study(tmp_path, tiny_shards):
    """A study of three runs in the folder `my study` of the working folder."""
    jobs.write_config(tmp_path, tiny_shards)
    dial = {"name": "steps", "key": "run.steps", "values": [1, 2, 3]}
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps({"base": "run.yaml", "folder": "my study", "dials": [dial], "processes": 2}))
    return str(path)


def _finish(name: str) -> None:
    folder = Path("my study/runs", name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text('{"psnr": 20.0}')


def _statuses() -> dict[str, str]:
    with Path("my study/results.csv").open() as file:
        return {line["run"]: line["status"] for line in csv.DictReader(file)}


def test_an_array_over_the_runs_is_submitted_once(cluster, study, capsys):
    cluster.queue("41_0|RUNNING", "41_1|PENDING", "41_2|PENDING")
    assert command.main([study, "--slurm", "--gpus-per-node=2", "--time=02:00:00"]) == 0
    (asked,) = cluster.asked("sbatch")
    assert asked["words"] == [
        "--gpus-per-node=2", "--time=02:00:00", "--parsable", "--array=0-2",
        "--output=my study/logs/slurm-%A_%a.txt", "launch/slurm/array.sbatch", "./my study/slurm/0.txt",
    ]  # fmt: skip
    assert asked["configs"] == [f"./my study/configs/{n}-seed0.yaml" for n in (1, 2, 3)]
    assert (asked["processes"], asked["folder"]) == ("2", os.getcwd())
    said = capsys.readouterr().out
    assert "submitted job 41, an array of 3 runs" in said
    assert f"vqscale study {study} --report" in said
    (looked,) = cluster.asked("squeue")
    assert looked["words"] == ["--array", "--noheader", "--format=%F_%K|%T", "--jobs=41"]
    assert _statuses() == {"1-seed0": "running", "2-seed0": "waiting", "3-seed0": "waiting"}
    # again: what is in the queue is not submitted a second time
    assert command.main([study, "--slurm"]) == 0
    assert len(cluster.asked("sbatch")) == 1


def test_runs_of_another_number_of_processes_are_an_array_of_their_own(cluster, tmp_path, study, capsys):
    path = Path(study)
    dial = {"name": "steps", "key": "run.steps", "values": [4, 5]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"parts": [{"dials": [dial], "processes": 1}]}))
    cluster.queue("41_0|RUNNING", "41_1|PENDING", "42_0|PENDING", "42_1|PENDING", "42_2|PENDING")
    assert command.main([study, "--slurm"]) == 0
    one, two = cluster.asked("sbatch")
    assert (one["processes"], one["configs"]) == ("1", [f"./my study/configs/{n}-seed0.yaml" for n in (4, 5)])
    assert (two["processes"], two["configs"]) == ("2", [f"./my study/configs/{n}-seed0.yaml" for n in (1, 2, 3)])
    said = capsys.readouterr().out
    assert "job 41, an array of 2 runs of 1 processes" in said
    assert "job 42, an array of 3 runs of 2 processes" in said
    assert set(_statuses()) == {f"{n}-seed0" for n in range(1, 6)}


@pytest.mark.slow
def test_what_failed_is_told_and_submitted_again_alone(cluster, study, capsys):
    cluster.queue("41_0|PENDING", "41_1|PENDING", "41_2|PENDING")
    assert command.main([study, "--slurm"]) == 0
    _finish("1-seed0")
    Path("my study/logs/slurm-41_1.txt").write_text("begin\nerror: no GPU here\nthe step ended with status 2\n")
    cluster.queue("41_2|RUNNING")
    cluster.accounts("41_1|FAILED", "41_1.batch|FAILED")
    assert command.main([study, "--report"]) == 0
    assert _statuses() == {"1-seed0": "done", "2-seed0": "failed", "3-seed0": "running"}
    assert "task 41_1 of slurm: FAILED: error: no GPU here" in Path("my study/results.csv").read_text()
    cluster.queue("41_2|RUNNING", "42_0|PENDING")
    assert command.main([study, "--slurm"]) == 0
    first, second = cluster.asked("sbatch")
    assert second["configs"] == ["./my study/configs/2-seed0.yaml"]
    assert "--array=0-0" in second["words"]
    assert len(first["configs"]) == 3
    assert len(Path("my study/slurm/0.txt").read_text().splitlines()) == 3  # waiting tasks read it yet
    assert _statuses() == {"1-seed0": "done", "2-seed0": "waiting", "3-seed0": "running"}
    for name in ("2-seed0", "3-seed0"):
        _finish(name)
    capsys.readouterr()
    assert command.main([study, "--report"]) == 0
    assert set(_statuses().values()) == {"done"}
    assert len(cluster.asked("sbatch")) == 2


def test_a_job_that_slurm_has_forgotten_is_in_no_queue(cluster, study):
    assert command.main([study, "--slurm"]) == 1  # nothing is in the queue that was submitted a moment ago
    cluster.queue("gone")
    assert command.main([study, "--report"]) == 0
    assert set(_statuses().values()) == {"failed"}
    assert "task 41_0 of slurm: it printed nothing" in Path("my study/results.csv").read_text()


def test_a_controller_that_does_not_answer_is_no_empty_queue(cluster, study, capsys):
    cluster.queue("41_0|RUNNING", "41_1|RUNNING", "41_2|RUNNING")
    assert command.main([study, "--slurm"]) == 0
    cluster.queue("away")
    assert command.main([study, "--slurm"]) == 1
    said = capsys.readouterr().err
    assert "squeue" in said
    assert "Unable to contact slurm controller" in said
    assert len(cluster.asked("sbatch")) == 1
    # a page is written all the same, of what the run folders tell
    _finish("1-seed0")
    assert command.main([study, "--report"]) == 0
    assert "Unable to contact slurm controller" in capsys.readouterr().err
    assert _statuses() == {"1-seed0": "done", "2-seed0": "waiting", "3-seed0": "waiting"}


def test_without_squeue_the_run_folders_tell(cluster, study, monkeypatch):
    cluster.queue("41_0|RUNNING", "41_1|PENDING", "41_2|PENDING")
    assert command.main([study, "--slurm"]) == 0
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    _finish("1-seed0")
    place = Path("my study/runs/2-seed0")
    place.mkdir()
    (place / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert command.main([study, "--report"]) == 0
    assert _statuses() == {"1-seed0": "done", "2-seed0": "begun", "3-seed0": "waiting"}


def test_a_stop_cancels_what_is_in_the_queue(cluster, study, capsys):
    cluster.queue("41_0|RUNNING", "41_1|PENDING")
    assert command.main([study, "--slurm"]) == 1  # the third has left it
    assert command.main([study, "--slurm", "--stop"]) == 0
    assert [each["words"] for each in cluster.asked("scancel")] == [["41_0", "41_1"]]
    cluster.queue("41_0|COMPLETING")
    assert command.main([study, "--report"]) == 0
    assert _statuses() == {"1-seed0": "running", "2-seed0": "stopped", "3-seed0": "failed"}
    cluster.queue("")
    assert command.main([study, "--slurm", "--stop"]) == 0
    assert "no run of this study is in the queue" in capsys.readouterr().out
    cluster.queue("42_0|PENDING", "42_1|PENDING", "42_2|PENDING")
    assert command.main([study, "--slurm"]) == 0
    assert set(_statuses().values()) == {"waiting"}


def test_runs_in_the_queue_are_not_started_here_too(cluster, study, capsys):
    cluster.queue("41_0|RUNNING", "41_1|PENDING", "41_2|PENDING")
    assert command.main([study, "--slurm"]) == 0
    assert command.main([study, "--local"]) == 2
    said = capsys.readouterr().err
    assert "3 runs of this study are with slurm: 1-seed0 is running, task 41_0 of slurm is RUNNING" in said
    assert "--slurm --stop" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--array=0-1"], "--array=0-1, and --array"),
        (["--output=x"], "leave it out"),
        (["launcher_options=[gpu]"], "has gpu, no option of sbatch: write options as --name=value"),
    ],
)
def test_options_that_the_launcher_sets_are_refused(cluster, study, capsys, words, said):
    assert command.main([study, "--slurm", *words]) == 2
    assert said in capsys.readouterr().err
    assert not Path("my study").exists()
    assert not cluster.asked("sbatch")


def test_what_is_not_there_is_said(cluster, study, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))  # /usr/bin may have a SLURM
    assert command.main([study, "--slurm"]) == 2
    assert "needs sbatch, which is not on PATH here" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)  # as where a wheel is installed: no launch/
    assert command.main([study, "--slurm"]) == 2
    assert "there is none in" in (said := capsys.readouterr().err)
    assert "start from a checkout" in said


@pytest.mark.slow
@pytest.mark.skipif(not slurm.available(), reason="no SLURM here, or not root")
def test_a_study_of_a_real_slurm(tmp_path, tiny_shards):
    jobs.write_config(tmp_path, tiny_shards)
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("launch", "tools"):
        (checkout / name).symlink_to(ROOT / name)
    dial = {"name": "steps", "key": "run.steps", "values": [2, 3, 1000000]}
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps({"base": "run.yaml", "folder": "my study", "dials": [dial]}))
    with slurm.cluster(tmp_path / "slurm") as environment:
        environment |= {"OMP_NUM_THREADS": "1"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        words = [sys.executable, str(ROOT / "tools" / "study.py"), str(path)]

        def study(*more):
            done = subprocess.run(
                [*words, *more], cwd=checkout, env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout, dict(re.findall(r"^(\d+)-seed0 +(\w+)", done.stdout, re.MULTILINE))

        said, statuses = study("--slurm", "--time=10")
        assert "an array of 3 runs" in said
        assert set(statuses.values()) <= {"waiting", "running"}
        runs = checkout / "my study" / "runs"
        jobs.wait_for(lambda: all((runs / f"{n}-seed0" / "summary.json").exists() for n in (2, 3)), 240.0)
        jobs.wait_for(lambda: (runs / "1000000-seed0" / "metrics.jsonl").exists(), 240.0)
        assert study("--report")[1] == {"2": "done", "3": "done", "1000000": "running"}
        assert "cancelled" in study("--slurm", "--stop")[0]
        jobs.wait_for(lambda: not slurm.ask(environment, "squeue", "-h"), 120.0)
        assert study("--report")[1] == {"2": "done", "3": "done", "1000000": "stopped"}
        assert jobs.steps_saved(runs / "1000000-seed0")
