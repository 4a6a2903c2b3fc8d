"""What the files of a run say about a checkpoint in it: its config, and facts of how it came to be.

Not here: the weights (saved.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from vqscale.config.text import data_of
from vqscale.signals.config import seen

Weights = Literal["average", "parameters"]
INIT = "init.json"  # in a run folder: what the run began from


def run_config(file: Path, folder: Path, wanted: str) -> dict[str, Any]:
    try:
        asked = data_of(file)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} is a checkpoint, but the config of its run, {file}, cannot be read ({error}): a "
            "checkpoint is loaded where it lies, in RUN/checkpoints with RUN/run.yaml"
        ) from None
    task = asked.get("task") if isinstance(asked, dict) else None
    if task != wanted or wanted not in asked:
        raise ValueError(
            f"{file} is the config of task {task!r}, and a {wanted} comes from a run with task {wanted!r}: give the "
            "folder of such a run"
        )
    return dict(asked)


def facts_of_run(run: Path, folder: Path, asked: Mapping[str, Any], weights: Weights) -> dict[str, Any]:
    """What the run folder says about the weights of a checkpoint; what it does not say is left out."""
    data = asked.get("data") or {}
    kept = (asked.get("average") or {}).get("decay") != 0
    taken = weights if kept else "parameters"
    facts: dict[str, Any] = {"origin": f"{run.name}/{folder.parent.name}/{folder.name}, {taken}"}
    facts |= seen(data.get("val") or data.get("train") or {})
    commit, summary, tokens = run / "code" / "commit.txt", run / "summary.json", run / "tokens.json"
    if (run / INIT).is_file() and (ids_of := _said(run / INIT).get("ids_of")):
        facts["ids_of"] = ids_of
    if tokens.is_file():  # of a prior: the tokenizer that its ids are of, by fingerprint
        facts |= _said(tokens)
    if commit.is_file():
        facts["commit"] = commit.read_text(errors="replace").strip()
    if summary.is_file():
        found = _said(summary)
        if found.get("steps") == int(folder.name):
            facts["metrics"] = {key: x for key, x in found.items() if isinstance(x, int | float)}
    return facts


def _said(file: Path) -> dict[str, Any]:
    """What a file of facts of a run says. ValueError where it is damaged."""
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{file} cannot be read ({type(error).__name__}: {error}): copy it again, or remove it, and what it "
            "says of the run will not be known"
        ) from None
