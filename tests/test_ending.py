"""How programs end: the word that torchrun gets, whichever program leaves it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("command", "word"),
    [
        (["launch/train.py", "--world", "x"], "error: --world takes a number of processes, with --dry-run; found x"),
        (["tools/sample.py", "PRIOR", "TOKENIZER", "OUT", "--codes", "2"], "sample: --codes 2 "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_reason_is_left_for_torchrun(tmp_path, command, word):
    place = tmp_path / "error.json"
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "TORCHELASTIC_ERROR_FILE": str(place)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(word)
    left = json.loads(place.read_text())["message"]  # as torch.distributed.elastic reads it
    assert left["message"] == left["extraInfo"]["py_callstack"] == done.stderr.strip()
    assert int(left["extraInfo"]["timestamp"]) > 0
