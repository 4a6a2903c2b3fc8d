"""What is written of a study, from what there is: results.csv, laws.csv, study.json, figures, page.

results.csv    a line per run: labels of dials, status, numbers
laws.csv       a line per law and curve (vqscale/show/laws.py); none without a dial of numbers
study.json     the command, the commits, the machine, the versions: what made the numbers
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from vqscale import config as configuration
from vqscale.disk import files
from vqscale.plan.prior import counted
from vqscale.programs.studies import launchers
from vqscale.programs.studies import measured as study_measured
from vqscale.programs.studies import samples as study_samples
from vqscale.programs.studies.config import StudyConfig
from vqscale.programs.studies.launchers.base import State
from vqscale.programs.studies.study import Trial, last_row, logged_rows
from vqscale.run import folder as run_folder
from vqscale.run import machine
from vqscale.show import laws, study_page
from vqscale.show.study_page import Results
from vqscale.train.config import PriorRun, Run

Line = dict[str, Any]
OF_LAUNCHING = ("launcher", "launcher_options", "jobs")  # keys of a study that its numbers do not depend on


def report(
    study: StudyConfig, trials: Sequence[Trial], states: Mapping[str, State], command: str, place: Path | None = None
) -> Results:
    """Write all there is into `place`, the study's folder if None; `command` is what runs the study."""
    place = Path(study.folder) if place is None else place
    results = record(study, trials, result_lines(trials, states), command, place)
    study_page.write(place, results)
    return results


def record(study: StudyConfig, trials: Sequence[Trial], lines: Sequence[Line], command: str, place: Path) -> Results:
    """Write the numbers into `place`, and no figures and no page."""
    place.mkdir(parents=True, exist_ok=True)
    card = _card(study, trials, lines, command)
    results = Results(
        title=Path(study.folder).name,
        task=study_page.TASKS[trials[0].config.task],
        lines=lines,
        dials=[dial.name for dial in study.dials],
        folders={trial.name: trial.folder for trial in trials},
        how=[_told(card), configuration.dump(study)],
    )
    files.write(place / "results.csv", table(lines, list(dict.fromkeys(key for line in lines for key in line))))
    if results.fitted:
        files.write(place / "laws.csv", table([each.line for each in results.fitted], list(laws.COLUMNS)))
    files.write_json(place / "study.json", card)
    return results


def states(study: StudyConfig, trials: Sequence[Trial]) -> dict[str, State]:
    """The state of every run that a launcher knows of, or that had failed when results were last written: a launcher of
    this machine forgets that."""
    rows = _written(Path(study.folder))
    failed = {row["run"]: State("failed", row.get("error") or "") for row in rows if row["status"] == "failed"}
    return failed | launchers.states(study, trials)


def _written(place: Path) -> list[dict[str, str]]:
    """The lines of the results in a folder; none where none were written."""
    path = place / "results.csv"
    return list(csv.DictReader(io.StringIO(path.read_text() if path.exists() else "")))


def kept(study: StudyConfig, trials: Sequence[Trial], place: Path) -> dict[str, Line]:
    """{name: line} of the runs that are done in results that were written into `place`; ValueError where these are of
    another study: its numbers are not to stand beside these."""
    if not (rows := _written(place)):
        return {}
    settings, now = (
        {key: value for key, value in config.items() if key not in OF_LAUNCHING}
        for config in (run_folder.read_json(place / "study.json").get("study", {}), configuration.to_dict(study))
    )
    if settings != now:
        keys = ", ".join(key for key in now if settings.get(key) != now[key])
        raise ValueError(
            f"{place} has results of another form of this study, which differs in {keys}: take another --out, or "
            "remove that folder"
        )
    labels = {trial.name: trial.labels for trial in trials}
    done = [row for row in rows if row["status"] == "done" and row["run"] in labels]
    return {row["run"]: {key: _read(key, row[key]) for key in row if row[key]} | labels[row["run"]] for row in done}


