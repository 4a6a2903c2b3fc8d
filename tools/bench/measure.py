"""Seconds, peak extra memory and sent bytes of functions, honestly: interleaved, on every process at the same time.

Peak memory on a CPU is what the kernel counted: the high-water mark of the resident set, reset before the run, minus
the resident set before. Freed memory is handed back to the kernel first, so that no run lives on what another left.
On a GPU it is the allocator's peak minus what was allocated. Inputs are in neither; outputs (gradients) are in both.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from vqscale.codes import products
from vqscale.parallel import ops
from vqscale.parallel.mesh import Axis, Mesh

from .forms import Form, build
from .setting import Setting


@dataclass
class Cost:
    """What one process measured of one form."""

    seconds: list[float]  # one per repeat
    peak_bytes: int | None = None  # None where the kernel does not count
    sent_bytes: int = 0
    same_ids: float | None = None  # of a search: the share of tokens for which it finds what ours finds
    processor: list[float] = field(default_factory=list)  # seconds of the processor, of all threads; where asked for


def measure(setting: Setting) -> dict[str, dict[str, Cost]]:
    """Build the forms and measure all of them: {work: {form: cost}} of this process. The same call on every process.

    Each form runs once by itself (memory, bytes; this is also the warm-up), then the forms take turns for `repeats`
    rounds, so that what else happens on the machine happens to all of them.
    """
    torch.set_num_threads(setting.threads)
    with products.precision("medium" if setting.products == "bf16" else "highest"):
        return _measure(setting)


def _measure(setting: Setting) -> dict[str, dict[str, Cost]]:
    mesh = Mesh(codes=setting.processes, device=setting.device)
    _load_code(setting, mesh)
    forms = build(setting, mesh)
    costs = {work: {name: alone(form, mesh) for name, form in some.items()} for work, some in forms.items()}
    if "search" in forms:
        (ours_N,) = forms["search"]["ours"]()
        for name in forms["search"].keys() & {"dense", "faiss"}:
            costs["search"][name].same_ids = float((forms["search"][name]()[0] == ours_N).double().mean())
    for work, some in forms.items():
        for _ in range(setting.repeats):
            for name, form in some.items():
                costs[work][name].seconds.append(seconds(form, mesh.device, mesh.codes))
    return costs


def peaks(setting: Setting) -> dict[str, int | None]:
    """{form: peak bytes} of one training step of ours and of the dense form if it is in the setting. No time."""
    torch.set_num_threads(setting.threads)
    mesh = Mesh(codes=setting.processes, device=setting.device)
    _load_code(setting, mesh)
    forms = build(setting, mesh)["step"]
    return {name: alone(forms[name], mesh).peak_bytes for name in ("ours", "dense") if name in forms}


def _load_code(setting: Setting, mesh: Mesh) -> None:
    """Run every form on a few tokens: libraries load, threads start, and neither is taken for the memory of a form."""
    small = replace(setting, tokens=8, codes=64, dim=8, dense=setting.works)
    for some in build(small, mesh).values():
        for form in some.values():
            form()


def alone(form: Form, mesh: Mesh) -> Cost:
    """One run: its peak memory and the bytes that it sent."""
    with ops.count_bytes() as sent:
        peak = peak_bytes(form, mesh.device, mesh.codes)
    return Cost([], peak, sum(sent.values()))


def seconds(run: Callable[[], object], device: torch.device, axis: Axis) -> float:
    """The time of one run that all processes of the axis begin together."""
    ops.barrier(axis)
    if device.type == "cuda":
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        first.record()
        run()
        last.record()
        torch.cuda.synchronize(device)
        return first.elapsed_time(last) / 1000.0
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], object], device: torch.device, axis: Axis) -> int | None:
    """The most memory that one run needed beyond what was there before it; None where nobody counts."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _return_free_memory()
    ops.barrier(axis)
    counted = _reset_high_water()
    before = _status_bytes("VmRSS") if counted else 0
    run()
    return max(0, _status_bytes("VmHWM") - before) if counted else None


def _return_free_memory() -> None:
    """Give freed heap back to the kernel, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_high_water() -> bool:
    """Set VmHWM of this process to its resident set; False where there is no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {key}")
