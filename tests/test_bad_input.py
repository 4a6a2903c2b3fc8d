"""What a user can get wrong: a message with the rule, its origin and what to change, a status that is not 0.

Nothing is lost of what was written before.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import jobs
import pytest
import torch
import yaml

from vqscale import config as configuration
from vqscale.run import folder
from vqscale.train.config import TokenizerRun


def _ask(*arguments, env=None):
    """launch/train.py as a command; (exit status, what it printed, what it complained)."""
    done = subprocess.run(
        [sys.executable, str(jobs.LAUNCH), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, **(env or {})},
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_shards):
    """A good config, whose run nobody starts."""
    return jobs.write_config(tmp_path_factory.mktemp("config"), tiny_shards)


def test_an_unknown_key_is_named_with_its_line_and_its_neighbour(config, tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text(config.read_text().replace("num_codes:", "num_coddes:"))
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "num_coddes" in text)
    status, out, complaint = _ask(path)
    assert status == 2
    assert not out
    key = "tokenizer.quantizer.num_cod"
    assert complaint == f"error: {path}:{line}: {key}des: unknown key; did you mean {key}es?\n"


def test_all_problems_are_told_at_once_and_by_one_rank(config, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(config.read_text().replace("batch: 8", "batch: eight").replace("steps: 8", "steps: 0", 1))
    arguments = (path, "engine.nam=torch", "tokenizer.net.channels=6")
    status, _, complaint = _ask(*arguments, env={"WORLD_SIZE": "2", "RANK": "0"})
    assert status == 2
    assert "the config has 4 problems" in complaint
    assert "data.batch: expected int, found the text 'eight'; write plain digits, like 1000" in complaint
    assert "run.steps: steps is 0: use at least 1" in complaint
    assert "command line: engine.nam: unknown key; did you mean engine.name?" in complaint
    assert "4 groups do not divide 6 channels" in complaint
    assert complaint.count(str(path)) >= 2
    assert _ask(*arguments, env={"WORLD_SIZE": "2", "RANK": "1"}) == (2, "", "")


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        (
            "mesh.codes=3",
            "mesh.codes 3 does not divide the 2 processes that were started: change mesh.codes",
        ),
        (
            "mesh={data: 2, codes: 2}",
            "data 2 x codes 2 = 4 processes, but 2 were started: change mesh.data",
        ),
        (
            "data.batch=7",
            "data.batch 7 does not divide by 2 processes x accumulation 1 = 2: change data.batch",
        ),
        (
            "engine.accumulation=3",
            "data.batch 8 does not divide by 2 processes x accumulation 3 = 6: change data",
        ),
    ],
)
def test_what_does_not_fit_the_processes(config, override, rule):
    status, _, complaint = _ask(config, override, env={"WORLD_SIZE": "2", "RANK": "0"})
    assert status == 2
    assert complaint.startswith(f"error: {rule}")


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--frobnicate"], "--frobnicate is neither an option nor key=value, and there is one CONFIG"),
        (["another.yaml"], "another.yaml is neither an option nor key=value, and there is one CONFIG"),
        (["--world", "8"], "--world takes a number of processes, with --dry-run; found 8: use --world 8"),
        (["--dry-run", "--world", "x"], "--world takes a number of processes, with --dry-run; found x: use --world 8"),
        (["=3"], "command line: =3: an override is key=value"),
    ],
)
def test_a_command_line_that_says_nothing(config, arguments, rule):
    status, _, complaint = _ask(config, *arguments)
    assert status == 2
    assert complaint.startswith(f"error: {rule}")


def test_a_config_that_is_not_there_names_its_neighbour(config):
    status, _, complaint = _ask(config.with_name("rum.yaml"))
    assert status == 2
    assert f"rum.yaml: there is no such file (looked from {os.getcwd()}); did you mean {config}?" in complaint


def test_an_equals_sign_in_a_path_is_no_override(config, tmp_path):
    (tmp_path / "lr=1").mkdir()
    path = shutil.copy(config, tmp_path / "lr=1" / "run.yaml")
    status, _, complaint = _ask(path, "optim.lr=fast")
    assert status == 2
    assert "optim.lr: expected float" in complaint


# One process each that imports torch, because the disk or the device is looked at.


@pytest.mark.parametrize(
    ("override", "rules"),
    [
        (
            "data.train.shards=/nowhere/a-{0..2}.tar",
            ["data.train: 3 of 3 shards do not exist: /nowhere/a-0.tar"],
        ),
        ("data.val.shards=/nowhere/*.tar", ["data.val: no shard: the pattern '/nowhere/*.tar'", "change the pattern"]),
        ("data.val.shards=ftpp://host/a.tar", ["data.val: nothing opens ftpp:", "copy the shards to a disk"]),
        ("run.folder={config}/run", ["run.folder", "cannot be written", "is no folder; choose another run.folder"]),
        pytest.param(
            "run.device=cuda",
            ["device cuda needs a GPU that torch can use, and it finds none here"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
@pytest.mark.slow
def test_what_is_not_there(config, tmp_path, override, rules):
    path = shutil.copy(config, tmp_path / "run.yaml")
    job = jobs.start(tmp_path / "run.yaml", override.replace("{config}", str(path)))
    assert job.wait() == [2]
    assert job.output.startswith("error: ")
    assert "Traceback" not in job.output
    for rule in rules:
        assert rule in job.output


def test_help_and_errors_come_without_torch_and_the_plan_without_processes(config):
    for arguments, status in ((["--help"], 0), ([config, "optim.lr=fast"], 2), ([config, "mesh.codes=7"], 2)):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", str(jobs.LAUNCH), *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "WORLD_SIZE": "2"},
            check=False,
        )
        assert done.returncode == status, done.stderr
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        assert "yaml" in imported
        assert not imported & {"torch", "numpy", "deepspeed", "zarr", "webdataset", "PIL"}
        if "--help" in arguments:
            assert "tokenizer.quantizer" in done.stdout
            assert "mesh.codes" in done.stdout
            assert "STOP" in done.stdout


@pytest.mark.slow
def test_a_dry_run_starts_nothing(config):
    job = jobs.start(config, "--dry-run", WORLD_SIZE="8", LOCAL_WORLD_SIZE="8")  # seven of them would never come
    assert job.wait() == [0]
    for part in ("data 1 x codes 8 = 8 processes", "parameters", "memory per rank", "bytes sent per rank and step"):
        assert part in job.output
    assert "17,068" in job.output  # parameters in all
    job = jobs.start(config, "--dry-run", "--world", "4", "mesh.data=2")
    assert job.wait() == [0]
    assert "data 2 x codes 2 = 4 processes" in job.output
    assert not (config.parent / "run").exists()


@pytest.mark.slow
def test_the_folder_of_another_run_is_left_alone(tmp_path, tiny_shards):
    half, run = jobs.stopped(tmp_path, tiny_shards), tmp_path / "run"
    before = jobs.contents(run)

    status, _, complaint = _ask(half, "optim.lr=2e-3", "tokenizer.quantizer.num_codes=64", "engine.zero_stage=3")
    assert status == 2
    assert f"error: the run in {run} has another config ({run}/run.yaml)" in complaint
    assert "\n  optim.lr: 0.001 -> 0.002\n" in complaint
    assert "\n  tokenizer.quantizer.num_codes: 101 -> 64\n" in complaint
    assert "zero_stage" not in complaint  # that may change
    assert "change run.folder to begin a new run, or set these keys back to continue the old one" in complaint
    assert jobs.contents(run) == before

    job = jobs.start(half, f"data.train.shards={tiny_shards}/train-0.tar")
    assert job.wait() == [2]
    assert "was trained on data with fingerprint" in job.output
    assert "give the same shards, or a new run.folder" in job.output
    assert jobs.contents(run) == before

    (run / "run.yaml").write_text("")
    status, _, complaint = _ask(half)
    assert status == 2
    assert f"{run}/run.yaml, the config of the run in {run}, cannot be read" in complaint


@pytest.mark.slow
def test_held_out_images_may_come_later(tmp_path, tiny_shards):
    path = jobs.write_config(tmp_path, tiny_shards, "data.val=null")
    jobs.finish(path, "run.steps=2")
    jobs.write_config(tmp_path, tiny_shards)
    assert "val/psnr" in jobs.rows(jobs.finish(path, "run.steps=4"))[-1]


def test_a_key_that_is_younger_than_a_run_had_its_default(tmp_path):
    quickstart = jobs.LAUNCH.parents[1] / "configs/quickstart/tokenizer.yaml"
    config = configuration.load(TokenizerRun, quickstart, [f"run.folder={tmp_path}"])
    old = configuration.to_dict(config)
    del old["average"], old["engine"]["matmul"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(old))
    folder.check(config)
    other = configuration.load(TokenizerRun, quickstart, [f"run.folder={tmp_path}", "average.decay=0.9"])
    with pytest.raises(ValueError, match=r"average.decay: 0.0 -> 0.9"):
        folder.check(other)
