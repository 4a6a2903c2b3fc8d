"""What `bench gpu` is held against: goals as ratios and bytes of its rows. Imports no torch, measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

STEP_BYTES = 1.5 * 2**30  # beyond tokens and rows, the gradient of the rows included


def judged(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """[{"goal", "most", "found"}]; found is None where it was not measured, of which nothing follows."""
    return [{"goal": goal, "most": most, "found": found} for goal, most, found in _goals(parts)]


def _goals(parts: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    for part, what in (("step", "a step"), ("entropy", "a step with the entropy loss")):
        rows = _forms(parts, part)
        yield f"{what} / its floor of six products", 1.5, _ratio(rows, "ours", "floor")
        yield f"{what} / the dense step", 1 / 8, _ratio(rows, "ours", "dense")
        peak = rows.get("ours", {}).get("peak_bytes")
        yield f"{what}, extra GiB", STEP_BYTES / 2**30, None if peak is None else peak / 2**30
    yield "an exact search / its floor of one product", 2.0, _ratio(_forms(parts, "search"), "ours", "floor")
    cases = dict.fromkeys(row["case"] for row in parts.get("head", {}).get("rows", ()))
    for case in cases or ("2^14 codes", "2^16 codes", "2^18 codes"):
        ratio = _ratio(_forms(parts, "head", case), "bf16", "floor")
        yield f"a head's loss at {case} / its floor of three products", 1.3, ratio


def _forms(parts: Mapping[str, Any], part: str, case: str | None = None) -> dict[str, dict[str, Any]]:
    rows = parts.get(part, {}).get("rows", ())
    return {row["form"]: row for row in rows if "form" in row and case in (None, row["case"])}


def _ratio(rows: Mapping[str, Mapping[str, Any]], one: str, other: str) -> float | None:
    above, below = (rows.get(name, {}).get("seconds") for name in (one, other))
    return None if above is None or below is None else above / below


def text(goals: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each goal: those that are met, those that were not measured, and last what falls short."""
    short = [goal for goal in goals if goal["found"] is not None and goal["found"] > goal["most"]]
    for goal in goals:
        if goal["found"] is not None and goal not in short:
            yield f"met: {_said(goal)}"
    for goal in goals:
        if goal["found"] is None:
            yield f"not measured: {goal['goal']}, at most {goal['most']:.4g}"
    for goal in short:
        yield f"falls short: {_said(goal)}"
    if not short:
        yield "nothing that was measured falls short of its goal"


def _said(goal: Mapping[str, Any]) -> str:
    return f"{goal['goal']}: {goal['found']:.3g}, at most {goal['most']:.4g}"
