"""What rules make of the results of a study: comparisons (claim_findings.py), and one of four verdicts for a claim.

Dials that a rule leaves open give a comparison for each of their combinations. A claim holds where all comparisons of
all its rules do, does not where none does, and else holds in part; it cannot be tested where a run or a number that it
is about is missing. The peak of falls_after_peak is found in the numbers that are then compared, which makes it look
higher than it is: give it a margin.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from vqscale.programs.claim_config import (
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
from vqscale.programs.claim_findings import IN_PART, UNTESTED, VERDICTS, Finding, UntestedError, judged
from vqscale.programs.study_config import SEED

NO_RUNS = "this form of the study has no such runs"
Line = Mapping[str, Any]  # of results.csv
Runs = Mapping[str, Line]  # by their seed


def judge(claim: ClaimConfig, lines: Sequence[Line], dials: Sequence[str]) -> tuple[str, str, list[Finding]]:
    """(verdict, why, comparisons) of a claim, by the lines of all runs of its study, also of those that are not
    done."""
    findings = [finding for rule in claim.rules for finding in evaluate(rule, lines, dials)]
    found = {finding.verdict for finding in findings}
    told = dict.fromkeys(finding.why for finding in findings if finding.verdict == UNTESTED)
    if UNTESTED in found:
        return UNTESTED, "; ".join(told), findings
    if len(found) == 1:
        return next(iter(found)), findings[0].why if found == {IN_PART} else "", findings
    counts = Counter(finding.verdict for finding in findings)
    parts = ", ".join(f"{counts[verdict]} of {len(findings)} {verdict}" for verdict in VERDICTS if counts[verdict])
    return IN_PART, f"of the comparisons {parts}", findings


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


def _numbers(runs: Runs, measure: str, seeds: Sequence[str]) -> list[float]:
    return [_number(runs[seed], measure) for seed in seeds]


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


def _level(rule: AtLeastConfig | AtMostConfig, lines: Sequence[Line], dials: Sequence[str]) -> list[Finding]:
    sign = 1 if isinstance(rule, AtLeastConfig) else -1
    what = f"{rule.measure} of {_told(rule.of)} at {'least' if sign > 0 else 'most'} {rule.level:g}"

    def made(place: str, runs: Runs) -> Finding:
        values = _numbers(runs, rule.measure, list(runs))
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
        seeds = [seed for seed in runs if seed in parts["than"][place]]
        first = _numbers(runs, rule.measure, seeds)
        second = _numbers(parts["than"][place], beside, seeds)
        if not seeds or (rule.relative and not all(second)):
            raise UntestedError("no seed is common to both" if not seeds else f"{beside} is 0, and no share of it is")
        unit = list(map(abs, second)) if rule.relative else [1.0] * len(seeds)
        values = [(a - b) / size for a, b, size in zip(first, second, unit, strict=True)]
        level = sign * rule.margin if strict else -sign * rule.margin
        found = judged(what, seeds, values, level, sign=sign, strict=strict)
        return replace(found, ours=statistics.fmean(first), others=statistics.fmean(second))

    return _each({place: runs for place, runs in parts["of"].items() if place in parts["than"]}, made, what)


def _above_curve(rule: AboveCurveConfig, lines: Sequence[Line], dials: Sequence[str]) -> list[Finding]:
    sign = 1 if rule.better == "higher" else -1
    what = f"{rule.measure} of {_told(rule.of)} better than {_told(rule.curve)} at equal {rule.over}"
    same = _left(dials, rule.of)

    def made(place: str, runs: Runs) -> Finding:
        here = next(iter(runs.values()))
        beside = [line for line in lines if all(line[dial] == here[dial] for dial in same)]
        others = list(_parts(beside, dials, rule.curve).values())
        seeds = [seed for seed in runs if all(seed in each for each in others)]
        if not seeds or not others:
            raise UntestedError("no seed is common to both" if others else NO_RUNS)
        first, second = _numbers(runs, rule.measure, seeds), []
        for seed in seeds:
            curve = sorted((_number(each[seed], rule.over), _number(each[seed], rule.measure)) for each in others)
            second.append(_between(curve, _number(runs[seed], rule.over), rule.over))
        values = [a - b for a, b in zip(first, second, strict=True)]
        found = judged(what, seeds, values, sign * rule.margin, sign=sign, strict=True)
        return replace(found, ours=statistics.fmean(first), others=statistics.fmean(second))

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
            values = {x: {seed: _number(line, rule.measure) for seed, line in runs[x].items()} for x in positions}
            pairs = list(pairwise(positions)) if rises else [_peak(values, positions, sign)]
            seeds = [[seed for seed in values[one] if seed in values[other]] for one, other in pairs]
            if not all(seeds):
                raise UntestedError("no seed is common to both")
        except UntestedError as error:
            findings.append(Finding(what, UNTESTED, place, str(error)))
            continue
        for (worse, better), common in zip(pairs, seeds, strict=True):
            first, second = ([values[x][seed] for seed in common] for x in (better, worse))
            differences = [a - b for a, b in zip(first, second, strict=True)]
            where = ", ".join(filter(None, [place, f"{rule.over} {better} beside {worse}"]))
            found = judged(what, common, differences, sign * rule.margin, sign=sign, strict=True)
            ours, others = statistics.fmean(first), statistics.fmean(second)
            findings.append(replace(found, where=where, ours=ours, others=others))
    return findings or [Finding(what, UNTESTED, why=NO_RUNS)]


def _peak(values: Mapping[str, Mapping[str, float]], positions: Sequence[str], sign: int) -> tuple[str, str]:
    """(last position, the best one): with the peak at the end their difference is 0, which is no fall."""
    return positions[-1], max(positions, key=lambda x: sign * statistics.fmean(values[x].values()))


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
