"""What a file of claims may say: a study, what papers say that it bears on, and the rules by which that is judged. No
torch here, and nothing of a file is run: rules are of the forms below, which rules.py computes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from vqscale.programs.studies.config import PartConfig, StudyConfig, named_twice

Better = Literal["higher", "lower"]
PROGRAMS = ("train", "encode", "cluster", "classifier", "shards")
NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True)
class OneConfig:
    """A number of some runs: of each combination of the dials that `of` leaves open, over the seeds."""

    measure: str
    """a column of the study's results.csv"""
    of: tuple[str, ...] = ()
    """dial=label of the runs that are meant; a dial with several labels is left open among these"""

    @property
    def measures(self) -> tuple[str, ...]:
        return (self.measure,)

    @property
    def sides(self) -> tuple[tuple[str, ...], ...]:
        """The selections of runs that are compared."""
        return (self.of,)


@dataclass(frozen=True)
class AtLeastConfig(OneConfig):
    """The number is at least so much."""

    name: Literal["at_least"] = "at_least"
    """at least a level"""
    level: float = 0.0
    """the least"""


@dataclass(frozen=True)
class AtMostConfig(OneConfig):
    """The number is at most so much."""

    name: Literal["at_most"] = "at_most"
    """at most a level"""
    level: float = 0.0
    """the most"""


@dataclass(frozen=True)
class TwoConfig(OneConfig):
    """A number of some runs beside one of others, or beside another number of the same runs, seed by seed."""

    than: tuple[str, ...] = ()
    """dial=label of the others, of the same dials as `of`"""
    than_measure: str | None = None
    """the column of the others; null: the same"""
    better: Better = "higher"
    """which of two numbers is better"""
    margin: float = 0.0
    """how much, in the unit of the number, or with `relative` as a share of the others'"""
    relative: bool = False
    """the margin is a share"""

    @property
    def measures(self) -> tuple[str, ...]:
        return (self.measure, self.than_measure or self.measure)

    @property
    def sides(self) -> tuple[tuple[str, ...], ...]:
        return (self.of, self.than)

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.margin < 0:
            yield "margin", f"margin is {self.margin}: give 0 or more, `no_worse_than` is what allows for being worse"
        fixed = [sorted({pair.partition("=")[0] for pair in side}) for side in self.sides]
        if fixed[0] != fixed[1]:
            dials = " and ".join(", ".join(names) or "none" for names in fixed)
            yield "than", f"of and than fix the dials {dials}: fix the same ones, so that runs can be paired"
        several = [", ".join(sorted(_several(side))) or "nothing" for side in self.sides]
        if several[0] != several[1]:
            told = f"of is open among {several[0]}, and than among {several[1]}"
            yield "than", f"{told}: give both the same labels, or runs of one are left out that the other has not"
        if self.of == self.than and self.than_measure in (None, self.measure):
            yield "than", "of and than are the same runs and the same number: change one of them"


def _several(side: Iterable[str]) -> set[str]:
    """The pairs of dials that are given more than once."""
    pairs = [(pair.partition("=")[0], pair) for pair in side]
    given = Counter(dial for dial, _ in pairs)
    return {pair for dial, pair in pairs if given[dial] > 1}


@dataclass(frozen=True)
class AboveConfig(TwoConfig):
    """Better than the others by more than the margin."""

    name: Literal["above"] = "above"
    """better by more than a margin"""


@dataclass(frozen=True)
class NoWorseThanConfig(TwoConfig):
    """Worse than the others by the margin at most."""

    name: Literal["no_worse_than"] = "no_worse_than"
    """worse by a margin at most"""


@dataclass(frozen=True)
class BetterConfig(OneConfig):
    """A number that is to be better than another, by more than a margin."""

    better: Better = "higher"
    """which of two numbers is better"""
    margin: float = 0.0
    """by more than so much"""


