"""A soak: a tokenizer and a prior over its ids, trained once undisturbed and then, round after round, under attack.

    OUT/undisturbed/      tokenizer, cache and prior: made once, and what all rounds are compared with
    OUT/disk/run/         the training under attack, on a small disk of its own
    OUT/logs/             what every start printed
    OUT/soak.jsonl        a line per start, and per training its verdict; soak.md: as tables; soak.json: how made

In even rounds every start has the same number of processes, and a training has to end like the undisturbed one in every
bit. In odd rounds starts have 1, 2 or 4, and the last held-out scores have to agree (compare.BOUNDS).
"""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqscale import config as configuration
from vqscale.config.text import inline
from vqscale.data.config import ShardsConfig
from vqscale.disk import files
from vqscale.disk.owner import own
from vqscale.programs.soak import compare
from vqscale.programs.soak.disk import mounted
from vqscale.programs.soak.report import Report
from vqscale.programs.soak.schedule import schedule
from vqscale.programs.soak.start import Start
from vqscale.programs.soak.training import Training
from vqscale.run import machine
from vqscale.run.folder import RunError
from vqscale.train.config import Run

MOVES = (1, 2, 4)  # processes of the starts of odd rounds
SAVES = 20  # of a training
PATIENCE_S = 600.0


@dataclass(frozen=True)
class Settings:
    """What a soak is asked for; see `vqscale soak --help`."""

    out: Path
    tokenizer: Path
    prior: Path
    minutes: float
    steps: int | None
    attacks: int
    seed: int
    processes: int
    first_round: int


def soak(settings: Settings, made_by: dict[str, Any]) -> bool:
    """Whether every training under attack ended as it should."""
    with own(settings.out, "a soak"):
        began = time.monotonic()
        numbers = {name: value for name, value in vars(settings).items() if not isinstance(value, Path)}
        report = Report(settings.out, made_by | numbers | {"machine": machine.facts()})
        trainings = Undisturbed(settings).trained()
        for number in itertools.count(settings.first_round):
            if number > settings.first_round and time.monotonic() - began > 60 * settings.minutes:
                return report.good
            for name, config in trainings.items():
                _attack(settings, f"round {number} {name}", config, bool(number % 2), report)
    raise AssertionError("rounds are counted without an end")


def _attack(settings: Settings, place: str, config: Run, moves: bool, report: Report) -> None:
    """One training under attack, and its verdict."""
    disk, reference = settings.out / "disk", Path(config.run.folder)
    run, steps = disk / "run", config.run.steps
    file = settings.out / "configs" / f"{place.replace(' ', '-')}.yaml"
    _write(file, config, folder=str(run))
    processes = MOVES if moves else (settings.processes,)
    attacks = schedule(settings.seed, place, settings.attacks, steps, config.run.checkpoint_every, processes)
    with mounted(disk, 3 * _size(reference) + (16 << 20)) as mount:
        training = Training(place, file, run, mount, settings.out / "logs", PATIENCE_S, report.start)
        training.attacked(attacks, settings.processes)
        if training.given_up:
            found = ["it has no end to compare"]
        elif moves:
            found = compare.within(reference, run, compare.BOUNDS)
        else:
            found = compare.bits(reference, run, steps)
        scores = {"undisturbed": compare.scores(reference), "attacked": compare.scores(run)}
        shutil.rmtree(run, ignore_errors=True)
    report.verdict(place, "bounds" if moves else "bits", found, training.wrong, scores)


class Undisturbed:
    """The trainings to which nothing happens. They are not done again for configs with which they are done."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.place = settings, settings.out / "undisturbed"
        (settings.out / "logs").mkdir(parents=True, exist_ok=True)

    def trained(self) -> dict[str, Run]:
        """The configs of a tokenizer, and of a prior over its ids. ValueError where OUT has those of others."""
        tokenizer = self._config("tokenizer", self.settings.tokenizer, [])
        prior = self._config("prior", self.settings.prior, self._caches(tokenizer))
        configs = {"tokenizer": tokenizer, "prior": prior}
        done, stamp = self.place / "done.json", {name: configuration.to_dict(each) for name, each in configs.items()}
        if not done.exists():
            self._start("train", [str(self._file("tokenizer"))], "tokenizer")
            self._encode(tokenizer)
            self._start("train", [str(self._file("prior"))], "prior")
            files.write_json(done, stamp)
        elif json.loads(done.read_text()) != json.loads(json.dumps(stamp)):
            raise ValueError(f"{self.place} was made with other configs or --steps: give another --out, or remove it")
        return configs

    def _config(self, name: str, base: Path, changes: Sequence[str]) -> Run:
        """A config as all rounds have it, but for the folder: every step is logged, and it saves often."""
        asked = configuration.load(Run, base, changes)
        steps = self.settings.steps or asked.run.steps
        often = {"checkpoint_every": max(1, steps // SAVES), "log_every": 1}
        return _write(self._file(name), asked, folder=str(self.place / name), steps=steps, **often)

    def _file(self, name: str) -> Path:
        return self.settings.out / "configs" / f"{name}.yaml"

    def _caches(self, tokenizer: Run) -> list[str]:
        """What the config of the prior says of the tokenizer and its ids."""
        asked = configuration.load(Run, self.settings.prior)
        named = [f"tokenizer={inline(str(self.place / 'tokenizer'))}"] if asked.tokenizer is not None else []
        train, val = (f"data.{split}.path={inline(str(self.place / f'cache-{split}'))}" for split in ("train", "val"))
        return [*named, train, val if tokenizer.data.val is not None else "data.val=null"]

    def _encode(self, tokenizer: Run) -> None:
        for split, source in (("train", tokenizer.data.train), ("val", tokenizer.data.val)):
            if isinstance(source, ShardsConfig):
                shards = [source.shards] if isinstance(source.shards, str) else source.shards
                words = [*map(str, (self.place / "tokenizer", self.place / f"cache-{split}")), "--shards", *shards]
                words += ["--workers", "0", *(["--index-dir", source.index_dir] if source.index_dir else [])]
                self._start("encode", [*words, *(["--views", "flip"] if split == "train" else [])], f"encode-{split}")

    def _start(self, program: str, words: Sequence[str], name: str) -> None:
        start = Start(program, words, self.settings.processes, self.settings.out / "logs" / f"undisturbed-{name}.txt")
        try:
            start.process.wait()
        finally:
            start.kill()
        if start.status:
            raise RunError(f"{program} failed undisturbed, with status {start.status}: {start.log} says why")


def _write(file: Path, config: Run, **changes: Any) -> Run:
    """Write a config with changes of its key `run`; the config."""
    data = configuration.to_dict(config)
    changed: Run = configuration.parse(Run, {**data, "run": data["run"] | changes})
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write(file, configuration.dump(changed))
    return changed


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
