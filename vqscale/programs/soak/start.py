"""One start of a training on this machine, with all of its processes in reach: each has a mark in its environment, and
so has what it starts. Linux: it reads /proc."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

from vqscale.run.checkout import begin, started

MARK = "VQSCALE_SOAK"


class Start:
    """A program that was started on so many processes; what it prints goes to `log`."""

    def __init__(self, name: str, words: Iterable[str], processes: int, log: Path) -> None:
        self.mark, self.log, self.began = f"{MARK}={uuid.uuid4().hex}", log, time.monotonic()
        self.alone = processes == 1
        environment = {"OMP_NUM_THREADS": "1", **os.environ, MARK: self.mark.partition("=")[2]}
        with log.open("a") as out:
            self.process = begin([*started(name, processes), *words], out, environment)

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def status(self) -> int | None:
        return self.process.poll()

    def said(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()

    def pids(self) -> list[int]:
        """All of its processes that live."""
        return [pid for pid, environment in _environments() if self.mark in environment]

    def ranks(self) -> list[int]:
        """The processes that train, in the order of their ranks; workers that they started are none."""
        mine = {pid: environment for pid, environment in _environments() if self.mark in environment}
        found = {
            _rank(environment): pid
            for pid, environment in mine.items()
            if _rank(environment) >= 0 and not _in(pid, mine)
        }
        return [self.process.pid] if self.alone and not self.ended else [found[rank] for rank in sorted(found)]

    def kill(self) -> None:
        """SIGKILL to all of its processes, until none is left."""
        while pids := self.pids():
            tell(pids, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.02)
        self.process.wait()

    def wait(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.ended

    def left_behind(self, seconds: float) -> int:
        """How many of its processes are there so many seconds after it has ended; they are killed then."""
        deadline = time.monotonic() + seconds
        while (pids := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.1)
        self.kill()
        return len(pids)


def tell(pids: Iterable[int], number: int) -> None:
    """A signal to processes, of which some may be gone."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _environments() -> list[tuple[int, list[str]]]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):  # gone, or somebody else's
                found.append((int(entry.name), (entry / "environ").read_text(errors="replace").split("\0")))
    return found


def _rank(environment: list[str]) -> int:
    return next((int(line.removeprefix("RANK=")) for line in environment if line.startswith("RANK=")), -1)


def _in(pid: int, mine: dict[int, list[str]]) -> bool:
    """Whether a process was started by a rank."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return True  # gone
    return _rank(mine.get(parent, [])) >= 0
