"""tools/gpu_check.sh: the whole program in Triton's interpreter, with few packages, out of time; what it says of goals.

No time is asserted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vqscale.config.text import data_of

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ["bash", str(ROOT / "tools" / "gpu_check.sh")]
# What a Python with torch and triton may lack; the interpreter itself needs numpy.
ABSENT = ["yaml", "PIL", "deepspeed", "webdataset", "zarr", "numcodecs", "safetensors", "tensorboard", "tqdm"]
ABSENT += ["matplotlib", "scipy", "faiss", "pytest"]
BLOCKER = """
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {names} else super().find_spec(name, path, target)
sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""

pytest.importorskip("triton")


def check(tmp_path, *words, **environment):
    """(report, what was printed) of a run in the interpreter."""
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    command = [*SCRIPT, "--interpret", "--budget-s", "3000", "--out", str(tmp_path / "out"), *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = (tmp_path / "out").glob("*.json")
    report = json.loads(written.read_text())
    for name, part in report["parts"].items():
        assert (part["note"], part["failed"]) == ("", False), f"{name}: {part}"
    return report, done.stdout


def forms(report, part):
    return {row["form"] for row in report["parts"][part]["rows"] if row.get("seconds")}


@pytest.mark.slow
@pytest.mark.dist
def test_the_whole_program_runs_in_the_interpreter_on_torch_and_triton_alone(tmp_path, tool):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER.format(names=set(ABSENT)))
    report, printed = check(tmp_path, PYTHONPATH=str(tmp_path))
    assert list(report["parts"]) == list(tool("gpu").PARTS)
    assert [row["ok"] for row in report["parts"]["checks"]["rows"]] == [True] * 9
    assert report["parts"]["tests"]["rows"][0]["note"] == "left out: pytest is not installed in this Python"
    for part in ("step", "entropy"):
        assert forms(report, part) == {"ours", "float8", "dense", "floor"}
    assert forms(report, "search") == {"ours", "dense", "floor"}
    assert forms(report, "head") >= {"bf16", "dense", "floor"}
    assert forms(report, "training") == {"ours", "device"}
    ours, device = report["parts"]["training"]["rows"]
    assert "code axis" in ours["note"]
    assert device["seconds"] > 0
    assert "the device works in" in device["note"]
    assert report["parts"]["ranks"]["rows"][0]["ok"] is True
    assert forms(report, "graphs") == {"compiled", "graphs"}
    assert report["parts"]["graphs"]["rows"][-1]["ok"] is True
    assert all(goal["found"] is not None for goal in report["goals"] if "GiB" not in goal["goal"])
    assert "the times are those of a CPU, and say nothing" in printed
    *_, last, where = printed.splitlines()
    assert "falls short" in last
    assert where.startswith("written: ")


@pytest.mark.slow
def test_its_tests_are_those_of_a_gpu(tmp_path):
    report, _ = check(tmp_path, "--only", "tests")
    assert "skipped" in report["parts"]["tests"]["rows"][0]["note"]


def test_a_part_that_takes_too_long_is_cut_short_and_says_so(tool):
    found = tool("gpu").part("checks", True, limit_s=0.05)
    assert found["note"] == "cut short after 0 s"
    assert found["rows"] == []


def test_parts_that_are_run_again_leave_the_others_in_the_report(tool, tmp_path):
    def report(command, **parts):
        found = {name: {"rows": [{"case": "c", "form": "floor", "seconds": s}]} for name, s in parts.items()}
        return {"machine": {"gpu": "NVIDIA H200"}, "commit": "abc", "command": command, "parts": found, "goals": []}

    gpu = tool("gpu")
    paths = {
        gpu._write(tmp_path, one) for one in (report("all", step=1.0, head=2.0), report("some", search=3.0, step=4.0))
    }
    (path,) = paths
    assert path.name == "nvidia-h200-abc.json"
    written = json.loads(path.read_text())
    assert [(name, part["rows"][0]["seconds"]) for name, part in written["parts"].items()] == [
        ("step", 4.0),
        ("search", 3.0),
        ("head", 2.0),
    ]
    assert any(goal["goal"].startswith("a head's loss at c") for goal in written["goals"])
    path.write_text("cut sh")
    assert list(json.loads(gpu._write(tmp_path, report("some", step=5.0)).read_text())["parts"]) == ["step"]


def test_what_falls_short_comes_last_and_what_is_not_measured_is_no_success(tool):
    goals = tool("gpu_goals")

    def row(form, seconds, peak=None):
        return {"case": "c", "form": form, "seconds": seconds, "peak_bytes": peak}

    step = [row("ours", 0.010, 2**30), row("dense", 0.060), row("floor", 0.007)]
    judged = goals.judged({"step": {"rows": step}, "head": {"rows": [row("bf16", 0.4), row("floor", 0.3)]}})
    assert [goal["found"] for goal in judged[:3]] == pytest.approx([10 / 7, 1 / 6, 1.0])
    lines = list(goals.text(judged))
    assert [line.partition(":")[0] for line in lines[-3:]] == ["not measured", "falls short", "falls short"]
    assert lines[-2] == "falls short: a step / the dense step: 0.167, at most 0.125"
    assert lines[-1] == "falls short: a head's loss at c / its floor of three products: 1.33, at most 1.3"
    assert "not measured: an exact search / its floor of one product, at most 2" in lines
    (only,) = [line for line in goals.text(goals.judged({})) if "not measured" not in line]
    assert only == "nothing that was measured falls short of its goal"


def test_the_training_step_is_that_of_the_config(tool):
    written = data_of(ROOT / "configs" / "tokenizer" / "ibq_imagenet256_262144.yaml")
    ours = tool("gpu_training").SETTINGS
    assert written["loss"].pop("perceptual")["weight"] == 1.0  # with drawn weights
    for key in ("tokenizer", "loss", "average", "optim"):
        assert ours[key] == written[key], key
    assert ours["run"]["steps"] == written["run"]["steps"]
    assert ours["engine"]["precision"] == written["engine"]["precision"]
    assert ours["engine"]["clip_norm"] == written["engine"]["clip_norm"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--interpret", "--budget-s", "0"], "the budget is 0.0 s and must be a positive number"),
        (["--only", "nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_wrong_arguments(tool, capsys, words, message):
    with pytest.raises(SystemExit) as error:
        tool("__main__").main(["gpu", *words])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
