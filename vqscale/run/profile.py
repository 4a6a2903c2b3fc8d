"""A trace of a few training steps, for a person: RUN/profile/rank0.json (Chrome, Perfetto) and RUN/profile/summary.txt.

With run.profile_steps 0 nothing here does anything; else rank 0 traces so many steps after WARMUP steps of this start.
Spans are those of the clock, marked in the trace while it is on: data, forward, backward, step (the engine's),
communication (our collectives) and codes. Not here: times of every logged step (train/watch.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from vqscale.disk import files
from vqscale.parallel.clock import clock
from vqscale.parallel.mesh import Mesh

WARMUP = 3
TOP = 25  # operations in the summary
STEP = "training step"
COLLECTIVES = ("gloo:", "nccl:", "ncclDevKernel", "ncclKernel")

Spans = list[tuple[float, float]]


class Trace:
    """Traces steps between `begin` and `end` of each; writes its files once the last of them is done."""

    def __init__(self, place: Path, steps: int, mesh: Mesh) -> None:
        self._place, self._left = place / "profile", WARMUP + steps
        self._cuda = mesh.device.type == "cuda"
        self._span: AbstractContextManager[Any] | None = None
        self._profile: profile | None = None
        if steps and mesh.world.rank == 0:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
            rhythm = schedule(wait=WARMUP - 1, warmup=1, active=steps, repeat=1)
            self._profile = profile(activities=activities, schedule=rhythm, on_trace_ready=self._write)

    def begin(self) -> None:
        """Before a step, waiting for its data included."""
        if self._profile is None:
            return
        if not clock.marking:
            clock.marking = True
            self._profile.start()
        self._span = record_function(STEP)
        self._span.__enter__()

    def end(self) -> list[str]:
        """After a step; what to say once the files are written."""
        if self._profile is None or self._span is None:
            return []
        if self._cuda:
            torch.cuda.synchronize()
        self._span.__exit__(None, None, None)
        self._span = None
        self._left -= 1
        self._profile.step()
        return [] if self._left else self.close()

    def close(self) -> list[str]:
        """End a trace that is under way, with the steps it has: one that outlives its run takes the process with it."""
        if self._profile is None or not clock.marking:
            return []
        self._profile.stop()
        self._profile, clock.marking = None, False
        if not (self._place / "summary.txt").exists():
            return [f"warning: the run ended before the {WARMUP} steps after which a trace begins: nothing was traced"]
        return [f"profile: {self._place / 'summary.txt'}"]

    def _write(self, traced: profile) -> None:
        self._place.mkdir(parents=True, exist_ok=True)
        traced.export_chrome_trace(str(self._place / "rank0.json"))
        files.write(self._place / "summary.txt", summary(traced, self._cuda))


def summary(traced: profile, cuda: bool) -> str:
    """Where the steps' time went by span, and the operations with the most time of their own."""
    by_name = spans(traced.events() or [], cuda)
    steps = by_name.get(STEP, [])
    total = covered(steps)
    lines = [
        f"{len(steps)} steps of {total / max(len(steps), 1) / 1e3:.2f} ms on rank 0, traced (tracing costs time too)"
    ]
    for name, micros, note in shares(by_name):
        lines.append(
            f"  {name:28}{micros / max(len(steps), 1) / 1e3:>12.2f} ms{micros / max(total, 1e-9):>9.1%}  {note}"
        )
    by = "self_device_time_total" if cuda else "self_cpu_time_total"
    table = traced.key_averages().table(sort_by=by, row_limit=TOP, max_name_column_width=60)
    return "\n".join([*lines, "", f"operations by {by.replace('_', ' ')}", table, ""])


def spans(events: Iterable[Any], cuda: bool) -> dict[str, Spans]:
    """Where each named span lay, in microseconds; on a GPU as its work ran there, where the trace says so."""
    here: dict[str, Spans] = {}
    there: dict[str, Spans] = {}
    for event in events:
        name = "communication" if event.name.startswith(COLLECTIVES) else event.name
        if name in (STEP, "data", "forward", "backward", "step", "codes", "communication"):
            found = there if event.device_type == DeviceType.CUDA else here
            found.setdefault(name, []).append((event.time_range.start, event.time_range.end))
    return {**here, **there} if cuda else here


def shares(by_name: dict[str, Spans]) -> list[tuple[str, float, str]]:
    """(what, microseconds in all steps, remark). The first five add up to the steps; communication is inside them."""
    steps = by_name.get(STEP, [])

    def within(*names: str) -> Spans:
        return overlap(union(span for name in names for span in by_name.get(name, [])), union(steps))

    codes, networks = within("codes"), within("codes", "forward", "backward")
    known = within("data", "codes", "forward", "backward", "step")
    step = covered(known) - covered(within("data", "codes", "forward", "backward"))
    data = covered(within("data", "codes", "forward", "backward")) - covered(networks)
    return [
        ("waiting for data", data, ""),
        ("networks and statistics", covered(networks) - covered(codes), "forward and backward without the code axis"),
        ("code axis", covered(codes), "the clock's span codes, forward and backward"),
        ("engine step", step, "averaging, norm, clipping, optimisers"),
        ("the rest", covered(steps) - covered(known), "losses, upkeep of the codes, logging"),
        ("of it communication", covered(within("communication")), "our collectives, gloo's and NCCL's"),
    ]


def union(found: Iterable[tuple[float, float]]) -> Spans:
    """The same points of time in spans that do not touch."""
    out: Spans = []
    for start, end in sorted(found):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def overlap(one: Spans, other: Spans) -> Spans:
    """Points of time that are in both, each a union."""
    both = [(max(a, c), min(b, d)) for a, b in one for c, d in other]
    return [(start, end) for start, end in both if start < end]


def covered(some: Spans) -> float:
    return sum(end - start for start, end in union(some))
