"""What the priors of a study draw when its runs are done, by `vqscale sample`, and what a classifier says of it, by
`vqscale evaluate samples`: one run after the other, so that their speeds compare.

    RUN/samples/  samples, grid, speed (sampling/folder.py)     RUN/judged/  numbers, page
    FOLDER/logs/NAME-samples.txt  what both printed

Samples that the same command has drawn stay; where other options are asked for, `vqscale sample` says what to do.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from vqscale.programs.commands.words import command
from vqscale.programs.launchers.base import last_words
from vqscale.programs.study import Trial
from vqscale.programs.study_config import SamplesConfig
from vqscale.run import checkout
from vqscale.run import folder as run_folder

DRAWN, JUDGED = "samples", "judged"


def words(samples: SamplesConfig, trial: Trial) -> list[str]:
    """What `vqscale sample` is given for the run of this trial."""
    return [str(trial.folder), samples.tokenizer, str(trial.folder / DRAWN), *trial.sample]


def missing(samples: SamplesConfig, trials: Sequence[Trial]) -> list[Trial]:
    """The trials whose runs are done, and whose samples are not there as they are asked for, or not judged."""
    return [trial for trial in trials if trial.done and list(steps(samples, trial))]


class Drawing:
    """Draws and judges, a program at a time."""

    def __init__(self, samples: SamplesConfig) -> None:
        self.samples = samples
        self._process: subprocess.Popen[bytes] | None = None

    def draw(self, trial: Trial) -> str:
        """Draw what is missing of one trial, and judge it; why it failed, "" where it did not."""
        log = trial.log.with_name(f"{trial.name}-samples.txt")
        for step in steps(self.samples, trial):
            with log.open("a") as out:  # in a group of its own: Ctrl-C is for this process, which tells it
                self._process = subprocess.Popen(
                    [sys.executable, *step], stdout=out, stderr=subprocess.STDOUT, process_group=0
                )
                status = self._process.wait()
            if status:
                return last_words(log)
        return ""

    def stop(self) -> None:
        """What draws keeps the batches that are whole, and ends."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)


def numbers(trial: Trial) -> dict[str, Any]:
    """samples_per_s, and what was said of the samples of a run, as far as there is any."""
    said = run_folder.read_json(trial.folder / JUDGED / "result.json").get("numbers", {})
    made = run_folder.read_json(trial.folder / DRAWN / "sample.json").get("made", {})
    found = {key: value for key, value in said.items() if key != "images"}
    return found | ({"samples_per_s": made["images_per_s"]} if "images_per_s" in made else {})


def steps(samples: SamplesConfig, trial: Trial) -> Iterator[list[str]]:
    """The commands that are left, as python is given them."""
    given, drawn = words(samples, trial), trial.folder / DRAWN
    facts = run_folder.read_json(drawn / "sample.json")
    anew = facts.get("state") != "done" or facts.get("command") != command("sample", given)
    if anew:
        yield [*checkout.program("sample"), *given]
    if samples.classifier is not None and (anew or not (trial.folder / JUDGED / "result.json").exists()):
        file, out = str(drawn / "samples.npz"), str(trial.folder / JUDGED)
        yield [*checkout.program("evaluate"), "samples", file, "--classifier", samples.classifier, "--out", out]
