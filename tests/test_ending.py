"""How the processes of programs meet and end: what is refused before, when they part, the word that torchrun gets."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from vqscale.run import processes
from vqscale.run.folder import RunError

ROOT = Path(__file__).resolve().parents[1]


def _ask(command, **env):
    """A program as a command, without a process group to join."""
    alone = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT")}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**alone, **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (["launch/train.py", "--world", "x"], "error: --world takes a number of processes, with --dry-run; found x"),
        (["tools/sample.py", "PRIOR", "TOKENIZER", "OUT", "--codes", "2"], "error: --codes 2 "),
    ],
    ids=["training", "a tool"],
)
def test_the_reason_is_left_for_torchrun(tmp_path, command, word):
    place = tmp_path / "error.json"
    done = _ask(command, TORCHELASTIC_ERROR_FILE=str(place))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(word)
    left = json.loads(place.read_text())["message"]  # as torch.distributed.elastic reads it
    assert left["message"] == left["extraInfo"]["py_callstack"] == done.stderr.strip()
    assert int(left["extraInfo"]["timestamp"]) > 0


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ValueError("that is no number"), 2, "error: that is no number\n"),
        (FloatingPointError("logits must be finite"), 1, "error: logits must be finite\n"),
        (OSError("the disk is gone"), 1, "error: the disk is gone\n"),
        (RunError("too many broken samples"), 1, "error: too many broken samples\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (RuntimeError("[gloo] Connection closed by peer"), 1, "error: lost another rank ([gloo] Connection closed by "
         "peer); its own message says why\n"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_foreseen_is_told_in_a_line(capsys, error, status, told):
    def fails():
        raise error

    assert processes.status_of(fails) == status
    assert capsys.readouterr().err == told


def test_what_nobody_foresaw_is_told_with_its_traceback(capsys):
    def fails():
        raise KeyError("patch")

    assert processes.status_of(fails) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "error: KeyError: 'patch'"


def test_every_error_of_ours_that_is_no_input_explains_itself():
    """A class derived from RuntimeError beside ExplainedError would be told with a traceback."""
    found = [
        f"{path}: {node.name}"
        for path in sorted((ROOT / "vqscale").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and any(isinstance(b, ast.Name) and b.id == "RuntimeError" for b in node.bases)
    ]
    assert [line.rpartition(": ")[2] for line in found] == ["ExplainedError", "RankError"], found


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["tools/sample.py", "PRIOR", "TOKENIZER", "OUT"],
        ["tools/encode.py", "TOKENIZER", "OUT", "--shards", "{shards}/val.tar"],
        ["tools/evaluate.py", "tokenizer", "RUN", "--shards", "{shards}/val.tar"],
    ],
    ids=["sample", "encode", "evaluate"],
)
def test_processes_that_do_not_fit_the_codes_never_meet(tiny_shards, tmp_path, command):
    words = [word.format(shards=tiny_shards) for word in command]
    done = _ask([*words, "--codes", 2], WORLD_SIZE="3", RANK="0", XDG_CACHE_HOME=str(tmp_path))
    rule = "--codes 2 does not divide the 3 processes that were started: change --codes or --nproc_per_node"
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {rule}")
    assert "Traceback" not in done.stderr


def _parted(error, agreed):
    """The shape of the mesh inside, and whether this process has left the others after an error inside."""
    expected = nullcontext() if error is None else pytest.raises(type(error), match=str(error))
    with expected, processes.joined("cpu", processes.divide(2), 60.0, agreed=agreed) as mesh:
        shape = mesh.data.size, mesh.codes.size
        if error is not None:
            raise error
    return shape, not dist.is_initialized()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("error", "agreed", "parted"),
    [
        (None, (), True),
        (ValueError("of all"), (ValueError,), True),
        (ValueError("of one"), (), False),
        (RuntimeError("of one"), (ValueError,), False),
    ],
    ids=str,
)
def test_processes_part_when_all_are_there(ranks, error, agreed, parted):
    assert ranks(2, _parted, error, agreed) == [((1, 2), parted)] * 2


def test_auto_takes_the_gpus_that_there_are_or_says_what_does_not_fit(monkeypatch):
    for gpus, local, name, expected in (
        (0, 2, "auto", "cpu"),
        (2, 2, "auto", "cuda"),
        (4, 2, "auto", "cuda"),
        (1, 2, "cpu", "cpu"),
        (0, 2, "cuda", "cuda"),  # that there is none is said by check_engine
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        assert processes.pick_device(name) == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("auto", "cuda"):
        with pytest.raises(ValueError, match=r"1 GPUs .* 2 processes were started .* start 1, or use run.device=cpu"):
            processes.pick_device(name)
