"""How the processes of programs meet and end: what is refused before, when they part, the word that torchrun gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch.distributed as dist

from vqscale.run import processes

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
        (["tools/sample.py", "PRIOR", "TOKENIZER", "OUT", "--codes", "2"], "sample: --codes 2 "),
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


def test_what_the_weights_did_is_said_in_a_line(capsys):
    assert processes.tell("sample", FloatingPointError("logits must be finite")) == 1
    assert capsys.readouterr().err == "sample: logits must be finite\n"


@pytest.mark.parametrize(
    ("command", "who"),
    [
        (["tools/sample.py", "PRIOR", "TOKENIZER", "OUT"], "sample"),
        (["tools/encode.py", "TOKENIZER", "OUT", "--shards", "{shards}/val.tar"], "encode"),
        (["tools/evaluate.py", "tokenizer", "RUN", "--shards", "{shards}/val.tar"], "error"),
    ],
    ids=["sample", "encode", "evaluate"],
)
def test_processes_that_do_not_fit_the_codes_never_meet(tiny_shards, tmp_path, command, who):
    words = [word.format(shards=tiny_shards) for word in command]
    done = _ask([*words, "--codes", 2], WORLD_SIZE="3", RANK="0", XDG_CACHE_HOME=str(tmp_path))
    rule = "--codes 2 does not divide the 3 processes that were started: change --codes or --nproc_per_node"
    assert (done.returncode, done.stderr) == (2, f"{who}: {rule}\n")


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
