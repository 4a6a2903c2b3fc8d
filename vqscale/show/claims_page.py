"""The page of claims: what papers say, what was measured here beside it, and the verdict, in one self-contained file;
and the same as a table of Markdown.

A row is plain data; what a verdict follows from is programs/claims/rules.py.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqscale.disk import files
from vqscale.show import page
from vqscale.show.page import Figure, Line

SUMMARY = {
    "claim": "{}", "paper": "{}", "the paper says": "{}", "measured here": "{}", "verdict": "{}", "command": "{}",
}  # fmt: skip
FINDINGS = {
    "compared": "{}", "where": "{}", "ours": "{:.4g}", "beside": "{:.4g}", "judged": "{:.4g}", "from": "{:.4g}",
    "to": "{:.4g}", "level": "{:.4g}", "seeds": "{}", "verdict": "{}", "why": "{}",
}  # fmt: skip
ABOUT = (
    "A row for each comparison: the means of the two sides over seeds, the mean of what is judged (the differences of "
    "runs with the same seed, or the numbers themselves) with its 95 % interval by Student's t, and the level that it "
    "is to lie beyond. Where the level is within the interval, or one seed has none, nothing is decided. The rule was "
    "written before the runs."
)


@dataclass(frozen=True)
class Row:
    """One claim and what came out."""

    name: str
    paper: str
    title: str
    says: str
    measure: str
    verdict: str
    why: str
    ours: str
    """the numbers, in a line"""
    findings: Sequence[Mapping[str, Any]]
    """of FINDINGS"""
    command: str
    made: str
    """seeds and commits"""
    lines: Sequence[Line] = ()
    """the runs it is about"""
    dials: Sequence[str] = ()
    measures: Sequence[str] = ()
    """columns that are drawn"""

    @property
    def told(self) -> str:
        """The verdict, and why if there is more to say."""
        return f"{self.verdict} ({self.why})" if self.why else self.verdict

    @property
    def summary(self) -> dict[str, str]:
        """The row of the table at the top, of SUMMARY."""
        return {
            "claim": self.title,
            "paper": self.paper,
            "the paper says": self.says,
            "measured here": self.ours,
            "verdict": self.told,
            "command": self.command,
        }


def write(path: Path, rows: Sequence[Row], how: Sequence[str]) -> None:
    """Write the page; `how` are texts on how it was made."""
    summary = page.table([row.summary for row in rows], SUMMARY)
    parts = [("All claims", summary), *((row.title, _part(row)) for row in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, page.page("What papers claim, and what came out here", [*parts, ("How", page.blocks(how))]))


def table(rows: Sequence[Row]) -> str:
    """The claims as a table of Markdown, in the order of papers."""
    lines = [
        "| paper | claim | the paper says | measured here | verdict |",
        "|---|---|---|---|---|",
        *(
            f"| {_cell(row.paper)} | {_cell(row.title)} | {_cell(row.says)} | {_cell(row.ours)} | **{row.verdict}**"
            f"{_cell(f': {row.why}' if row.why else '')} |"
            for row in sorted(rows, key=lambda row: row.paper)
        ),
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _part(row: Row) -> str:
    said = {
        row.paper: row.says,
        "Measured here": row.measure,
        "Verdict": row.told,
        "Runs": row.made,
    }
    told = "".join(f"<p><b>{html.escape(name)}</b>: {html.escape(text)}</p>" for name, text in said.items() if text)
    found = page.paragraphs([ABOUT]) + page.table(row.findings, FINDINGS) if row.findings else ""
    return f"{told}{found}{''.join(_figures(row))}{page.blocks([row.command])}"


def _figures(row: Row) -> list[str]:
    drawn = []
    for measure in row.measures:
        png = page.chart(Figure(measure, from_zero=False), row.lines, measure, row.dials)
        if png is not None:
            drawn.append(page.chart_of(png, f"{measure} of the runs of: {row.title}"))
    return drawn
