"""What is written of a soak as it goes: a line of JSON per start and per verdict, and both as tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vqscale.disk import files

HEAD = "| training | start | processes | goes on after | what was done, at step | reached | status | lost | said |"
HELD = {"bits": "equal in every bit", "bounds": "held-out scores within their bounds"}


class Report:
    """Of one soak, in its folder; what was written of an earlier one goes."""

    def __init__(self, out: Path, made_by: Mapping[str, Any]) -> None:
        self.out, self.made_by = out, dict(made_by)
        self.starts: list[Mapping[str, Any]] = []
        self.verdicts: list[dict[str, Any]] = []
        (out / "soak.jsonl").unlink(missing_ok=True)

    @property
    def good(self) -> bool:
        return all(not each["differences"] and not each["wrong"] for each in self.verdicts)

    def start(self, record: Mapping[str, Any]) -> None:
        self.starts.append(record)
        files.append(self.out / "soak.jsonl", json.dumps(record))
        print(_line(record), flush=True)
        self._write()

    def verdict(
        self,
        place: str,
        asked: str,
        differences: Sequence[str],
        wrong: Sequence[str],
        scores: Mapping[str, Mapping[str, float]],
    ) -> None:
        """Of a training that has ended: what differs, and what it did that it should not have done."""
        found = {"place": place, "asked": asked, "differences": list(differences), "wrong": list(wrong), **scores}
        self.verdicts.append(found)
        files.append(self.out / "soak.jsonl", json.dumps(found))
        print(f"{place}: {_told(found)}", flush=True)
        self._write()

    def _write(self) -> None:
        files.write_json(self.out / "soak.json", self.made_by | {"verdicts": self.verdicts})
        files.write(self.out / "soak.md", self.text())

    def text(self) -> str:
        """Both tables."""
        lines = ["| training | attacks | starts | steps lost | verdict |", "|---|---|---|---|---|"]
        for each in self.verdicts:
            mine = [record for record in self.starts if record["place"] == each["place"]]
            done, lost = (sum(f(record) for record in mine) for f in (_num_attacks, _lost))
            lines.append(f"| {each['place']} | {done} | {len(mine)} | {lost} | {_told(each)} |")
        lines += ["", HEAD, "|---|---|---|---|---|---|---|---|---|", *map(_line, self.starts)]
        return "\n".join(lines) + "\n"


def _num_attacks(record: Mapping[str, Any]) -> int:
    return len(record["attacks"])


def _lost(record: Mapping[str, Any]) -> int:
    return record["lost"] or 0


def _told(verdict: Mapping[str, Any]) -> str:
    found = [*verdict["differences"], *verdict["wrong"]]
    return _cell("; ".join(found)) if found else HELD[verdict["asked"]]


def _line(record: Mapping[str, Any]) -> str:
    done = "; ".join(f"{each['kind']} ({each['done']}), {each['at']}, {each['moment']}" for each in record["attacks"])
    cells = [record[key] for key in ("place", "start", "processes", "from")]
    cells += [done or "nothing", *(record[key] for key in ("reached", "status", "lost")), " / ".join(record["said"])]
    return f"| {' | '.join(_cell('' if cell is None else str(cell)) for cell in cells)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
