"""What comes before a study of claims: files that a user brings, and commands of vqscale, one after the other.

    FOLDER/before.json        how each command ended; FOLDER is that of the full study
    FOLDER/logs/before-N.txt  what it printed

A command that is done is not started again, one that has failed is. Not here: the study (studies/runner.py),
and what a command would refuse (commands/claims.py).
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vqscale.disk import files
from vqscale.programs.claims.config import ClaimsConfig
from vqscale.programs.studies.launchers.base import last_words
from vqscale.run import checkout
from vqscale.run import folder as run_folder


class Before:
    """Starts what is left, and can be told to stop."""

    def __init__(self, config: ClaimsConfig) -> None:
        self.config, self.place = config, Path(config.study.folder)
        self.stopping = False
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def _path(self) -> Path:
        return self.place / "before.json"

    @property
    def absent(self) -> str:
        """What a user has to bring, and has not."""
        names = [name for name in self.config.needs if not Path(name).exists()]
        return f"{', '.join(names)} is yours to bring, and is not here" if names else ""

    def missing(self) -> str:
        """Why nothing can be run or judged; "" where it can."""
        if self.absent:
            return self.absent
        ended = run_folder.read_json(self._path)
        failed = [f"{command} failed: {ended[command]}" for command in self._commands() if ended.get(command)]
        return failed[0] if failed else ""

    def run(self) -> str:
        """Do what is left; why it failed, "" where it did not or was told to stop."""
        if self.absent:
            return self.absent
        (self.place / "logs").mkdir(parents=True, exist_ok=True)
        ended: dict[str, Any] = run_folder.read_json(self._path)
        for number, (given, command) in enumerate(zip(self.config.before, self._commands(), strict=True)):
            if self.stopping or ended.get(command) == "":
                continue
            print(command, flush=True)
            why = self._start(given, self.place / "logs" / f"before-{number}.txt")
            if why is None:
                return ""
            files.write_json(self._path, ended := ended | {command: why})
            if why:
                return f"{command} failed: {why}"
        return ""

    def stop(self) -> None:
        """What runs saves and ends."""
        self.stopping = True
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def _commands(self) -> list[str]:
        return [checkout.command(name, given) for name, *given in self.config.before]

    def _start(self, given: Sequence[str], log: Path) -> str | None:
        """Why a command failed, "" where it did not, None where it was told to stop."""
        name, *rest = given
        with log.open("w") as out:
            self._process = checkout.begin([*checkout.program(name), *rest], out)
            status = self._process.wait()
        if status and (self.stopping or status == run_folder.EXIT_STOPPED):
            self.stopping = True
            return None
        return last_words(log) if status else ""
