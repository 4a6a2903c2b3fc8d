"""What is done with the runs of a study when all are done: priors draw (samples.py), tokenizers are measured
(measured.py), one run after the other, a program at a time.

    FOLDER/logs/NAME-samples.txt, NAME-measured.txt  what the programs printed
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence

from vqscale.programs.studies import measured as study_measured
from vqscale.programs.studies import samples as study_samples
from vqscale.programs.studies.config import StudyConfig
from vqscale.programs.studies.launchers.base import last_words
from vqscale.programs.studies.study import Trial
from vqscale.run.checkout import begin


def left(study: StudyConfig, trial: Trial) -> list[list[str]]:
    """The commands that are left for a run that is done, as python is given them."""
    drawn = [] if study.samples is None else study_samples.steps(study.samples, trial)
    measured = [] if study.measured is None else study_measured.steps(study.measured, trial)
    return [*drawn, *measured]


def missing(study: StudyConfig, trials: Sequence[Trial]) -> list[Trial]:
    """The trials whose runs are done, and of which what is asked for is not there, or not as it is asked for."""
    return [trial for trial in trials if trial.done and left(study, trial)]


class After:
    """Starts what is left of a trial, and can be told to stop."""

    def __init__(self, study: StudyConfig) -> None:
        self.study = study
        self.what = study_samples.DRAWN if study.measured is None else study_measured.MEASURED
        self._process: subprocess.Popen[bytes] | None = None

    def finish(self, trial: Trial) -> str:
        """Do what is left of one trial; why it failed, "" where it did not."""
        log = trial.log.with_name(f"{trial.name}-{self.what}.txt")
        for step in left(self.study, trial):
            with log.open("a") as out:
                self._process = begin(step, out)
                status = self._process.wait()
            if status:
                return last_words(log)
        return ""

    def stop(self) -> None:
        """What draws keeps the batches that are whole, and ends."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
