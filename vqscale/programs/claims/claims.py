"""Claims of papers: files of them with their studies, and what is said of each when runs are there. No torch here.

    PLACE/claims.json  every claim with its verdict, comparisons, seeds, commits
    PLACE/claims.csv   a line each
    PLACE/claims.md    claim, paper, numbers beside the paper's, verdict
    PLACE/index.html   the page
    PLACE/FILE/        results.csv and study.json of the study of a file

A file of claims is data (config.py): its study runs as any other (studies/study.py), its rules are computed by
rules.py, and what comes before is before.py. The page is of all files that are asked for, whichever of them
have been run. A run that is not done here may be done in PLACE/FILE/results.csv, from another machine or another
day, and then its numbers are taken from there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from vqscale import config as configuration
from vqscale.disk import files
from vqscale.programs.claims import rules as claim_rules
from vqscale.programs.claims.before import Before
from vqscale.programs.claims.config import ClaimConfig, ClaimsConfig, DialedConfig, Measured
from vqscale.programs.claims.rules import Finding
from vqscale.programs.studies import report as study_report
from vqscale.programs.studies import study as studies
from vqscale.programs.studies.config import SEED, StudyConfig
from vqscale.programs.studies.study import Trial
from vqscale.run import checkout, machine
from vqscale.run import folder as run_folder
from vqscale.show import claims_page, study_page
from vqscale.show.claims_page import Row

OF_SIGNALS = {  # what a summary has of each signal
    "images": ("psnr", "ssim"),
    "color": ("psnr", "chroma", "true_chroma"),
    "depth": ("rmse", "abs_rel", "log10", "delta1", "delta2", "delta3"),
    "panoptic": tuple(f"{quality}{of}" for quality in ("pq", "sq", "rq") for of in ("", "_things", "_stuff")),
    "sounds": ("mel", "stft", "si_sdr"),
}
OF_SAMPLES = ("recognised", "recognised_real", "shapes_distance", "shapes_distance_real", "samples_per_s")


@dataclass(frozen=True)
class Asked:
    """A file of claims, and the form of its study that is asked for."""

    path: Path
    config: ClaimsConfig
    study: StudyConfig
    trials: Sequence[Trial]
    quick: bool

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def minutes(self) -> float:
        return self.config.quick_minutes if self.quick else self.config.minutes

    @property
    def dials(self) -> list[str]:
        return [dial.name for dial in self.study.dials]

    def command(self, claim: ClaimConfig) -> str:
        """What runs all that a claim needs."""
        return checkout.command("claims", [str(self.path), "--only", claim.name, *(["--quick"] if self.quick else [])])


def load(path: Path, changes: Iterable[str] = (), quick: bool = False) -> Asked:
    """A file of claims; ValueError for all that is wrong with it, and what its study would refuse."""
    config = configuration.load(ClaimsConfig, path, changes)
    trials = studies.expand(config.study, path)
    problems = [f"{path}: {text}" for claim in config.claims for text in _problems(claim, config.study, trials)]
    if problems:
        raise ValueError("\n".join(problems))
    study = config.quickened() if quick else config.study
    return Asked(path, config, study, studies.expand(study, path) if quick else trials, quick)


def _problems(claim: ClaimConfig, study: StudyConfig, trials: Sequence[Trial]) -> Iterator[str]:
    """What the rules of a claim name and the full study does not have."""
    labels = {dial.name: list(dict.fromkeys(trial.labels[dial.name] for trial in trials)) for dial in study.dials}
    known = measures(study, trials)
    for rule in claim.testable:
        for pair in (pair for side in rule.sides for pair in side):
            dial, _, label = pair.partition("=")
            if dial not in labels:
                there = ", ".join(labels)
                yield f"claim {claim.name} has the dial {dial}, and the study has {there}: use one of these"
            elif label not in labels[dial]:
                there = ", ".join(labels[dial])
                yield f"claim {claim.name} has {pair}, and the positions of {dial} are {there}: use one of these"
        for measure in rule.measures:
            if measure not in known and not any(measure.startswith(begin) for begin in known if begin.endswith("_")):
                yield (
                    f"claim {claim.name} measures {measure}, which is no column of results.csv of this study: use one "
                    f"of {', '.join(known)}"
                )
        if isinstance(rule, DialedConfig) and not _numeric(labels.get(rule.over, [])):
            yield f"claim {claim.name} goes over {rule.over or 'no dial'}, which is no dial of numbers: name one"


def _numeric(labels: Sequence[str]) -> bool:
    try:
        return bool(labels) and all(math.isfinite(float(label)) for label in labels)
    except ValueError:
        return False


def measures(study: StudyConfig, trials: Sequence[Trial]) -> list[str]:
    """Columns of results.csv that this study will have, for its task and what is drawn or measured besides; one that
    ends in _ stands for all that begin so."""
    task = study_page.TASKS[trials[0].config.task]
    signals = sorted({_signal(trial) for trial in trials})
    absent = {*OF_SIGNALS["images"], *(() if study.samples is not None else OF_SAMPLES)}
    known = [name for name in [*task.columns, *task.logged.values(), *task.others] if name not in absent]
    known += [name for signal in signals for name in OF_SIGNALS.get(signal, ())]
    return list(dict.fromkeys([*known, *(task.measured if study.measured is not None else ())]))


def _signal(trial: Trial) -> str:
    """What a run of the task tokenizer is of; "" for others."""
    return str(getattr(getattr(trial.config.tokenizer, "signal", None), "name", ""))


def _lines(asked: Asked, place: Path) -> list[study_report.Line]:
    """How the runs of a file are now, also those that have failed in an earlier command, or are kept in `place`."""
    lines = study_report.result_lines(asked.trials, study_report.states(asked.study, asked.trials))
    kept = study_report.kept(asked.study, asked.trials, place / asked.name)
    return [kept.get(line["run"], line) if line["status"] != "done" else line for line in lines]


def _judged(asked: Asked, lines: Sequence[study_report.Line]) -> list[Row]:
    """What can be said of each claim of a file."""
    missing = "" if all(line["status"] == "done" for line in lines) else Before(asked.config).missing()
    return [_row(asked, claim, lines, missing) for claim in asked.config.claims]


def _row(asked: Asked, claim: ClaimConfig, lines: Sequence[study_report.Line], missing: str) -> Row:
    verdict, why, findings = claim_rules.judge(claim, lines, asked.dials)
    if missing and claim.testable:
        verdict, why, findings = claim_rules.UNTESTED, missing, []
    about = [line for line in lines if any(_is_about(rule, line) for rule in claim.testable)]
    commits = dict(Counter(str(line["commit"]) for line in about if "commit" in line))
    seeds = ", ".join(dict.fromkeys(str(line[SEED]) for line in about))
    return Row(
        claim.name,
        claim.paper,
        claim.title,
        claim.says,
        claim.measure,
        verdict,
        why,
        _numbers(findings),
        [_plain(finding) for finding in findings],
        asked.command(claim),
        f"{len(about)} runs, seeds {seeds}; commits {', '.join(commits) or 'none yet'}" if about else "",
        about,
        asked.dials,
        list(dict.fromkeys(measure for rule in claim.testable for measure in rule.measures)),
    )


def _is_about(rule: Measured, line: study_report.Line) -> bool:
    return any(claim_rules.chosen([line], side) for side in rule.sides)


def _numbers(findings: Sequence[Finding]) -> str:
    """All comparisons in a line."""
    said = []
    for what, group in groupby(findings, lambda finding: finding.what):
        told = [f"{finding.where}: " * bool(finding.where) + _number(finding) for finding in group if finding.seeds]
        said += [f"{what}: {'; '.join(told)}"] if told else []
    return ". ".join(said)


def _number(finding: Finding) -> str:
    beside = f" beside {finding.others:.4g}" if finding.others is not None else ""
    reach = f" [{finding.low:.3g}, {finding.high:.3g}]" if finding.low is not None else ""
    judged = f", {finding.difference:+.3g}" if finding.others is not None else ""
    return f"{finding.ours:.4g}{beside}{judged}{reach}"


def _plain(finding: Finding) -> dict[str, Any]:
    """A finding as a row of the page's table."""
    return {
        "compared": finding.what,
        "where": finding.where,
        "ours": finding.ours,
        "beside": finding.others,
        "judged": finding.difference,
        "from": finding.low,
        "to": finding.high,
        "level": finding.level,
        "seeds": len(finding.seeds) or None,
        "verdict": finding.verdict,
        "why": finding.why,
    }


