"""Predicted steps as text and as JSON: which split is best, what fits, is the code axis cheap. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vqscale.plan.cost import GIB, Step
from vqscale.plan.machines import Machine

SHARE = 0.10  # of a step: what the code axis may take at most


def best(some: Iterable[Step]) -> Step:
    """The shortest step that fits; where none fits, the one that needs least."""
    fitting = [step for step in some if step.fits]
    return min(fitting, key=lambda s: s.total) if fitting else min(some, key=lambda s: sum(s.memory.values()))


def table(steps: dict[int, list[Step]], every: bool) -> list[str]:
    head = ["GPUs", "data x codes", "GiB", "step ms", "network", "losses", "products", "elementw.", "rows", "optim."]
    head += ["comm codes", "data", "world", "codes %", "MiB codes", "data", "world", "images/s"]
    table = [head]
    for world, some in steps.items():
        for step in some if every else [best(some)]:
            ms = {name.rpartition(": ")[2]: f"{1e3 * value:.2f}" for name, value in step.seconds.items()}
            communication = [f"{1e3 * step.seconds[f'communication: {axis}']:.2f}" for axis in step.sent]
            sent = [f"{value / 2**20:.1f}" for value in step.sent.values()]
            held = f"{sum(step.memory.values()) / GIB:.1f}" + ("" if step.fits else " !")
            rate = world * step.images / step.total
            parts = [ms["network"], ms["losses"], ms["products"], ms["elementwise"], ms["rows"], ms["optimiser"]]
            split = f"{step.grid.data} x {step.grid.codes}"
            share = f"{100 * step.code_axis / step.total:.1f}"
            table.append(
                [
                    str(world),
                    split,
                    held,
                    f"{1e3 * step.total:.1f}",
                    *parts,
                    *communication,
                    share,
                    *sent,
                    f"{rate:.0f}",
                ]
            )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(f"{text:>{width}}" for text, width in zip(row, widths, strict=True)) for row in table]


def advice(steps: dict[int, list[Step]], machine: Machine, leaner: str) -> list[str]:
    out = []
    for world, some in steps.items():
        chosen, smallest = best(some), next((step for step in some if step.fits), None)
        if smallest is None:
            need = sum(chosen.memory.values()) / GIB
            out.append(
                f"{world} GPUs: does not fit: {need:.1f} GiB of {machine.memory_gib:g} on the leanest split; fewer "
                f"images, {leaner}, or more GPUs"
            )
            continue
        out.append(
            f"{world} GPUs: mesh.codes={chosen.grid.codes} (data {chosen.grid.data}); the smallest code axis that fits "
            f"is {smallest.grid.codes}, {1e3 * smallest.total:.1f} ms"
        )
    return out


def answer(codes: int, steps: dict[int, list[Step]], how: str) -> list[str]:
    """Is the code axis within its share of a step?"""
    out = []
    for world, some in steps.items():
        step = best(some)
        share = step.code_axis / step.total
        others = step.total - step.code_axis
        allowed = SHARE / (1 - SHARE) * others
        verdict = "yes" if share <= SHARE else "no"
        out.append(
            f"is the code axis at K = {codes:,} at most {SHARE:.0%} of the step on {world} GPUs? {verdict}: "
            f"{share:.1%}: {1e3 * step.code_axis:.1f} ms, and {1e3 * allowed:.1f} ms would be {SHARE:.0%} "
            f"({how})"
        )
    return out


def plain(step: Step, num_rows: int, images: int) -> dict[str, Any]:
    return {
        "data": step.grid.data,
        "codes": step.grid.codes,
        "images_per_gpu": images,
        "rows": num_rows,
        "seconds": step.seconds,
        "step_s": step.total,
        "code_axis_share": step.code_axis / step.total,
        "memory": step.memory,
        "sent": step.sent,
        "products": step.products,
        "fits": step.fits,
    }
