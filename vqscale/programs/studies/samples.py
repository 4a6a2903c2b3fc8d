"""What the priors of a study draw when its runs are done, by `vqscale sample`, and what a classifier says of it, by
`vqscale evaluate samples`: one run after the other, so that their speeds compare.

    RUN/samples/  samples, grid, speed (sampling/folder.py)     RUN/judged/  numbers, page

Samples that the same command has drawn stay; where other options are asked for, `vqscale sample` says what to do.
Not here: when they are started (after.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vqscale.programs.studies.config import SamplesConfig
from vqscale.programs.studies.study import Trial
from vqscale.run import checkout
from vqscale.run import folder as run_folder

DRAWN, JUDGED = "samples", "judged"


def words(trial: Trial) -> list[str]:
    """What `vqscale sample` is given for the run of this trial."""
    return [str(trial.folder), trial.tokenizer, str(trial.folder / DRAWN), *trial.sample]


def numbers(trial: Trial) -> dict[str, Any]:
    """samples_per_s, and what was said of the samples of a run, as far as there is any."""
    said = run_folder.read_json(trial.folder / JUDGED / "result.json").get("numbers", {})
    made = run_folder.read_json(trial.folder / DRAWN / "sample.json").get("made", {})
    found = {key: value for key, value in said.items() if key != "images"}
    return found | ({"samples_per_s": made["images_per_s"]} if "images_per_s" in made else {})


def settings(trial: Trial) -> dict[str, Any]:
    """What the samples of a run were drawn with; empty where there are none."""
    return run_folder.read_json(trial.folder / DRAWN / "sample.json").get("settings", {})


def steps(samples: SamplesConfig, trial: Trial) -> Iterator[list[str]]:
    """The commands that are left, as python is given them."""
    given, drawn = words(trial), trial.folder / DRAWN
    facts = run_folder.read_json(drawn / "sample.json")
    anew = facts.get("state") != "done" or facts.get("command") != checkout.command("sample", given)
    if anew:
        yield [*checkout.program("sample"), *given]
    if samples.classifier is not None and (anew or not (trial.folder / JUDGED / "result.json").exists()):
        file, out = str(drawn / "samples.npz"), str(trial.folder / JUDGED)
        yield [*checkout.program("evaluate"), "samples", file, "--classifier", samples.classifier, "--out", out]
