"""What a run says of its own speed: where the time of steps goes, and how much memory a process had."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from vqscale.codes import tally
from vqscale.parallel import ops
from vqscale.parallel.clock import clock
from vqscale.parallel.mesh import Mesh
from vqscale.run import machine


@dataclass(frozen=True)
class Effort:
    """What images ask of a machine and what it can do, so that a run can say how near it comes."""

    operations: int
    """of products for one image, forward and backward, as plan/ counts them; 0: not counted"""
    peak: float
    """per second, what large products reach on all processes together at the start of the run"""

    def rates(self, images_per_s: float) -> dict[str, float]:
        per_second = images_per_s * self.operations
        return {"operations_per_s": per_second, "peak_share": per_second / self.peak}


class Watch:
    """Where the time of steps goes: the whole, waiting for data, the code axis.

    The clock runs, and statistics of codes are made, on logged steps only.
    """

    def __init__(self, effort: Effort | None = None) -> None:
        self._effort = effort
        self._began = 0.0
        self._logged: dict[str, float] = {}
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        self.shares: list[float] = []
        self._quiet = ExitStack()

    def begin(self, log: bool) -> None:
        clock.on = log
        if not log:
            self._quiet.enter_context(tally.silent())
        self._began = time.perf_counter()

    def end(self, waited: float) -> None:
        seconds = time.perf_counter() - self._began
        self.steps, self.seconds, self.waited = self.steps + 1, self.seconds + seconds, self.waited + waited
        if clock.on:
            codes = clock.take().get("codes", 0.0)
            self._logged = {"step_s": seconds, "code_axis_share": codes / max(seconds - waited, 1e-9)}
            self.shares.append(self._logged["code_axis_share"])
        clock.on = False
        self._quiet.close()

    def logged(self, rates: Mapping[str, float], mesh: Mesh) -> dict[str, float]:
        """Of a logged step, for the log: `rates` of the progress, memory, what the rates are of the machine, and the
        step's own. Collective."""
        held = {"memory_mib": peak_mib(mesh)}
        return {**rates, **held, **self._reached(rates["images_per_s"]), **self._logged}

    def _reached(self, images_per_s: float) -> dict[str, float]:
        if self._effort is None or not self._effort.operations:
            return {}
        return self._effort.rates(images_per_s)

    def summary(self, batch: int) -> dict[str, float]:
        """images_per_s, what it is of the machine, and the medians of shares, of the steps of this start. Evaluation
        and saving do not count."""
        if not self.steps:
            return {}
        share = statistics.median(self.shares) if self.shares else float("nan")
        rate = self.steps * batch / self.seconds
        shares = {"code_axis_share": share, "data_wait": self.waited / self.seconds}
        return {"images_per_s": rate, **self._reached(rate), **shares}


def peak_mib(mesh: Mesh) -> float:
    """The most memory that a process has had at once in this start, of its GPU where it has one, or else of the
    machine; of all ranks the greatest. Collective."""
    cuda = mesh.device.type == "cuda"
    here = torch.cuda.max_memory_allocated(mesh.device) if cuda else machine.peak_bytes()
    return ops.max_over(torch.tensor([here / 2**20], dtype=torch.float64, device=mesh.device), mesh.world).item()
