"""What machine this is, for those who read the numbers that were measured on it."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_bytes() -> int:
    """The most memory that this process has had at once, of a machine's and not of a GPU's."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def facts() -> dict[str, Any]:
    """{"cpu": its name, "cores": cores()}"""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": models[0] if models else platform.processor() or platform.machine(), "cores": cores()}


def product_rate(device: torch.device | str, precision: str) -> float:
    """Operations per second of a large product here, bf16 or fp32, the best of a few: what the rate of a run is beside.
    About a twentieth of a second on a CPU, less on a GPU."""
    import torch

    cuda = torch.device(device).type == "cuda"
    side = 4096 if cuda else 512
    x = torch.ones(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        x @ x
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds)
