"""What every drill is: something is done to a run, no more is lost than was said beforehand, and a line of a table says
so. A drill that does not hold stays in the table."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from vqscale.disk import files
from vqscale.programs.commands import words
from vqscale.programs.soak.compare import rows
from vqscale.programs.soak.start import Start
from vqscale.run import machine

Ground = TypeVar("Ground")
Line = dict[str, Any]


class Skipped(Exception):
    """What a drill needs is not here."""


@dataclass(frozen=True)
class Drill(Generic[Ground]):
    """One thing that happens. `most` is what may be lost, in steps; told beforehand."""

    name: str
    do: Callable[[Ground], tuple[str, int]]
    """(how it went on, steps lost)"""
    most: int = 0


def line(ground: Ground, drill: Drill[Ground], again: Callable[[], object]) -> Line:
    """Do one drill; `again` makes the ground fit for the next one where something else came of it."""
    began = time.monotonic()
    out: Line = {"drill": drill.name, "most": drill.most}
    try:
        said, lost = drill.do(ground)
        held = lost <= drill.most
        outcome = "survived, nothing lost" if not lost else f"survived, {lost} steps done again"
        out |= {"happens": said, "lost": lost, "held": held, "outcome": outcome if held else f"NOT: {lost} steps lost"}
    except Skipped as why:
        out |= {"happens": "", "lost": None, "held": None, "outcome": f"skipped: {why}"}
    except Exception as error:
        traceback.print_exc()
        out |= {"happens": "", "lost": None, "held": False, "outcome": f"NOT: {type(error).__name__}: {error}"[:300]}
        with contextlib.suppress(TimeoutError, AssertionError):
            again()
    return out | {"seconds": round(time.monotonic() - began)}


def told(line: Line) -> str:
    held = {True: "yes", False: "NO", None: ""}[line["held"]]
    lost = "" if line["lost"] is None else line["lost"]
    return f"| {line['drill']} | {line['happens']} | {lost} | {held} | {line['outcome']} |"


def write(out: Path, name: str, command: str, lines: Sequence[Line], **facts: object) -> None:
    """OUT/NAME.json and OUT/NAME.md."""
    made = words.made_by("drills") | {"command": command, "machine": machine.facts()} | facts
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / f"{name}.json", made | {"drills": list(lines)})
    head = ["| drill | what happens | steps done again | held | outcome |", "|---|---|---|---|---|"]
    files.write(out / f"{name}.md", "\n".join([*head, *map(told, lines)]) + "\n")


def undisturbed(config: Path, folder: Path, steps: int) -> list[dict[str, Any]]:
    """What a run on two processes logs to which nothing happens."""
    start = Start("train", [str(config), f"run.steps={steps}", f"run.folder={folder}"], 2, Path(f"{folder}.txt"))
    start.process.wait()
    assert start.status == 0, start.said()
    return logged(folder)


def logged(run: Path) -> list[dict[str, Any]]:
    """Its steps, in what is logged of each."""
    return [row for row in rows(run) if "loss" in row]
