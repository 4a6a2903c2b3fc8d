"""What a study file may say: dials, parts, samples, and where its runs go. No torch here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from vqscale.config.text import inline

SEED = "seed"
RESERVED = ("run", SEED, "status", "error", "verdict")  # columns of results.csv that are not a dial's


def named_twice(key: str, names: Iterable[str]) -> Iterable[tuple[str, str]]:
    """(key, message) of each name that several of the entries of a key have."""
    for name, count in Counter(names).items():
        if count > 1:
            yield key, f"{count} {key} are called {name}: give each a name of its own"


@dataclass(frozen=True)
class ChoiceConfig:
    """A position of a dial that changes several keys."""

    label: str
    """its name in tables and figures"""
    set: tuple[str, ...] = ()
    """dotted.key=value, as on the command line of `vqscale train`"""
    sample: tuple[str, ...] = ()
    """options of `vqscale sample` for the runs of this position, after those of samples.options"""
    tokenizer: str | None = None
    """whose ids the runs of this position learn, in place of samples.tokenizer; null: that"""


@dataclass(frozen=True)
class DialConfig:
    """What is varied."""

    name: str
    """its name in tables and figures"""
    key: str | None = None
    """the dotted key that takes `values`"""
    values: tuple[int | float, ...] = ()
    """numbers for `key`"""
    choices: tuple[ChoiceConfig, ...] = ()
    """instead of key and values: positions that each change several keys"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.name in RESERVED:
            yield "name", f"a dial is called {self.name}, as a column of results.csv is: give it another name"
        if not self.values and not self.choices:
            yield "values", f"dial {self.name} has no positions: give key and values, or choices"
        if bool(self.values) != (self.key is not None):
            yield "key", f"dial {self.name} has {len(self.values)} values for key {self.key}: give both or neither"
        if self.values and self.choices:
            yield "choices", f"dial {self.name} has values and choices: give one of them"

    def positions(self) -> list[ChoiceConfig]:
        if self.choices:
            return list(self.choices)
        return [ChoiceConfig(str(value), (f"{self.key}={inline(value)}",)) for value in self.values]


@dataclass(frozen=True)
class PartConfig:
    """Further runs of a study, on a grid of their own: what is not given is as in the study."""

    dials: tuple[DialConfig, ...] = ()
    """dials of the study with other positions; those that are not given keep theirs"""
    set: tuple[str, ...] = ()
    """dotted.key=value for every run of this part, after those of the study"""
    seeds: tuple[int, ...] | None = None
    """run.seed of the repetitions; null: those of the study"""
    processes: int | None = None
    """processes of each run; null: as many as in the study"""


@dataclass(frozen=True)
class SamplesConfig:
    """What the priors of a study draw."""

    tokenizer: str
    """the tokenizer whose ids they learn: a run, one of its checkpoints, or a saved folder"""
    options: tuple[str, ...] = ()
    """of `vqscale sample`, as [--num-images=500, --guidance=2]"""
    classifier: str | None = None
    """folder of the shapes classifier that judges samples; null: nobody does"""


@dataclass(frozen=True)
class MeasuredConfig:
    """What is measured of the tokenizers of a study, beside what their runs say."""

    shards: str
    """held-out shards"""
    options: tuple[str, ...] = ()
    """of `vqscale evaluate tokenizer`, as [--agreement, --swaps, "0.1", "0.3"]"""


@dataclass(frozen=True)
class StudyConfig:
    """Many runs, one question."""

    base: str
    """config of the base run, of any task, relative to this file"""
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
    parts: tuple[PartConfig, ...] = ()
    """more runs, with other positions, seeds or processes, as a size that only some are run at"""
    samples: SamplesConfig | None = None
    """what each prior draws when all runs are done, one after the other on this machine; null: nothing"""
    measured: MeasuredConfig | None = None
    """what is measured of each tokenizer when all runs are done, one after the other on this machine; null: nothing"""
    launcher: str = "local"
    """where the runs go: local is this machine, slurm an array of jobs"""
    launcher_options: tuple[str, ...] = ()
    """for the launcher; with slurm options of sbatch, as [--gpus-per-node=1, --time=02:00:00]"""
    jobs: int = 2
    """runs of `processes` processes side by side on this machine; one with more takes the place of several. How many
    on a cluster is for the cluster to say"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if not self.dials:
            yield "dials", "the study is empty, it has no dials: give at least one, with key and values or choices"
        yield from named_twice("dials", (dial.name for dial in self.dials))
        if not self.seeds:
            yield "seeds", "the study is empty, it has no seeds: give at least [0]"
        for key in ("processes", "jobs"):
            if getattr(self, key) < 1:
                yield key, f"{key} is {getattr(self, key)}: use at least 1"
        for number, part in enumerate(self.parts):
            for key, message in self.problems_of(part):
                yield f"parts.{number}.{key}", message

    def problems_of(self, part: PartConfig) -> Iterable[tuple[str, str]]:
        known = [dial.name for dial in self.dials]
        for dial in part.dials:
            if dial.name not in known:
                yield "dials", f"a part has the dial {dial.name}, and the study's are {', '.join(known)}: use these"
        if part.seeds == ():
            yield "seeds", "a part has no seeds: give at least [0], or leave the key out"
        if part.processes is not None and part.processes < 1:
            yield "processes", f"processes is {part.processes}: use at least 1"

    def grids(self) -> list[StudyConfig]:
        """The study without its parts, and each part as a study that has all that it leaves out."""
        first = replace(self, parts=())
        return [first, *(self.with_part(part) for part in self.parts)]

    def with_part(self, part: PartConfig) -> StudyConfig:
        """A part as a study, which has all that it leaves out."""
        own = {dial.name: dial for dial in part.dials}
        return replace(
            self,
            parts=(),
            dials=tuple(own.get(dial.name, dial) for dial in self.dials),
            set=(*self.set, *part.set),
            seeds=self.seeds if part.seeds is None else part.seeds,
            processes=self.processes if part.processes is None else part.processes,
        )