@dataclass(frozen=True)
class AboveCurveConfig(BetterConfig):
    """Better than other runs at the same value of another number, such as PSNR at equal bits: the others are joined by
    straight lines, seed by seed, and beyond their ends nothing is said."""

    name: Literal["above_curve"] = "above_curve"
    """better than others at the same value of another number"""
    curve: tuple[str, ...] = ()
    """dial=label of the others"""
    over: str = "bits"
    """the column that is to be the same"""

    @property
    def measures(self) -> tuple[str, ...]:
        return (self.measure, self.over)

    @property
    def sides(self) -> tuple[tuple[str, ...], ...]:
        return (self.of, self.curve)


@dataclass(frozen=True)
class DialedConfig(BetterConfig):
    """A number along a dial whose labels are numbers."""

    over: str = ""
    """the dial"""


@dataclass(frozen=True)
class RisesConfig(DialedConfig):
    """Better at each position of the dial than at the one before."""

    name: Literal["rises"] = "rises"
    """better with every position of a dial"""


@dataclass(frozen=True)
class FallsAfterPeakConfig(DialedConfig):
    """Best (by the mean of the seeds) before the last position of the dial, and worse there by more than the margin."""

    name: Literal["falls_after_peak"] = "falls_after_peak"
    """best before the end of a dial, and worse there"""


@dataclass(frozen=True)
class NotHereConfig:
    """Nothing here can say it."""

    name: Literal["not_here"] = "not_here"
    """cannot be tested here"""
    why: str = ""
    """what it would take"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if not self.why.strip():
            yield "why", "a claim that cannot be tested says why: give what it would take"


RuleConfig = (
    AtLeastConfig
    | AtMostConfig
    | AboveConfig
    | NoWorseThanConfig
    | AboveCurveConfig
    | RisesConfig
    | FallsAfterPeakConfig
    | NotHereConfig
)
Measured = OneConfig  # every form but NotHereConfig


@dataclass(frozen=True)
class ClaimConfig:
    """One thing that a paper says, and what would show it here."""

    name: str
    """what --only calls it"""
    paper: str
    """whose claim it is"""
    title: str
    """the claim in a sentence"""
    says: str
    """what the paper says, with its numbers, and on what"""
    measure: str
    """what is measured here, in words"""
    rules: tuple[RuleConfig, ...]
    """all hold: it holds; some: it holds in part (programs/claims/rules.py). Written before a run"""

    @property
    def testable(self) -> list[Measured]:
        """The rules that runs can answer."""
        return [rule for rule in self.rules if not isinstance(rule, NotHereConfig)]

    def problems(self) -> Iterable[tuple[str, str]]:
        if not NAME.fullmatch(self.name):
            yield "name", f"{self.name!r} is no word of a command line: use small letters, digits and dashes"
        if not self.rules:
            yield "rules", f"{self.name} has no rule, so nothing can come out: give one"


@dataclass(frozen=True)
class ClaimsConfig:
    """Claims that share runs."""

    claims: tuple[ClaimConfig, ...]
    """what is asked"""
    study: StudyConfig
    """the runs, as in configs/study"""
    minutes: float
    """of the study and what comes before it, on two cores"""
    quick_minutes: float
    """of --quick"""
    quick: PartConfig = field(default_factory=PartConfig)
    """what --quick changes, which leaves the study's parts out and has a folder of its own"""
    needs: tuple[str, ...] = ()
    """files that are yours to bring; where one is missing, nothing is run, and no claim can be tested"""
    before: tuple[tuple[str, ...], ...] = ()
    """commands that come before the study, as [encode, RUN, OUT, ...]: programs of vqscale, one after the other"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if not self.claims:
            yield "claims", "the file has no claim: give one"
        yield from named_twice("claims", (claim.name for claim in self.claims))
        for number, words in enumerate(self.before):
            if not words or words[0] not in PROGRAMS:
                found = words[0] if words else "nothing"
                yield f"before.{number}", f"{found} is no program that may come before: use {', '.join(PROGRAMS)}"

        for key, message in self.study.problems_of(self.quick):
            yield f"quick.{key}", message

    def quickened(self) -> StudyConfig:
        """The study of --quick."""
        return replace(self.study.with_part(self.quick), folder=f"{self.study.folder}-quick")
