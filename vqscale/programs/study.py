"""A study: one base run, one to three dials, every combination a plain YAML and a run of its own. No torch here.

    FOLDER/study.yaml     what was asked for            FOLDER/configs/NAME.yaml   each run, readable in one file
    FOLDER/runs/NAME/     the run folders               FOLDER/logs/NAME.txt       what they printed
    FOLDER/results.csv    a line per run                FOLDER/index.html          the page

A study continues where it was left: runs that are done are not started again, the others resume from their checkpoints.
The expansion and the results are here; how a run is started is a Launcher, and what the page looks like is in
vqscale/show/page.py.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqscale import config as configuration
from vqscale.disk import files
from vqscale.train.config import TokenizerRun


@dataclass(frozen=True)
class ChoiceConfig:
    """A position of a dial that changes several keys."""

    label: str
    """its name in tables and figures"""
    set: tuple[str, ...] = ()
    """dotted.key=value, as on the command line of launch/train.py"""


@dataclass(frozen=True)
class DialConfig:
    """What is varied."""

    name: str
    """its name in tables and figures"""
    key: str | None = None
    """the dotted key that takes `values`"""
    values: tuple[int, ...] = ()
    """numbers for `key`"""
    choices: tuple[ChoiceConfig, ...] = ()
    """instead of key and values: positions that each change several keys"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if not self.values and not self.choices:
            yield "values", f"dial {self.name} has no positions: give key and values, or choices"
        if bool(self.values) != (self.key is not None):
            yield "key", f"dial {self.name} has {len(self.values)} values for key {self.key}: give both or neither"
        if self.values and self.choices:
            yield "choices", f"dial {self.name} has values and choices: give one of them"

    def positions(self) -> list[tuple[str, tuple[str, ...]]]:
        """(label, overrides) of each position."""
        if self.choices:
            return [(choice.label, choice.set) for choice in self.choices]
        return [(str(value), (f"{self.key}={value}",)) for value in self.values]


@dataclass(frozen=True)
class StudyConfig:
    """Many runs, one question."""

    base: str
    """config of the base run, relative to this file"""
    folder: str
    """where everything of the study goes"""
    dials: tuple[DialConfig, ...]
    """what is varied; every combination is a run"""
    set: tuple[str, ...] = ()
    """dotted.key=value for every run"""
    seeds: tuple[int, ...] = (0,)
    """run.seed of the repetitions; figures show their spread"""
    processes: int = 1
    """processes of each run"""
    jobs: int = 2
    """runs side by side"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if not self.dials:
            yield "dials", "the study is empty, it has no dials: give at least one, with key and values or choices"
        if not self.seeds:
            yield "seeds", "the study is empty, it has no seeds: give at least [0]"
        for key in ("processes", "jobs"):
            if getattr(self, key) < 1:
                yield key, f"{key} is {getattr(self, key)}: use at least 1"


@dataclass(frozen=True)
class Member:
    """One run of a study."""

    name: str
    labels: dict[str, str]
    config: TokenizerRun

    def file(self, study: StudyConfig) -> Path:
        return Path(study.folder) / "configs" / f"{self.name}.yaml"

    def log(self, study: StudyConfig) -> Path:
        return Path(study.folder) / "logs" / f"{self.name}.txt"

    @property
    def folder(self) -> Path:
        return Path(self.config.run.folder)


def expand(study: StudyConfig, path: Path) -> list[Member]:
    """The runs of a study, in the order of its dials; ConfigError names what a dial has wrong, for all of them."""
    base = path.parent / study.base
    members, problems = [], list[str]()
    positions = [dial.positions() for dial in study.dials] + [
        [(str(seed), (f"run.seed={seed}",)) for seed in study.seeds]
    ]
    names = [dial.name for dial in study.dials] + ["seed"]
    for combination in itertools.product(*positions):
        labels = dict(zip(names, (label for label, _ in combination), strict=True))
        name = "-".join(label if dial != "seed" else f"seed{label}" for dial, label in labels.items())
        name = "".join(sign if sign.isalnum() or sign in "-_." else "_" for sign in name)
        overrides = [*study.set, *(line for _, lines in combination for line in lines)]
        overrides.append(f"run.folder={Path(study.folder) / 'runs' / name}")
        try:
            config: TokenizerRun = configuration.load(TokenizerRun, base, overrides)
            config.check_world(study.processes)
        except ValueError as error:
            problems.append(f"{path}: {name} ({', '.join(f'{k} {v}' for k, v in labels.items())}): {error}")
            continue
        members.append(Member(name, labels, config))
    if problems:
        raise ValueError("\n".join(problems))
    doubles = {member.name for member in members if sum(other.name == member.name for other in members) > 1}
    if doubles:
        raise ValueError(
            f"{path}: several runs would be called {', '.join(sorted(doubles))}: give their labels other names"
        )
    return members


def settle(study: StudyConfig, members: Iterable[Member]) -> None:
    """Write study.yaml and the configs; ValueError, and nothing written, when the folder holds another study's runs."""
    place = Path(study.folder)
    for member in members:
        file = member.file(study)
        if not file.exists():
            continue
        old: TokenizerRun = configuration.load(TokenizerRun, file)
        changed = configuration.differences(configuration.to_dict(old), configuration.to_dict(member.config))
        if changed:
            raise ValueError(
                f"{place} holds results of another base config, {file} differs:\n  "
                + "\n  ".join(changed)
                + "\nchange the study's folder, or set these keys back to go on with it"
            )
    for folder in ("configs", "logs", "runs"):
        (place / folder).mkdir(parents=True, exist_ok=True)
    files.write(place / "study.yaml", configuration.dump(study))
    for member in members:
        files.write(member.file(study), configuration.dump(member.config))