def _read(column: str, value: str) -> str | float:
    """A cell of results.csv: a number, if it is one."""
    if column in ("run", "commit"):  # which may look like one
        return value
    try:
        return float(value)
    except ValueError:
        return value


def result_lines(trials: Sequence[Trial], states: Mapping[str, State]) -> list[Line]:
    """Of all runs."""
    return [result_line(trial, states.get(trial.name)) for trial in trials]


def result_line(trial: Trial, state: State | None = None) -> Line:
    """A line of results.csv: labels, status, steps, and the numbers of a run that is done.

    The status of a run that is not is its launcher's; nobody's is waiting, or begun where it has steps. What there is
    of its samples (samples.py), or was measured besides (measured.py), is among the numbers.
    """
    line: Line = {"run": trial.name, **trial.labels, "status": "waiting"}
    summary, row = run_folder.read_json(trial.folder / "summary.json"), last_row(trial.folder)
    if summary:
        summary = study_samples.numbers(trial) | study_measured.numbers(trial) | summary | _of_the_run(trial)
        line |= {"status": "done"} | study_page.result(study_page.TASKS[trial.config.task], summary, row)
    elif state is not None:
        line |= {"status": state.status, "steps": row.get("step", 0)}
        line |= {"error": state.detail} if state.status == "failed" else {}
    elif row:
        line |= {"status": "begun", "steps": row["step"]}
    return line | trial.labels  # a dial may be called like a number


def _of_the_run(trial: Trial) -> Line:
    """What the config and the log say and the summary does not: how many ids a token of a tokenizer has, where that is
    one; the operations of an image, as the plan counts them; and process_s, the seconds of a step times the processes,
    a median over the logged steps of the second half (warm-ups are over there)."""
    tokenizer = getattr(trial.config, "tokenizer", None)
    said: Line = {"ids_per_token": 1} if getattr(getattr(tokenizer, "quantizer", None), "composes", False) else {}
    seconds = [
        row["time/step_s"]
        for row in logged_rows(trial.folder)
        if "time/step_s" in row and 2 * row["step"] > trial.config.run.steps
    ]
    if trial.config.task == "prior":  # of tokenizers the plan counts none
        said |= _operations(trial.folder, json.dumps(study_samples.settings(trial)))
    return said | ({"process_s": trial.processes * statistics.median(seconds)} if seconds else {})


@cache
def _operations(folder: Path, drawn_with: str) -> Line:
    """GFLOP of an image of a prior that is trained, in training and in sampling: with the settings that its samples
    were drawn with, as JSON, or the defaults where it has none."""
    if not (folder / "run.yaml").exists():
        return {}
    config: Run = configuration.load(Run, folder / "run.yaml", written=True)
    assert isinstance(config, PriorRun)
    parts = counted(config, json.loads(drawn_with))
    sums = {kind: sum(n for name, n in parts.items() if name.startswith(kind)) for kind in ("training", "sampling")}
    return {f"{kind}_gflop": n / 1e9 for kind, n in sums.items() if n}


def _card(study: StudyConfig, trials: Sequence[Trial], lines: Sequence[Line], command: str) -> Line:
    done = [trial for trial in trials if trial.done]
    versions = run_folder.read_json(done[0].folder / "code" / "versions.json") if done else {}
    return {
        "command": command,
        "commits of the runs": dict(Counter(line["commit"] for line in lines if "commit" in line)),
        "commit of this report": run_folder.commit(),
        "machine of this report": machine.facts(),
        "versions": versions or run_folder.versions(),
        "runs": dict(Counter(line["status"] for line in lines)),
        "study": configuration.to_dict(study),
    }


def _told(card: Mapping[str, Any]) -> str:
    """The card but for the study's config, a fact a line."""
    told = {key: value for key, value in card.items() if key != "study"}
    return "\n".join(
        f"{key}: {', '.join(f'{name} {fact}' for name, fact in value.items()) if isinstance(value, dict) else value}"
        for key, value in told.items()
    )


def table(lines: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """CSV of these columns; what a line has not is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
