"""One training under attack: started, attacked, started again, until it has ended or does not go on.

Of every start there is a record: from which step it went, on how many processes, what was done to it at which step, how
it ended, what it said, and how many steps were lost, once the next start has said where it goes on.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vqscale.disk import checkpoint, manifest
from vqscale.programs.soak.disk import Disk
from vqscale.programs.soak.schedule import ENDS, Attack
from vqscale.programs.soak.start import Start, tell

GOES_ON = re.compile(r"going on after step (\d+) of ")
NEW = re.compile(r"a new run in ")
WORDS = re.compile(r"error:|warning: passed over|asked to stop|No space left|\[Errno ")
LOOK_S = 0.01
TAIL = 20_000  # bytes, more than a line of metrics has
UNASKED = 3  # ends that nobody asked for, after which a training is given up
DAMAGED = 3  # bytes that are changed

Record = dict[str, Any]


@dataclass
class Training:
    """What is attacked: a config whose run folder is on `disk`."""

    place: str
    """its round and name"""
    config: Path
    run: Path
    disk: Disk
    logs: Path
    patience_s: float
    """in which it has to end that was killed, and to do a step that goes on"""
    told: Callable[[Record], None]
    wrong: list[str] = field(default_factory=list)
    """what it did that it should not have done"""
    given_up: bool = False
    _before: int | None = None
    """the file of metrics before the start, which puts another one in its place when it goes on"""

    def attacked(self, attacks: Sequence[Attack], processes: int) -> None:
        """Bring it from nothing to its end in spite of all attacks."""
        shutil.rmtree(self.run, ignore_errors=True)
        left, unasked, before = list(attacks), 0, None
        for number in itertools.count():
            start = self._start(number, processes)
            record: Record = {"place": self.place, "start": number, "processes": processes, "attacks": []}
            try:
                attack = self._attack(start, left, record)
                record |= {"status": start.status, "left_behind": start.left_behind(30.0)}
            finally:
                start.kill()
            record |= {"from": _from(start), "reached": last_step(self.run), "said": _words(start, self.logs.parent)}
            if record["left_behind"]:
                self.wrong.append(f"{self.place}, start {number}: {record['left_behind']} processes outlived it")
            self._tell(before, record)
            before = record
            if start.status == 0:
                break
            if attack is not None:
                processes = attack.processes
                continue
            unasked += 1
            self.wrong.append(f"{self.place}, start {number} ended with {start.status}, unasked: {record['said']}")
            if unasked == UNASKED:
                self.given_up = True
                break
        self._tell(before, None)

    def _start(self, number: int, processes: int) -> Start:
        log = self.logs / f"{self.place.replace(' ', '-')}-{number}.txt"
        log.unlink(missing_ok=True)
        self._before = _inode(self.run)
        return Start("train", [str(self.config)], processes, log)

    def _tell(self, record: Record | None, after: Record | None) -> None:
        """Of a start, now that the one after it, if there is one, has said where it goes on."""
        if record is not None:
            begins = record["reached"] if after is None else after["from"]
            self.told({**record, "lost": None if begins is None else max(0, record["reached"] - begins)})

    def _attack(self, start: Start, left: list[Attack], record: Record) -> Attack | None:
        """Do one thing after the other to a start until it has ended; what ended it, None: nothing that was done."""
        last: Attack | None = None
        while left and self._until(start, partial(self._is_there, start, left[0])):
            last = left.pop(0)
            done = self._do(last, start)
            record["attacks"].append({**asdict(last), "at": last_step(self.run), "done": done})
            if last.kind in ENDS and not start.wait(self.patience_s):
                self.wrong.append(f"{self.place}, start {record['start']} did not end after: {last.kind}")
            if last.kind in ENDS or start.ended:
                return last
        self._until(start, lambda: False)
        full = last is not None and last.kind == "fill the disk"  # it may be told later that a file was not written
        return last if full and start.status else None

    def _until(self, start: Start, there: Callable[[], bool]) -> bool:
        """Wait for something; False: the start has ended, or did no step for too long and was killed."""
        seen, since = last_step(self.run), time.monotonic()
        while not start.ended:
            if there():
                return True
            if (now := last_step(self.run)) != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > self.patience_s:
                self.wrong.append(f"{start.log.stem} did no step in {self.patience_s:.0f} s")
                start.kill()
            time.sleep(LOOK_S)
        return False

    def _is_there(self, start: Start, attack: Attack) -> bool:
        """Whether the moment of an attack has come."""
        if attack.moment == "the start":
            return time.monotonic() - start.began >= attack.seconds
        step = last_step(self.run)
        if _inode(self.run) == self._before:
            return False
        if attack.moment == "a save":
            saved = self.run / "checkpoints" / f"{attack.step:010d}"
            return any(saved.parent.glob(f"{saved.name}.*.tmp")) or (step >= attack.step and saved.exists())
        return step >= attack.step

    def _do(self, attack: Attack, start: Start) -> str:
        """What was done, in words."""
        ranks = start.ranks()
        rank = attack.one_of(len(ranks))
        match attack.kind:
            case "kill one rank":
                tell(ranks[rank : rank + 1], signal.SIGKILL)
                return f"rank {rank}"
            case "kill all":
                start.kill()
            case "stop one rank" | "stop all":
                chosen = start.pids() if attack.kind == "stop all" else ranks[rank : rank + 1]
                tell(chosen, signal.SIGSTOP)
                time.sleep(attack.seconds)
                tell(chosen, signal.SIGCONT)
                return f"{'all' if attack.kind == 'stop all' else f'rank {rank}'}, {attack.seconds:.1f} s"
            case "TERM to one rank":
                tell(ranks[rank : rank + 1], signal.SIGTERM)
                return f"rank {rank}"
            case "TERM to all ranks":
                tell(ranks, signal.SIGTERM)
            case "TERM to the launcher":
                tell([start.process.pid], signal.SIGTERM)
            case "damage the newest checkpoint":
                start.kill()
                return self._damage(attack)
            case "fill the disk":
                return self._fill(attack, start)
        return "all"

    def _fill(self, attack: Attack, start: Start) -> str:
        if self.disk.lacking:
            return f"not done: {self.disk.lacking}"
        self.disk.fill()
        ended = start.wait(4 * attack.seconds)
        self.disk.empty()
        return f"full for {4 * attack.seconds:.0f} s" if not ended else "full until it ended"

    def _damage(self, attack: Attack) -> str:
        """Of the newest whole checkpoint, where another one is under it."""
        whole = [path for path in checkpoint.finished(self.run / "checkpoints") if manifest.damage(path) is None]
        if len(whole) < 2:
            return f"killed all; nothing damaged, for {len(whole)} checkpoint stands"
        sizes = {path: path.stat().st_size for path in sorted(whole[-1].rglob("*")) if path.is_file()}
        file = list(sizes)[attack.one_of(len(sizes))]
        with file.open("r+b") as opened:
            for place in range(min(DAMAGED, sizes[file])):
                opened.seek((attack.one_of(sizes[file]) + place) % sizes[file])
                byte = opened.read(1)
                opened.seek(-1, 1)
                opened.write(bytes([byte[0] ^ 0xFF]))
        return f"killed all; step {int(whole[-1].name)}, {file.relative_to(whole[-1])}"


def last_step(run: Path) -> int:
    """The step of the last whole line of metrics.jsonl; 0 before there is one."""
    metrics = run / "metrics.jsonl"
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - TAIL))
            lines = file.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError):
        return 0


def _inode(run: Path) -> int | None:
    metrics = run / "metrics.jsonl"
    return metrics.stat().st_ino if metrics.exists() else None


def _from(start: Start) -> int | None:
    """After which step it goes on, as it says; None: it has not said."""
    for line in start.said():
        if found := GOES_ON.search(line):
            return int(found[1])
        if NEW.search(line):
            return 0
    return None


def _words(start: Start, inside: Path) -> list[str]:
    """What it said of what was done to it, once; without the folder that all of it is in."""
    told = [line.strip().replace(f"{inside}/", "") for line in start.said() if WORDS.search(line)]
    each = {re.sub(r"^\[rank \d+ of \d+\] ", "", line) for line in told if not line.startswith("traceback")}
    return sorted(line[:240] for line in each)