def outcome(member: Member, failure: str = "") -> dict[str, Any]:
    """A line of results.csv: labels, status (done, failed, waiting), and the numbers of a run that is done."""
    line: dict[str, Any] = {"run": member.name, **member.labels, "status": "waiting"}
    summary, last = _json(member.folder / "summary.json"), last_row(member.folder)
    if summary:
        kept = {name: last[name] for name in KEPT if name in last}
        line |= {"status": "done", **summary, **kept, **member.labels}  # a dial may be called like a key of the summary
        line["verdict"] = verdict(line)
    elif failure:
        line |= {"status": "failed", "error": failure}
    return line


KEPT = ("loss", "codes/saturation", "codes/code_norm", "codes/latent_norm")
COLLAPSED_USAGE, COLLAPSED_PERPLEXITY = 0.5, 0.1


def verdict(line: Mapping[str, Any]) -> str:
    """Whether the codes are in use on held-out images, and when not, what was measured of the reasons."""
    usage, perplexity, codes = line.get("usage"), line.get("perplexity"), line.get("num_codes")
    if usage is None or perplexity is None or not codes:
        return ""
    if usage >= COLLAPSED_USAGE and perplexity >= COLLAPSED_PERPLEXITY * codes:
        return "in use"
    measured = [f"{key.rpartition('/')[2]} {line[key]:.3g}" for key in KEPT[1:] if line.get(key) is not None]
    return f"collapsed: usage {usage:.0%}, perplexity {perplexity:.0f} of {codes}; {', '.join(measured)}"


def last_row(folder: Path) -> dict[str, Any]:
    """The last row of training numbers in a run's metrics.jsonl; {} before there is one."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = (json.loads(line) for line in reversed(lines) if line.endswith("}"))
    return next((row for row in rows if "loss" in row), {})


def _json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def write_results(study: StudyConfig, lines: list[dict[str, Any]]) -> Path:
    """results.csv, a line per run, with every column that any run has."""
    path = Path(study.folder) / "results.csv"
    columns = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(lines)
    files.write(path, text.getvalue())
    return path
