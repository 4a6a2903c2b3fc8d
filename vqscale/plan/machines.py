"""What machines do per second, for the cost model (cost.py): achievable numbers, not those of data sheets. No torch.

The GPU entries are estimates from data sheets and common experience (large products reach about three quarters of the
sheet, convolutions about 0.6 of what products do); the H200's copy bandwidth and bf16 product were measured once
(4.3 TB/s, 788 TFLOP/s at 8192^3) and are rounded down. What kernels and library reach of that on the code axis is
assumed, unless a report of `bench gpu` on that card says it. A CPU is measured on the spot by check.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

Kind = Literal["gather", "scatter", "all_reduce"]


@dataclass(frozen=True)
class Wire:
    """A collective's cost on one kind of link: seconds = latency * ceil(log2 ranks) + bytes sent / bytes per second."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, sent: int, ranks: int) -> float:
        return self.latency_s * math.ceil(math.log2(ranks)) + sent / self.bytes_per_s


@dataclass(frozen=True)
class Machine:
    """One process's share of a machine: rates of one GPU (or of one CPU process beside the others)."""

    name: str
    tflops: Mapping[str, float]
    """achievable 1e12 operations per second of large products: fp32, tf32, bf16, and fp8 where there are such"""
    memory_gb_per_s: float
    """achievable bandwidth of reads and writes together, 1e9 bytes per second"""
    memory_gib: float
    exp_per_s: float
    """exponentials per second"""
    inside: Wire
    """one GPU's link to the others of its node"""
    between: Wire
    """one GPU's share of the links to other nodes"""
    per_node: int
    """GPUs of a node"""
    convolutions: float = 0.6
    """what convolutions reach of the rate of products"""
    kernels: float = 0.6
    """what the fused kernels of the code axis reach of it; 0 where there are none"""
    library: float = 1.0
    """what products of blocks that a kernel wrote reach of it"""
    measured: Mapping[Kind, Wire] = field(default_factory=dict)
    """wires by kind of collective where they were measured; they go before inside and between"""

    def wire(self, kind: Kind, ranks: int, stride: int) -> Wire:
        """The link that a collective of `ranks` ranks, every stride-th of the world, goes over.

        Groups of neighbours fill whole nodes, and a ring over nodes uses the links of all its ranks in a node.
        """
        if kind in self.measured:
            return self.measured[kind]
        if ranks * stride <= self.per_node:
            return self.inside
        here = max(1, self.per_node // stride)
        return Wire(self.between.latency_s, min(self.inside.bytes_per_s, self.between.bytes_per_s * here))


_NVLINK4, _NDR = Wire(8e-6, 360e9), Wire(15e-6, 42e9)
_NVLINK3, _HDR = Wire(8e-6, 230e9), Wire(15e-6, 20e9)
_HOPPER = {"fp32": 50.0, "tf32": 370.0, "bf16": 700.0, "fp8": 1400.0}
_AMPERE = {"fp32": 17.0, "tf32": 120.0, "bf16": 240.0}

MACHINES = {
    "h200": Machine("h200", _HOPPER, 4000.0, 139.0, 3.6e12, _NVLINK4, _NDR, 8),
    "h100": Machine("h100", _HOPPER, 2900.0, 79.0, 3.6e12, _NVLINK4, _NDR, 8),
    "a100-80": Machine("a100-80", _AMPERE, 1700.0, 79.0, 2.4e12, _NVLINK3, _HDR, 8),
}


def from_results(name: str, folder: Path | None) -> tuple[Machine, str]:
    """(the machine, where its efficiencies on the code axis come from): the newest report of `bench gpu` on that card
    in the folder that has a step, or what is assumed. ValueError for a report that cannot be read."""
    machine, found = MACHINES[name], sorted(folder.glob("*.json"), key=_age) if folder is not None else []
    for path in reversed(found):
        try:
            report = json.loads(path.read_text())
            card = str(report["machine"].get("gpu", "")).lower()
            timed = "step" in report["parts"] and not report.get("interpreted")
            if timed and all(word in card for word in name.split("-")):
                return measured(machine, report["parts"]["step"]["rows"]), f"measured, {path.name}"
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise ValueError(
                f"{path} is no report of bench gpu that says what a step takes ({type(error).__name__}: {error}): move "
                "it away, or make it anew with bash tools/gpu_check.sh"
            ) from error
    return machine, "assumed"


def _age(path: Path) -> tuple[float, str]:
    return path.stat().st_mtime, path.name


def measured(machine: Machine, rows: Sequence[Mapping[str, Any]]) -> Machine:
    """The machine with what a step reached of its rate of products, from the rows of a report: the library's products
    by those of the floor, the kernels by all else that the step took, elementwise work too."""
    seconds = {row["form"]: float(row["seconds"]) for row in rows if row.get("seconds")}
    tokens, codes, dim = (int(number) for number in rows[0]["case"].split(" x "))
    product = 2e-12 * tokens * codes * dim / machine.tflops["bf16"]
    library = 6 * product / seconds["floor"]
    kernels = 4 * product / (seconds["ours"] - 2 * product / library)
    if not (0 < library <= 1.5 and 0 < kernels <= 1.5):
        raise ValueError(f"{library:.2f} and {kernels:.2f} of the rate of products are none")
    return replace(machine, library=library, kernels=kernels)
