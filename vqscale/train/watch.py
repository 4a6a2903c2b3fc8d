"""What a run says of its own speed: where the time of steps goes, and how much memory a process had."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack

import torch

from vqscale.codes import tally
from vqscale.parallel import ops
from vqscale.parallel.clock import clock
from vqscale.parallel.mesh import Mesh
from vqscale.run import machine


class Watch:
    """Where the time of steps goes: the whole, waiting for data, the code axis.

    The clock runs, and statistics of codes are made, on logged steps only.
    """

    def __init__(self) -> None:
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

    def logged(self) -> dict[str, float]:
        return self._logged

    def summary(self, batch: int) -> dict[str, float]:
        """images_per_s, and the medians of shares, of the steps of this start. Evaluation and saving do not count."""
        if not self.steps:
            return {}
        share = statistics.median(self.shares) if self.shares else float("nan")
        rate = self.steps * batch / self.seconds
        return {"images_per_s": rate, "code_axis_share": share, "data_wait": self.waited / self.seconds}


def peak_mib(mesh: Mesh) -> float:
    """The most memory that a process has had at once in this start, of its GPU where it has one, or else of the
    machine; of all ranks the greatest. Collective."""
    cuda = mesh.device.type == "cuda"
    here = torch.cuda.max_memory_allocated(mesh.device) if cuda else machine.peak_bytes()
    return ops.max_over(torch.tensor([here / 2**20], dtype=torch.float64, device=mesh.device), mesh.world).item()
