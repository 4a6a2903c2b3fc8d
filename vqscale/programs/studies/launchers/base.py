"""What a study asks of a launcher: start these runs, say where each stands, stop them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vqscale.programs.studies.config import StudyConfig
from vqscale.programs.studies.study import Trial

Status = Literal["waiting", "running", "failed", "stopped"]


@dataclass(frozen=True)
class State:
    """How a run is that a launcher has started. Whether it is done is told by its summary.json, and not here."""

    status: Status
    detail: str
    """where it waits or runs, or why it ended"""

    @property
    def active(self) -> bool:
        """It runs, or will without being started again."""
        return self.status in ("waiting", "running")


class Launcher(ABC):
    """Runs trials of one study."""

    attached: bool
    """The runs need this process, which calls `poll` until none is active. Otherwise they go on by themselves, and a
    launcher that is made in another process knows of them."""

    def __init__(self, study: StudyConfig, trials: Sequence[Trial]) -> None:
        self.study, self.trials = study, list(trials)

    @abstractmethod
    def check(self) -> None:
        """ValueError when the runs cannot be started from here, before anything is written."""

    @abstractmethod
    def start(self, trials: Sequence[Trial]) -> list[str]:
        """Start these, now or one after the other. Returns what there is to say of it."""

    @abstractmethod
    def poll(self) -> dict[str, State]:
        """The state of every run that was started and has not ended well, by its name."""

    @abstractmethod
    def stop(self) -> list[str]:
        """Let what runs save and leave, and what waits not begin. Returns what there is to say of it."""


def last_words(log: Path) -> str:
    """The line of a log that says why its run failed: the last with "error:", else the last one."""
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if "error:" in line]
    return (told or lines or ["it printed nothing"])[-1][:300]


def argument(path: Path) -> str:
    """A path as a word of a command line, where `a=b/c` would be taken for key=value."""
    return str(path) if path.is_absolute() else f"./{path}"
