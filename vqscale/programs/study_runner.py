"""Brings the runs of a study to their end with a launcher, and writes what there is of results as they come in."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from vqscale import config as configuration
from vqscale.disk import files
from vqscale.programs.launchers.base import Launcher, State
from vqscale.programs.study import StudyConfig, Trial, last_row
from vqscale.run import folder as run_folder
from vqscale.show import study_page

POLL_S = 1.0


class Runner:
    """Starts the runs that are neither done nor under way. With a launcher that needs this process it stays until none
    is active; `stop`, a handler of signals, lets the running ones save and ends."""

    def __init__(self, study: StudyConfig, trials: Sequence[Trial], launcher: Launcher, command: str) -> None:
        self.study, self.trials, self.launcher, self.command = study, trials, launcher, command
        self.states: dict[str, State] = {}
        self.stopping = False

    @property
    def failed(self) -> list[str]:
        return [name for name, state in self.states.items() if state.status == "failed"]

    def stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True

    def run(self) -> list[dict[str, Any]]:
        """Returns the lines of the results."""
        known = self.launcher.poll()
        under_way = {name for name, state in known.items() if state.active}
        trials = [trial for trial in self.trials if not trial.done and trial.name not in under_way]
        for note in self.launcher.start(trials):
            print(note)
        if self.launcher.attached:
            self._stay()
        else:
            self.states = self.launcher.poll()
        return report(self.study, self.trials, self.states, self.command)

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
        """Look at all runs, and write the results when one has ended. Returns whether any is still active."""
        before, self.states = self.states, self.launcher.poll()
        for name in self.failed:
            if name not in before or before[name].active:
                tqdm.write(f"{name} failed: {self.states[name].detail}")
        active, was = (sum(state.active for state in states.values()) for states in (self.states, before))
        if active < was:
            report(self.study, self.trials, self.states, self.command)
        return active > 0


def report(
    study: StudyConfig, trials: Sequence[Trial], states: Mapping[str, State], command: str
) -> list[dict[str, Any]]:
    """Write results.csv, the figures and the page from what there is; returns the lines."""
    lines = [result_line(trial, states.get(trial.name)) for trial in trials]
    place = Path(study.folder)
    write_results(place / "results.csv", lines)
    study_page.write(
        place,
        study_page.TASKS[trials[0].config.task],
        lines,
        [dial.name for dial in study.dials],
        {trial.name: trial.folder for trial in trials},
        [f"commit {run_folder.commit()}", command, configuration.dump(study)],
    )
    return lines


def result_line(trial: Trial, state: State | None = None) -> dict[str, Any]:
    """A line of results.csv: labels, status, steps, and the numbers of a run that is done.

    The status of a run that is not is its launcher's; nobody's is waiting, or begun where it has steps. What `vqscale
    evaluate samples` wrote to RUN/judged of the run's samples is among the numbers.
    """
    line: dict[str, Any] = {"run": trial.name, **trial.labels, "status": "waiting"}
    summary, row = run_folder.read_json(trial.folder / "summary.json"), last_row(trial.folder)
    if summary:
        judged = run_folder.read_json(trial.folder / "judged" / "result.json").get("numbers", {})
        summary = {key: value for key, value in judged.items() if key != "images"} | summary
        line |= {"status": "done"} | study_page.result(study_page.TASKS[trial.config.task], summary, row)
    elif state is not None:
        line |= {"status": state.status, "steps": row.get("step", 0)}
        line |= {"error": state.detail} if state.status == "failed" else {}
    elif row:
        line |= {"status": "begun", "steps": row["step"]}
    return line | trial.labels  # a dial may be called like a number


def write_results(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """A line per run, with every column that any run has."""
    columns = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(lines)
    files.write(path, text.getvalue())
