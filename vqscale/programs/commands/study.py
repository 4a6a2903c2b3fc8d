"""Run a study: every combination of its dials, then a table, figures and a page. The base run may be of any task.

    vqscale study STUDY.yaml [key=value ...]     e.g. jobs=1 folder=runs/other seeds=[0,1]
    --dry-run    print the plan with parameters and memory of each run, and start nothing
    --prepare    write the config of each run, print their paths, and start nothing
    --report     write table, laws, figures and page from what there is, and start nothing; with --out FOLDER there and
                 not in the study's folder, with study.json, which tells command, commits and machine: to be kept
    --local      on this machine, `jobs` runs side by side (launcher=local, the default)
    --slurm      as an array of jobs of SLURM (launcher=slurm), from a checkout; other options of the form --name=value
                 are for sbatch: --slurm --gpus-per-node=1 --time=02:00:00
    --stop       with --slurm: cancel what is in the queue; what runs saves first
    --help       this text and every key of a study

On this machine the command stays until all runs are done, and draws or measures what the study asks for. Interrupted
(Ctrl-C, TERM), it lets them save and leaves; the same command goes on. With SLURM it submits and leaves; when the array
is done, the same command draws and measures, where it is started. Either way it starts no run that is done or under
way; a run that has failed is recorded, the rest goes on, and the same command tries it again.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from vqscale import config as configuration
from vqscale.config.text import inline
from vqscale.disk.owner import own
from vqscale.programs.commands import evaluate, sample, words
from vqscale.programs.studies import launchers
from vqscale.programs.studies import measured as study_measured
from vqscale.programs.studies import samples as study_samples
from vqscale.programs.studies import study as studies
from vqscale.programs.studies.config import StudyConfig
from vqscale.programs.studies.launchers import Launcher
from vqscale.programs.studies.report import report, states
from vqscale.programs.studies.runner import Runner
from vqscale.programs.studies.study import Trial
from vqscale.run import checkout, processes
from vqscale.run import folder as run_folder
from vqscale.show import study_page
from vqscale.show.study_page import Results

ACTIONS = ("--dry-run", "--prepare", "--report", "--stop")
OUT = "--out="


def main(argv: list[str]) -> int:
    """0 done or submitted, 1 a run has failed or SLURM has, 2 the user's input, 75 stopped on request."""
    return processes.status_of(lambda: _study(argv))


def _study(argv: list[str]) -> int:
    if not argv or "--help" in argv or "-h" in argv:
        print(f"{__doc__}\nKeys:\n{configuration.describe(StudyConfig)}")
        return 0 if argv else 2
    argv = _joined(argv)
    asked = arguments(argv)
    action = asked.action
    study = configuration.load(StudyConfig, asked.path, asked.changes)
    trials = studies.expand(study, asked.path)
    check_options(study, trials)
    if action == "--dry-run":
        return _print_plan(study, trials)
    if action == "--stop":
        return _stop(launchers.build(study, trials))
    launcher = launchers.build(study, trials) if action is None else None
    command = checkout.command("study", [word for word in argv if word != "--report" and not word.startswith(OUT)])
    if action == "--report":
        studies.check(study, trials)
        results = report(study, trials, states(study, trials), command, asked.out)
        return _print_results(results, asked.out or Path(study.folder))
    if launcher is None:  # --prepare
        studies.prepare(study, trials)
        return _say([str(trial.file) for trial in trials])
    runner = Runner(study, trials, launcher, command)
    listen(runner.stop)
    _print_results(carry_out(runner), Path(study.folder))
    return _end(runner, checkout.command("study", [*(word for word in argv if not word.startswith("-")), "--report"]))


def carry_out(runner: Runner) -> Results:
    """Start what is left of a study as the only writer of its folder, and wait for it if it is for us to wait."""
    studies.prepare(runner.study, runner.trials)
    with own(runner.study.folder, "runs of the study"):
        return runner.run()


def check_options(study: StudyConfig, trials: Sequence[Trial]) -> None:
    """The end of the program, by argparse, for options that `vqscale sample` or `vqscale evaluate` has not; ValueError
    for those that do not go together."""
    if study.measured is not None:
        evaluate.arguments(study_measured.words(study.measured, trials[0]))
    if study.samples is not None:
        for trial in {trial.sample: trial for trial in trials}.values():
            sample.parser().parse_args(study_samples.words(trial))


