"""A study: one base run, one or more dials, every combination a plain YAML and a run of its own. No torch here.

    FOLDER/study.yaml     what was asked for            FOLDER/configs/NAME.yaml   each run, readable in one file
    FOLDER/runs/NAME/     the run folders               FOLDER/logs/NAME.txt       what they printed
    FOLDER/results.csv    a line per run                FOLDER/laws.csv            a line per law that was fitted
    FOLDER/study.json     what made the numbers         FOLDER/index.html          the page, with figures/
    FOLDER/runs/NAME/samples/, judged/                  what a prior draws (samples.py), and what is said of it
    FOLDER/runs/NAME/measured/                          what is measured of a tokenizer (measured.py)

The base run may be of any task. A study continues where it was left: runs that are done are not started again, the
others resume from their checkpoints. config.py has what a file may say, the expansion is here, runner.py
brings the runs to their end, launchers/ knows where they run, report.py writes what there is, and
vqscale/show/study_page.py has what is shown of a task.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqscale import config as configuration
from vqscale.config.text import inline
from vqscale.disk import files
from vqscale.programs.studies.config import SEED, ChoiceConfig, StudyConfig
from vqscale.train.config import Run


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    name: str
    labels: dict[str, str]
    """position of each dial, and the seed"""
    config: Run
    study_folder: Path
    processes: int
    sample: tuple[str, ...] = ()
    """options of `vqscale sample`"""
    tokenizer: str = ""
    """whose ids a prior learns, where it draws"""

    @property
    def file(self) -> Path:
        """Its config."""
        return self.study_folder / "configs" / f"{self.name}.yaml"

    @property
    def log(self) -> Path:
        return self.study_folder / "logs" / f"{self.name}.txt"

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.run.folder)

    @property
    def done(self) -> bool:
        return (self.folder / "summary.json").exists()

    @property
    def steps_done(self) -> int:
        return int(last_row(self.folder).get("step", 0))


def expand(study: StudyConfig, path: Path) -> list[Trial]:
    """The runs of the study in the file `path`, in the order of its dials and then of its parts; ValueError names what
    is wrong, for all."""
    trials, problems = [], list[str]()
    combinations = ((grid, run) for grid in study.grids() for run in _combinations(grid))
    for grid, (labels, choices) in combinations:
        try:
            trials.append(_trial(grid, path, labels, choices))
        except ValueError as error:
            told = ", ".join(f"{dial} {label}" for dial, label in labels.items())
            problems.append(f"{path}: {_name(labels)} ({told}): {error}")
    if problems:
        raise ValueError("\n".join(problems))
    tasks = sorted({trial.config.task for trial in trials})
    if len(tasks) > 1:
        raise ValueError(f"{path}: its runs are of the tasks {' and '.join(tasks)}: make a study of each")
    _check_samples(study, path, tasks)
    shared = [name for name, count in Counter(trial.name for trial in trials).items() if count > 1]
    if shared:
        raise ValueError(f"{path}: several runs would be called {', '.join(shared)}: give their labels other names")
    return trials


def _check_samples(study: StudyConfig, path: Path, tasks: Sequence[str]) -> None:
    asked = [choice.label for dial in study.dials for choice in dial.positions() if choice.sample or choice.tokenizer]
    if study.samples is None and asked:
        raise ValueError(
            f"{path}: {', '.join(asked)} say how samples are drawn, and there is no key samples, which says with "
            "which tokenizer: give samples.tokenizer, or leave the choices' key sample out"
        )
    if study.samples is not None and tasks != ["prior"]:
        raise ValueError(
            f"{path}: samples are what priors draw, and its runs are of the task {' and '.join(tasks)}: leave the key "
            "samples out"
        )
    if study.measured is not None and tasks != ["tokenizer"]:
        raise ValueError(
            f"{path}: tokenizers are measured, and its runs are of the task {' and '.join(tasks)}: leave the key "
            "measured out"
        )


def _combinations(study: StudyConfig) -> Iterator[tuple[dict[str, str], list[ChoiceConfig]]]:
    """(labels, choices) of each combination of positions and seed."""
    seeds = [ChoiceConfig(str(seed), (f"run.seed={seed}",)) for seed in study.seeds]
    names = [*(dial.name for dial in study.dials), SEED]
    for choices in itertools.product(*(dial.positions() for dial in study.dials), seeds):
        yield dict(zip(names, (choice.label for choice in choices), strict=True)), list(choices)


def _trial(study: StudyConfig, path: Path, labels: dict[str, str], choices: Sequence[ChoiceConfig]) -> Trial:
    name, place = _name(labels), Path(study.folder)
    overrides = [line for choice in choices for line in choice.set]
    folder = f"run.folder={inline(str(place / 'runs' / name))}"
    config: Run = configuration.load(Run, path.parent / study.base, [*study.set, *overrides, folder])
    config.check_world(study.processes)
    if study.samples is None:
        return Trial(name, labels, config, place, study.processes)
    options = [*study.samples.options, *(option for choice in choices for option in choice.sample)]
    whose = [study.samples.tokenizer, *(choice.tokenizer for choice in choices if choice.tokenizer)]
    return Trial(name, labels, config, place, study.processes, tuple(options), whose[-1])


def _name(labels: dict[str, str]) -> str:
    name = "-".join(f"seed{label}" if dial == SEED else label for dial, label in labels.items())
    return "".join(sign if sign.isalnum() or sign in "-_." else "_" for sign in name)


def prepare(study: StudyConfig, trials: Sequence[Trial]) -> None:
    """Write study.yaml and the configs that are not there; ValueError, and nothing written, as of `check`."""
    place = Path(study.folder)
    check(study, trials)
    for folder in ("configs", "logs", "runs"):
        (place / folder).mkdir(parents=True, exist_ok=True)
    files.write(place / "study.yaml", configuration.dump(study))
    for trial in trials:
        if not trial.file.exists():  # what waits reads the file that its own code wrote
            files.write(trial.file, configuration.dump(trial.config))


def check(study: StudyConfig, trials: Sequence[Trial]) -> None:
    """ValueError when the folder holds another study's runs."""
    for trial in trials:
        if trial.file.exists():
            _check_same(Path(study.folder), trial)


def _check_same(place: Path, trial: Trial) -> None:
    old: Run = configuration.load(Run, trial.file, written=True)
    changed = configuration.differences(configuration.to_dict(old), configuration.to_dict(trial.config))
    if changed:
        raise ValueError(
            f"{place} holds results of another base config, {trial.file} differs:\n  "
            + "\n  ".join(changed)
            + "\nchange the study's folder, or set these keys back to go on with it"
        )


def logged_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of training numbers in a run's metrics.jsonl; a line that is not written to its end is none."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = (json.loads(line) for line in lines if line.endswith("}"))
    return [row for row in rows if "loss" in row]


def last_row(folder: Path) -> dict[str, Any]:
    """The last row of training numbers in a run's metrics.jsonl; {} before there is one."""
    return next(reversed(logged_rows(folder)), {})
