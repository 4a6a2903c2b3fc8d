"""What rules make of the results of a study: comparisons (findings.py), and one of four verdicts for a claim.

Dials that a rule leaves open give a comparison for each of their combinations. Of all comparisons of all its rules,

    holds                  all hold
    holds in part          some do
    does not hold here     none does, and some do not
    cannot be tested here  a run or a number that it is about is missing, or nothing is decided

So no verdict for or against a claim rests on one seed. The peak of falls_after_peak is found in the numbers that are
then compared, which makes it look higher than it is: give it a margin.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from vqscale.programs.claims.config import (
    AboveConfig,
    AboveCurveConfig,
    AtLeastConfig,
    AtMostConfig,
    ClaimConfig,
    DialedConfig,
    FallsAfterPeakConfig,
    Measured,
    NotHereConfig,
    NoWorseThanConfig,
    RisesConfig,
    RuleConfig,
    TwoConfig,
)
from vqscale.programs.claims.findings import (
    HOLDS,
    IN_PART,
    NOT_HERE,
    UNDECIDED,
    UNTESTED,
    Finding,
    UntestedError,
    judged,
)
from vqscale.programs.studies.config import SEED

NO_RUNS = "this form of the study has no such runs"
Line = Mapping[str, Any]  # of results.csv
Runs = Mapping[str, Line]  # by their seed
Numbers = Mapping[str, float]  # too


def judge(claim: ClaimConfig, lines: Sequence[Line], dials: Sequence[str]) -> tuple[str, str, list[Finding]]:
    """(verdict, why, comparisons) of a claim, by the lines of all runs of its study, also of those that are not
    done."""
    findings = [finding for rule in claim.rules for finding in evaluate(rule, lines, dials)]
    counts = Counter(finding.verdict for finding in findings)
    told = "; ".join(dict.fromkeys(finding.why for finding in findings if finding.why))
    if counts[UNTESTED]:
        return UNTESTED, _few(dict.fromkeys(each.why for each in findings if each.verdict == UNTESTED)), findings
    if counts[UNDECIDED] == len(findings):
        tend = f"by their means {sum(each.beyond for each in findings)} of {len(findings)} comparisons would hold"
        return UNTESTED, f"not decided: {told}; {tend}", findings
    verdict = NOT_HERE if not counts[HOLDS] else IN_PART if counts[HOLDS] < len(findings) else HOLDS
    parts = [f"{counts[each]} of {len(findings)} {each}" for each in (HOLDS, NOT_HERE, UNDECIDED) if counts[each]]
    why = f"of the comparisons {', '.join(parts)}" if len(parts) > 1 else ""
    return verdict, f"{why} ({told})" if told else why, findings


def _few(reasons: Iterable[str]) -> str:
    first, *others = reasons
    return f"{first}; and {len(others)} more" if len(others) > 1 else "; ".join([first, *others])


def evaluate(rule: RuleConfig, lines: Sequence[Line], dials: Sequence[str]) -> list[Finding]:
    """The comparisons of a rule, at least one."""
    if isinstance(rule, NotHereConfig):
        return [Finding("", UNTESTED, why=rule.why)]
    return next(made for kind, made in FORMS.items() if isinstance(rule, kind))(rule, lines, dials)


def chosen(lines: Sequence[Line], of: Sequence[str]) -> list[Line]:
    """The lines with these labels; a dial that is given several times may have any of its labels."""
    labels: dict[str, set[str]] = {}
    for pair in of:
        dial, _, label = pair.partition("=")
        labels.setdefault(dial, set()).add(label)
    return [line for line in lines if all(str(line[dial]) in wanted for dial, wanted in labels.items())]


def _left(dials: Sequence[str], of: Sequence[str]) -> list[str]:
    """The dials that a selection leaves open."""
    given = Counter(pair.partition("=")[0] for pair in of)
    return [dial for dial in dials if given[dial] != 1]


def _parts(lines: Sequence[Line], dials: Sequence[str], of: Sequence[str]) -> dict[str, dict[str, Line]]:
    """{labels of the dials that `of` leaves open, in words: runs by seed}."""
    found: dict[str, dict[str, Line]] = {}
    for line in chosen(lines, of):
        place = ", ".join(f"{dial} {line[dial]}" for dial in _left(dials, of))
        found.setdefault(place, {})[str(line[SEED])] = line
    return found


def _numbers(runs: Runs, measure: str) -> Numbers:
    return {seed: _number(line, measure) for seed, line in runs.items()}


def _number(line: Line, measure: str) -> float:
    if line["status"] != "done":
        why = f": {line['error']}" if line.get("error") else ""
        raise UntestedError(f"the run {line['run']} is {line['status']}{why}")
    value = line.get(measure)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UntestedError(f"the run {line['run']} has no {measure}")
    return float(value)


def _each(parts: Mapping[str, Runs], made: Callable[[str, Runs], Finding], what: str) -> list[Finding]:
    """A finding for each part, also of those that cannot be tested."""
    if not parts:
        return [Finding(what, UNTESTED, why=NO_RUNS)]
    findings = []
    for place, runs in parts.items():
        try:
            findings.append(replace(made(place, runs), where=place))
        except UntestedError as error:
            findings.append(Finding(what, UNTESTED, place, str(error)))
    return findings


def _told(side: Sequence[str]) -> str:
    return " ".join(pair.partition("=")[2] for pair in side) or "each run"


def _paired(
    what: str,
    first: Numbers,
    second: Numbers,
    level: float,
    *,
    sign: int,
    strict: bool = True,
    relative: bool = False,
) -> Finding:
    """The differences of two sides, of the seeds that both have, or with `relative` as shares of the second."""
    seeds = [seed for seed in first if seed in second]
    if not seeds:
        raise UntestedError("no seed is common to both")
    units = {seed: abs(second[seed]) if relative else 1.0 for seed in seeds}
    if not all(units.values()):
        raise UntestedError("what it is compared with is 0, and no share of it is")
    values = [(first[seed] - second[seed]) / units[seed] for seed in seeds]
    ours, others = (statistics.fmean(side[seed] for seed in seeds) for side in (first, second))
    return replace(judged(what, seeds, values, level, sign=sign, strict=strict), ours=ours, others=others)


def _level(rule: AtLeastConfig | AtMostConfig, lines: Sequence[Line], dials: Sequence[str]) -> list[Finding]:
    sign = 1 if isinstance(rule, AtLeastConfig) else -1
    what = f"{rule.measure} of {_told(rule.of)} at {'least' if sign > 0 else 'most'} {rule.level:g}"

    def made(place: str, runs: Runs) -> Finding:
        values = list(_numbers(runs, rule.measure).values())
        found = judged(what, list(runs), values, rule.level, sign=sign, strict=False)
        return replace(found, ours=found.difference)

    return _each(_parts(lines, dials, rule.of), made, what)


def _two(rule: TwoConfig, lines: Sequence[Line], dials: Sequence[str]) -> list[Finding]:
    sign, strict = 1 if rule.better == "higher" else -1, isinstance(rule, AboveConfig)
    beside = rule.than_measure or rule.measure
    than = _told(rule.than) if rule.than != rule.of else ""
    others = " of ".join(filter(None, [rule.than_measure, than]))
    words = f"{'better' if strict else 'no worse'} than {others}, {rule.better} is better"
    what = f"{rule.measure} of {_told(rule.of)} {words}, margin {rule.margin:g}{' of it' * rule.relative}"
    parts = {"of": _parts(lines, dials, rule.of), "than": _parts(lines, dials, rule.than)}

    def made(place: str, runs: Runs) -> Finding:
        first, second = _numbers(runs, rule.measure), _numbers(parts["than"][place], beside)
        level = rule.margin if strict else -rule.margin
        return _paired(what, first, second, sign * level, sign=sign, strict=strict, relative=rule.relative)

    return _each({place: runs for place, runs in parts["of"].items() if place in parts["than"]}, made, what)


def _above_curve(rule: AboveCurveConfig, lines: Sequence[Line], dials: Sequence[str]) -> list[Finding]:
    sign = 1 if rule.better == "higher" else -1
    what = f"{rule.measure} of {_told(rule.of)} better than {_told(rule.curve)} at equal {rule.over}"
    same = _left(dials, rule.of)

    def made(place: str, runs: Runs) -> Finding:
        here = next(iter(runs.values()))
        beside = [line for line in lines if all(line[dial] == here[dial] for dial in same)]
        others = list(_parts(beside, dials, rule.curve).values())
        if not others:
            raise UntestedError(NO_RUNS)
        second = {}
        for seed in (seed for seed in runs if all(seed in each for each in others)):
            curve = sorted((_number(each[seed], rule.over), _number(each[seed], rule.measure)) for each in others)
            second[seed] = _between(curve, _number(runs[seed], rule.over), rule.over)
        return _paired(what, _numbers(runs, rule.measure), second, sign * rule.margin, sign=sign)

    return _each(_parts(lines, dials, rule.of), made, what)


def _between(curve: Sequence[tuple[float, float]], x: float, name: str) -> float:
    """y at x on straight lines between points in order of x; UntestedError beyond their ends."""
    if not curve[0][0] <= x <= curve[-1][0]:
        raise UntestedError(f"{name} is {x:.3g}, and that of the others from {curve[0][0]:.3g} to {curve[-1][0]:.3g}")
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= x <= x1:
            return y0 if x0 == x1 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return curve[0][1]


def _along(rule: DialedConfig, lines: Sequence[Line], dials: Sequence[str]) -> list[Finding]:
    sign = 1 if rule.better == "higher" else -1
    rises = isinstance(rule, RisesConfig)
    words = f"better with every {rule.over}" if rises else f"best before the last {rule.over}, and worse there"
    what = f"{rule.measure} of {_told(rule.of)} {words}, {rule.better} is better"
    left = [dial for dial in dials if dial != rule.over]
    findings = []
    for place, runs in _grouped(lines, left, rule).items():
        positions = sorted(runs, key=float)
        try:
            if len(positions) < 2:
                raise UntestedError(f"{rule.over} has one position in this form of the study")
            values = {x: _numbers(runs[x], rule.measure) for x in positions}
            for worse, better in pairwise(positions) if rises else [_peak(values, positions, sign)]:
                found = _paired(what, values[better], values[worse], sign * rule.margin, sign=sign)
                where = ", ".join(filter(None, [place, f"{rule.over} {better} beside {worse}"]))
                findings.append(replace(found, where=where))
        except UntestedError as error:
            findings.append(Finding(what, UNTESTED, place, str(error)))
    return findings or [Finding(what, UNTESTED, why=NO_RUNS)]


def _peak(values: Mapping[str, Numbers], positions: Sequence[str], sign: int) -> tuple[str, str]:
    """(last position, the best one before it)."""
    return positions[-1], max(positions[:-1], key=lambda x: sign * statistics.fmean(values[x].values()))


def _grouped(lines: Sequence[Line], others: Sequence[str], rule: DialedConfig) -> dict[str, dict[str, dict[str, Line]]]:
    """{labels of the other dials that are open, in words: {position of the dial: runs by seed}}."""
    found: dict[str, dict[str, dict[str, Line]]] = {}
    for x in dict.fromkeys(str(line[rule.over]) for line in lines):
        there = [line for line in lines if str(line[rule.over]) == x]
        for place, runs in _parts(there, others, rule.of).items():
            found.setdefault(place, {})[x] = runs
    return found


FORMS: dict[type[Measured], Callable[[Any, Sequence[Line], Sequence[str]], list[Finding]]] = {
    AtLeastConfig: _level,
    AtMostConfig: _level,
    AboveConfig: _two,
    NoWorseThanConfig: _two,
    AboveCurveConfig: _above_curve,
    RisesConfig: _along,
    FallsAfterPeakConfig: _along,
}
