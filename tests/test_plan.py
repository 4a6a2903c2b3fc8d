"""tools/plan.py: what it prints of a small run, what it refuses, that its check finds bytes and operations equal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vqscale.programs.commands import plan as command

ROOT = Path(__file__).resolve().parents[1]
SMALL = [str(ROOT / "configs" / "quickstart" / "tokenizer.yaml"), "--gpus", "1,4", "--images", "8"]


@pytest.fixture
def plan():
    return command


def _json(plan, capsys, *words):
    assert plan.main([*SMALL, "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_split_of_every_world_is_predicted(plan, capsys):
    found = _json(plan, capsys)
    assert [(step["data"], step["codes"]) for step in found["steps"]] == [(1, 1), (4, 1), (2, 2), (1, 4)]
    alone, *others = found["steps"]
    assert alone["sent"] == {"codes": 0, "data": 0, "world": 0}
    assert alone["rows"] == 4096
    assert alone["step_s"] == pytest.approx(sum(alone["seconds"].values()))
    assert {step["products"] for step in found["steps"]} == {alone["products"]}  # tokens per GPU stay
    assert alone["products"] == found["code_axis"]["products"] * 2 * 8 * 64 * 4096 * 16
    assert others[-1]["rows"] == 1024


def test_a_fixed_batch_divides_the_work(plan, capsys):
    words = [SMALL[0], "--gpus", "1,3,4", "--global-batch", "32", "--json"]
    assert plan.main(words) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [step["images_per_gpu"] for step in steps] == [32, 8, 8, 8]  # three do not divide 32
    assert steps[-1]["products"] * 4 == steps[0]["products"]


def test_the_answer_turns_with_the_precision_and_the_size(plan, capsys):
    assert plan.main([*SMALL, "--codes", "1048576"]) == 0
    much = capsys.readouterr().out
    assert "K = 1,048,576 at most 10% of the step on 1 GPUs? no" in much
    assert "mesh.codes=" in much
    assert plan.main([*SMALL, "--codes", "256", "engine.matmul=medium"]) == 0
    assert "K = 256 at most 10% of the step on 1 GPUs? yes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "1,x"], "--gpus takes numbers of GPUs"),
        (["--codes", "0"], "codes is 0 and must be at least 1; it comes from --codes"),
        (["--tokens", "65"], "--images and --tokens say the same thing twice"),
        (["tokenizer.quantizer={name: lfq}"], "the cost model knows the quantizers ibq, vq, ema"),
        (["other.yaml"], "there is one CONFIG"),
    ],
)
def test_what_is_refused_says_why(plan, capsys, words, message):
    assert plan.main([*SMALL, *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.dist
@pytest.mark.slow
def test_the_check_finds_bytes_and_operations_equal():
    words = ["--check", "--codes", "128", "--dim", "8", "--tokens", "16", "--gpus", "1,2", "--json"]
    command = [sys.executable, str(ROOT / "tools" / "plan.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    alone, two = json.loads(done.stdout)
    assert two["gflop_counted"] == alone["gflop_counted"] / 2
    assert two["bytes_counted"] == two["bytes_predicted"] > 0 == alone["bytes_counted"]
    assert alone["seconds_predicted"] > 0 < two["seconds_measured"]
