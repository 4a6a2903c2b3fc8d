"""What machines do per second, for the cost model (cost.py): achievable numbers, not those of data sheets. No torch.

The GPU entries are estimates from data sheets and common experience (large products reach about three quarters of the
sheet, convolutions about 0.6 of what products do); the H200's copy bandwidth and bf16 product were measured once
(4.3 TB/s, 788 TFLOP/s at 8192^3) and are rounded down. A CPU is measured on the spot by check.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

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
    """achievable 1e12 operations per second of large products: fp32, tf32, bf16"""
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
_HOPPER = {"fp32": 50.0, "tf32": 370.0, "bf16": 700.0}
_AMPERE = {"fp32": 17.0, "tf32": 120.0, "bf16": 240.0}

MACHINES = {
    "h200": Machine("h200", _HOPPER, 4000.0, 139.0, 3.6e12, _NVLINK4, _NDR, 8),
    "h100": Machine("h100", _HOPPER, 2900.0, 79.0, 3.6e12, _NVLINK4, _NDR, 8),
    "a100-80": Machine("a100-80", _AMPERE, 1700.0, 79.0, 2.4e12, _NVLINK3, _HDR, 8),
}
