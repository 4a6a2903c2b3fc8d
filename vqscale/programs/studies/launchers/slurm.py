"""Runs of a study as an array of jobs of SLURM: a task is a run, on one node, by launch/slurm/array.sbatch. Runs of
another number of processes are an array of their own.

    FOLDER/slurm/N.txt       the configs of the N-th submission, a line per task, which the tasks read when they begin
    FOLDER/slurm/jobs.json   [{"job": "1234", "runs": [name of task 0, ...], "stopped": [name, ...]}, ...]
    FOLDER/logs/slurm-JOB_TASK.txt

The runs go on by themselves, and are requeued before their time is up. Whether a run waits or works is for squeue to
say; why one has left the queue, for its log and, where there is accounting, sacct. Where squeue is not (on a laptop
with a copy of the folder, say), nothing is known of a run but what is in its folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqscale.disk import files
from vqscale.errors import ExplainedError
from vqscale.programs.studies.launchers.base import Launcher, State, argument, last_words
from vqscale.programs.studies.study import Trial

SCRIPT = Path("launch") / "slurm" / "array.sbatch"
OURS = ("--array", "-a", "--output", "-o", "--parsable", "--wrap")
QUEUE = ("squeue", "--array", "--noheader", "--format=%F_%K|%T")
ACCOUNTS = ("sacct", "--allocations", "--noheader", "--parsable2", "--format=JobID,State")
FORGOTTEN = re.compile(r"invalid job id", re.IGNORECASE)  # squeue, of jobs that have ended some minutes ago


@dataclass(frozen=True)
class Task:
    """A run as a task of an array."""

    job: str
    name: str
    """as squeue and scancel name it: JOB_NUMBER"""
    stopped: bool
    """we have cancelled it"""


class Slurm(Launcher):
    attached = False

    @property
    def place(self) -> Path:
        return Path(self.study.folder) / "slurm"

    @property
    def logs(self) -> Path:
        return Path(self.study.folder) / "logs"

    def check(self) -> None:
        if not SCRIPT.is_file():
            raise ValueError(
                f"launcher slurm submits {SCRIPT}, and there is none in {Path.cwd()}: start from a checkout of the "
                "repository, as an installed package has no launch/; or use --prepare, and submit the configs that it "
                "prints with a script of your own"
            )
        if shutil.which("sbatch") is None:
            raise ValueError(
                "launcher slurm needs sbatch, which is not on PATH here: start where jobs are submitted, or use "
                "launcher: local (--local)"
            )
        for option in self.study.launcher_options:
            if not option.startswith("-"):
                raise ValueError(f"launcher_options has {option}, no option of sbatch: write options as --name=value")
            if option.partition("=")[0] in OURS:
                raise ValueError(
                    f"launcher_options has {option}, and {', '.join(OURS)} are the launcher's own, which knows its "
                    "tasks and logs by them: leave it out"
                )

    def start(self, trials: Sequence[Trial]) -> list[str]:
        alike = [[trial for trial in trials if trial.processes == n] for n in sorted({t.processes for t in trials})]
        return [self._start(array) for array in alike]

    def _start(self, trials: Sequence[Trial]) -> str:
        """Submit an array of runs of as many processes."""
        submitted = self._submitted()
        self.place.mkdir(exist_ok=True)
        configs = self.place / f"{len(submitted)}.txt"
        files.write(configs, "".join(f"{argument(trial.file)}\n" for trial in trials))
        job = self._submit(configs, trials)
        self._keep([*submitted, {"job": job, "runs": [trial.name for trial in trials], "stopped": []}])
        what = f"an array of {len(trials)} runs of {trials[0].processes} processes"
        return f"submitted job {job}, {what}; they print into {self.logs}/slurm-{job}_*.txt"

    def poll(self) -> dict[str, State]:
        open_names = {trial.name for trial in self.trials if not trial.done}
        tasks = {name: task for name, task in self._tasks().items() if name in open_names}
        queue, ended = _ask(QUEUE, (task.job for task in tasks.values())), dict[str, str]()
        if queue is None:
            return {}
        left = [task.job for task in tasks.values() if task.name not in queue]
        with contextlib.suppress(ExplainedError):  # accounts say more of why a run ended, and are not needed to know it
            ended = _ask(ACCOUNTS, left) or {}
        return {name: self._state(task, queue, ended) for name, task in tasks.items()}

    def stop(self) -> list[str]:
        tasks = self._tasks()
        active = {name: tasks[name].name for name, state in self.poll().items() if state.active}
        if not active:
            return ["no run of this study is in the queue"]
        _run(["scancel", *active.values()])
        submitted = self._submitted()
        for entry in submitted:
            entry["stopped"] += [name for name, task in active.items() if task in _names(entry)]
        self._keep(submitted)
        return [f"cancelled {', '.join(active.values())}: what runs saves and ends; started again, the study goes on"]

    def _submit(self, configs: Path, trials: Sequence[Trial]) -> str:
        logs = str(self.logs).replace("%", "%%")
        ours = ["--parsable", f"--array=0-{len(trials) - 1}", f"--output={logs}/slurm-%A_%a.txt"]
        command = ["sbatch", *self.study.launcher_options, *ours, str(SCRIPT), argument(configs)]
        return _run(command, VQSCALE_PROCESSES=str(trials[0].processes)).partition(";")[0].strip()

    def _submitted(self) -> list[dict[str, Any]]:
        path = self.place / "jobs.json"
        found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        return found

    def _keep(self, submitted: list[dict[str, Any]]) -> None:
        files.write_json(self.place / "jobs.json", submitted)

    def _tasks(self) -> dict[str, Task]:
        """The task of each run, in its last submission."""
        return {
            name: Task(entry["job"], task, name in entry["stopped"])
            for entry in self._submitted()
            for name, task in zip(entry["runs"], _names(entry), strict=True)
        }

    def _state(self, task: Task, queue: dict[str, str], ended: dict[str, str]) -> State:
        if task.name in queue:
            word = queue[task.name]
            return State("waiting" if word == "PENDING" else "running", f"task {task.name} of slurm is {word}")
        if task.stopped:
            return State("stopped", f"task {task.name} of slurm was cancelled with --stop")
        why = f"{ended[task.name]}: " if task.name in ended else ""
        return State("failed", f"task {task.name} of slurm: {why}{last_words(self.logs / f'slurm-{task.name}.txt')}")


def _names(entry: dict[str, Any]) -> list[str]:
    return [f"{entry['job']}_{number}" for number in range(len(entry["runs"]))]


def _ask(command: Sequence[str], jobs: Iterable[str]) -> dict[str, str] | None:
    """The second column by the first of what a command says of these jobs; None where there is no such command."""
    wanted = sorted(set(jobs))
    if not wanted:
        return {}
    if shutil.which(command[0]) is None:
        return None
    lines = _run([*command, f"--jobs={','.join(wanted)}"]).splitlines()
    return {name: word for name, _, word in (line.strip().partition("|") for line in lines)}


def _run(command: Sequence[str], **environment: str) -> str:
    """What a command of SLURM prints, and nothing of jobs that it has forgotten; ExplainedError when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode and FORGOTTEN.search(done.stderr):
        return ""
    if done.returncode:
        raise ExplainedError(
            f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()[:500]}; what runs of the "
            "study goes on, start the same command again when it works"
        )
    return done.stdout
