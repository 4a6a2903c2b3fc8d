"""Where the runs of a study go: an open set. A new one is a class (base.py says what it must do) and one line here."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

from vqscale.errors import ExplainedError
from vqscale.programs.studies.config import StudyConfig
from vqscale.programs.studies.launchers.base import Launcher, State
from vqscale.programs.studies.launchers.local import Local
from vqscale.programs.studies.launchers.slurm import Slurm
from vqscale.programs.studies.study import Trial

LAUNCHERS: dict[str, type[Launcher]] = {"local": Local, "slurm": Slurm}

__all__ = ["LAUNCHERS", "Launcher", "State", "build", "states"]


def build(study: StudyConfig, trials: Sequence[Trial]) -> Launcher:
    """The launcher that the study names, ready to start runs; ValueError when it cannot, or another has them."""
    if study.launcher not in LAUNCHERS:
        near = difflib.get_close_matches(study.launcher, LAUNCHERS, n=1)
        hint = f"did you mean {near[0]}?" if near else "choose one of them"
        raise ValueError(f"launcher is {study.launcher}, and the launchers are {', '.join(LAUNCHERS)}: {hint}")
    for name in LAUNCHERS:
        if name != study.launcher:
            _check_idle(name, study, trials)
    launcher = LAUNCHERS[study.launcher](study, trials)
    launcher.check()
    return launcher


def _check_idle(name: str, study: StudyConfig, trials: Sequence[Trial]) -> None:
    """ValueError when this launcher has runs of the study that another one is about to start."""
    states = LAUNCHERS[name](study, trials).poll()
    active = [f"{run} is {state.status}, {state.detail}" for run, state in states.items() if state.active]
    if active:
        raise ValueError(
            f"launcher is {study.launcher}, and {len(active)} runs of this study are with {name}: {active[0]}; wait "
            f"for them, or stop them with --{name} --stop"
        )


def states(study: StudyConfig, trials: Sequence[Trial]) -> dict[str, State]:
    """The state of every run that any launcher knows of; one that cannot say it now is left out, with a note."""
    found: dict[str, State] = {}
    for launcher in LAUNCHERS.values():
        try:
            found |= launcher(study, trials).poll()
        except ExplainedError as error:
            print(f"note: {error}", file=sys.stderr)
    return found
