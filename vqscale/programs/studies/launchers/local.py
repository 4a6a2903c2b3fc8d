"""Runs of a study as processes of this machine, `jobs` side by side. They end with the process that started them.

There are places for jobs x processes processes. A run that needs more than all of them runs alone; nothing overtakes a
run that waits for its places.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence

from vqscale.programs.studies.config import StudyConfig
from vqscale.programs.studies.launchers.base import Launcher, State, argument, last_words
from vqscale.programs.studies.study import Trial
from vqscale.run.checkout import begin, started
from vqscale.run.folder import EXIT_STOPPED


class Local(Launcher):
    attached = True

    def __init__(self, study: StudyConfig, trials: Sequence[Trial]) -> None:
        super().__init__(study, trials)
        self.waiting: list[Trial] = []
        self.running: dict[str, tuple[Trial, subprocess.Popen[bytes]]] = {}
        self.ended: dict[str, State] = {}
        self.stopping = False

    def check(self) -> None:
        if self.study.launcher_options:
            raise ValueError(
                f"launcher_options are {', '.join(self.study.launcher_options)}, and launcher local takes none: leave "
                "them out (launcher_options=[]), or use launcher: slurm (--slurm)"
            )

    def start(self, trials: Sequence[Trial]) -> list[str]:
        self.waiting += trials
        self._fill()
        return []

    def poll(self) -> dict[str, State]:
        for name, (trial, process) in list(self.running.items()):
            status = process.poll()
            if status is not None:
                del self.running[name]
                if status:
                    asked = self.stopping or status == EXIT_STOPPED
                    self.ended[name] = State("stopped" if asked else "failed", last_words(trial.log))
        self._fill()
        running = {name: State("running", f"process {process.pid}") for name, (_, process) in self.running.items()}
        return running | {trial.name: State("waiting", "for a place") for trial in self.waiting} | self.ended

    def stop(self) -> list[str]:
        self.stopping = True
        self.waiting.clear()
        for _, process in self.running.values():
            process.send_signal(signal.SIGTERM)
        return []

    def _fill(self) -> None:
        while self.waiting and self._fits(self.waiting[0]):
            trial = self.waiting.pop(0)
            self.running[trial.name] = (trial, self._start(trial))

    @property
    def places(self) -> int:
        return self.study.jobs * self.study.processes

    def _fits(self, trial: Trial) -> bool:
        taken = sum(running.processes for running, _ in self.running.values())
        return not taken or taken + trial.processes <= self.places

    def _start(self, trial: Trial) -> subprocess.Popen[bytes]:
        command = [*started("train", trial.processes), argument(trial.file)]
        threads = max(1, (os.cpu_count() or 1) // max(self.places, trial.processes))
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        with trial.log.open("a") as log:
            return begin(command, log, environment)
