"""Brings the runs of a study to their end with a launcher, draws or measures what it asks for besides, and writes what
there is of results as they come in."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import FrameType

from tqdm import tqdm

from vqscale.programs.studies import after as study_after
from vqscale.programs.studies.config import StudyConfig
from vqscale.programs.studies.launchers.base import Launcher, State
from vqscale.programs.studies.report import report
from vqscale.programs.studies.study import Trial
from vqscale.show.study_page import Results

POLL_S = 1.0


class Runner:
    """Starts the runs that are neither done nor under way. With a launcher that needs this process it stays until none
    is active; `stop`, a handler of signals, lets the running ones save and ends."""

    def __init__(self, study: StudyConfig, trials: Sequence[Trial], launcher: Launcher, command: str) -> None:
        self.study, self.trials, self.launcher, self.command = study, trials, launcher, command
        self.states: dict[str, State] = {}
        self.stopping = False
        self.unfinished: list[str] = []
        """runs whose samples could not be drawn or judged, or which could not be measured"""
        self._after = study_after.After(study)

    @property
    def failed(self) -> list[str]:
        return [*(name for name, state in self.states.items() if state.status == "failed"), *self.unfinished]

    def stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        self._after.stop()

    def run(self) -> Results:
        """Start, wait if it is for us to wait, and report."""
        known = self.launcher.poll()
        under_way = {name for name, state in known.items() if state.active}
        trials = [trial for trial in self.trials if not trial.done and trial.name not in under_way]
        for note in self.launcher.start(trials):
            print(note)
        if self.launcher.attached:
            self._stay()
        else:
            self.states = self.launcher.poll()
        if not any(state.active for state in self.states.values()):
            self.finish()
        return report(self.study, self.trials, self.states, self.command)

    def finish(self) -> None:
        """Draw, judge and measure what is missing of runs that are done, one after the other."""
        left, what = study_after.missing(self.study, self.trials), self._after.what
        if self.stopping or not left:
            return
        for trial in (bar := tqdm(left, unit="run", desc=what, dynamic_ncols=True)):
            if self.stopping:
                return
            bar.set_postfix_str(trial.name)
            why = self._after.finish(trial)
            if why and not self.stopping:
                tqdm.write(f"{what} of {trial.name} failed: {why}")
                self.unfinished.append(trial.name)
            report(self.study, self.trials, self.states, self.command)

    def _stay(self) -> None:
        steps = sum(trial.config.run.steps for trial in self.trials)
        quiet = 0.5 if sys.stdout.isatty() else 5
        told = False
        with tqdm(total=steps, unit="step", dynamic_ncols=True, mininterval=quiet) as bar:
            while self._collect():
                if self.stopping and not told:
                    self.launcher.stop()
                    told = True
                bar.n = sum(trial.steps_done for trial in self.trials)
                running = [name for name, state in self.states.items() if state.status == "running"]
                bar.set_postfix_str(", ".join(running), refresh=True)
                time.sleep(POLL_S)

    def _collect(self) -> bool:
        """Look at all runs, and write the results when some have begun or one has ended. Returns whether any is still
        active."""
        before, self.states = self.states, self.launcher.poll()
        for name in self.failed:
            if name not in before or before[name].active:
                tqdm.write(f"{name} failed: {self.states[name].detail}")
        active, was = (sum(state.active for state in states.values()) for states in (self.states, before))
        if active != was:
            report(self.study, self.trials, self.states, self.command)
        return active > 0