def listen(stop: Callable[[int, FrameType | None], None]) -> None:
    """Signals call `stop`, but for those that this process was started to ignore, as nohup does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)


@dataclass(frozen=True)
class Asked:
    """What a command line asks for."""

    action: str | None
    """what to do in place of running"""
    path: Path
    """the study's file"""
    changes: list[str]
    """key=value for it"""
    out: Path | None
    """where --report writes; None: the study's folder"""


def _joined(argv: Sequence[str]) -> list[str]:
    """`--out FOLDER` as the one word --out=FOLDER."""
    found = list(argv)
    if "--out" in found:
        place = found.index("--out")
        found[place : place + 2] = ["".join([OUT, *found[place + 1 : place + 2]])]
    return found


def arguments(argv: Sequence[str]) -> Asked:
    """ValueError for words that are none of these."""
    argv = _joined(argv)
    given = [word for word in argv if word.startswith(OUT)]
    options = [word for word in argv if word.startswith("-") and word not in given]
    chosen = [option for option in options if option in ACTIONS]
    named = [name for name in launchers.LAUNCHERS if f"--{name}" in options]
    if len(chosen) > 1 or len(named) > 1:
        raise ValueError(f"{' and '.join([*chosen, *(f'--{name}' for name in named)])} exclude each other: give one")
    if given and (chosen != ["--report"] or len(given) > 1 or given == [OUT]):
        raise ValueError(f"{' '.join(given)}: --report --out FOLDER, once, says where a report is written; change it")
    others = [option for option in options if option not in ACTIONS and option[2:] not in launchers.LAUNCHERS]
    if others and chosen:
        raise ValueError(f"{' '.join(others)} is for a launcher, and {chosen[0]} starts nothing: leave one out")
    path, changes = words.config_and_changes([word for word in argv if not word.startswith("-")])
    if path is None:
        raise ValueError("no STUDY.yaml is given, and there is no default: give one, as configs/study/quantizers.yaml")
    changes += [f"launcher={name}" for name in named]
    changes += [f"launcher_options={inline(others)}"] if others else []
    return Asked(next(iter(chosen), None), path, changes, Path(given[0].removeprefix(OUT)) if given else None)


def _end(runner: Runner, to_report: str) -> int:
    """Say how it ended and what to do next; the exit status."""
    if runner.stopping:
        print("interrupted: the runs have saved, the same command goes on")
        return run_folder.EXIT_STOPPED
    active = sum(state.active for state in runner.states.values())
    if active:
        print(f"{active} runs are under way; how they are, and the page when they are done:\n  {to_report}")
    return 1 if runner.failed else 0


def _stop(launcher: Launcher) -> int:
    if launcher.attached:
        raise ValueError("a study on this machine is stopped where it runs, by Ctrl-C or TERM: --stop is for --slurm")
    return _say(launcher.stop())


def _say(lines: Sequence[str]) -> int:
    print("\n".join(lines))
    return 0


def _print_plan(study: StudyConfig, trials: Sequence[Trial]) -> int:
    from vqscale.plan import costs_of

    processes = " or ".join(str(number) for number in sorted({trial.processes for trial in trials}))
    print(f"{len(trials)} runs of {processes} processes, {study.jobs} side by side, in {study.folder}")
    for trial in trials:
        costs = costs_of(trial.config, trial.processes)
        parameters, memory = sum(costs.parameters.values()), sum(costs.memory.values()) / 2**20
        print(f"  {trial.name}: {parameters:,} parameters, {memory:,.0f} MiB per rank, {trial.config.run.steps} steps")
    return 0


def _print_results(results: Results, place: Path) -> int:
    print(study_page.text(results.task, results.lines))
    fitted = [each.line for each in results.fitted if each.fit is not None]
    if fitted:
        print(f"\n{study_page.aligned(fitted, study_page.LAWS)}\n")
    for text in [study_page.how_many(results.lines), *results.task.cautions(results.lines)]:
        print(text)
    print(f"page: {place / 'index.html'}, table: {place / 'results.csv'}")
    return 0
