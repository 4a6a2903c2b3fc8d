"""What is measured of the tokenizers of a study when its runs are done, by `vqscale evaluate tokenizer`: how they bear
swapped ids, what their ids say of each other, whatever its options ask for. It stands beside the numbers of the run.

    RUN/measured/  numbers, page

What the same command has measured stays. Not here: when it is started (after.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vqscale.programs.studies.config import MeasuredConfig
from vqscale.programs.studies.study import Trial
from vqscale.run import checkout
from vqscale.run import folder as run_folder

MEASURED = "measured"
SEEN = ("images", "broken", "enlarged")


def words(measured: MeasuredConfig, trial: Trial) -> list[str]:
    """What `vqscale evaluate` is given for the run of this trial."""
    shards, out = ["--shards", measured.shards], ["--out", str(trial.folder / MEASURED)]
    return ["tokenizer", str(trial.folder), *shards, *measured.options, *out]


def numbers(trial: Trial) -> dict[str, Any]:
    """What was measured of a run, as far as anything was."""
    said = run_folder.read_json(trial.folder / MEASURED / "result.json").get("numbers", {})
    return {key: value for key, value in said.items() if key not in SEEN}


def steps(measured: MeasuredConfig, trial: Trial) -> Iterator[list[str]]:
    """The command that is left, as python is given it."""
    given = words(measured, trial)
    said = run_folder.read_json(trial.folder / MEASURED / "result.json")
    if said.get("command") != checkout.command("evaluate", given):
        yield [*checkout.program("evaluate"), *given]