def report(every: Sequence[Asked], command: str, place: Path) -> list[Row]:
    """Write what there is of all claims into `place`; `command` is what runs them."""
    found = [(asked, _lines(asked, place)) for asked in every]
    rows = [row for asked, lines in found for row in _judged(asked, lines)]
    place.mkdir(parents=True, exist_ok=True)
    for asked, lines in found:
        if any(trial.done for trial in asked.trials):  # of kept ones it would say this machine and these versions
            study_report.record(asked.study, asked.trials, lines, command, place / asked.name)
    card = {
        "command": command,
        "form": "quick" if any(asked.quick for asked in every) else "full",
        "verdicts": dict(Counter(row.verdict for row in rows)),
        "commit of this report": run_folder.commit(),
        "machine of this report": machine.facts(),
        "versions": run_folder.versions(),
    }
    shown = [{key: value for key, value in asdict(replace(row, lines=())).items() if key != "lines"} for row in rows]
    files.write_json(place / "claims.json", {**card, "claims": shown})
    table = [{"name": row.name, **row.summary, "measure": row.measure, "runs": row.made} for row in rows]
    files.write(place / "claims.csv", study_report.table(table, list(table[0])))
    files.write(place / "claims.md", claims_page.table(rows))
    claims_page.write(place / "index.html", rows, ["\n".join(f"{key}: {value}" for key, value in card.items())])
    return rows
