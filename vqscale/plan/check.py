"""`plan.py --check` and `--gpu here`: rates of this machine, and the cost model beside real steps of the code axis.

Everything is measured in one run, with as many processes at once as the step that it is compared with: cores and caches
are shared, so a rate belongs to a number of processes. One thread per process. A step is IBQ's forward and backward
pass with counting, on random tokens whose softmax is flat, so that its blocks are dense; the network is not in it.

Rates, prediction and comparison are in seconds of CPU time of a process (its threads that talk included), which other
work on the machine disturbs least. Seconds of the clock stand beside: they are longer where processes share cores, and
on a machine that does something else.

What a GPU would do is counted where triton is: products, blocks and their bytes of the kernels (interpreted.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from vqscale import quantizers
from vqscale.codes import scan, tally
from vqscale.parallel import ops, spawn
from vqscale.parallel.mesh import Axis, Mesh, world_size
from vqscale.plan import cost, interpreted, traffic
from vqscale.plan.count import KernelCounter, code_axis
from vqscale.plan.machines import Kind, Machine, Wire
from vqscale.plan.traffic import Grid, Work
from vqscale.seed import derive

PROCESSES = (1, 2, 4)
SIZES = ((512, 8192, 64), (512, 32768, 64), (1024, 16384, 128))  # tokens of all processes, codes, dim
SCAN_MIB = 64
ROUNDS = 7
TIMEOUT_S = 1800.0


def _settings(codes: int, dim: int) -> dict[str, Any]:
    return {"name": "ibq", "num_codes": codes, "dim": dim, "init": "normal", "init_scale": dim**-0.5} | {
        "revive_every": 0,
        "scan_mib": SCAN_MIB,
    }


@dataclass(frozen=True)
class Measured:
    """What one process measured while all of them did the same."""

    seconds: dict[str, list[float]]
    """of CPU time, by name of what was run, one per round"""
    clock: list[float]
    """seconds of the clock of the steps"""
    work: dict[str, float]
    """operations, bytes or elements of these runs"""
    sent: int
    """bytes on the code axis in one step"""
    operations: int
    """of products in one step"""


def measure(tokens: int, codes: int, dim: int, rounds: int) -> Measured:
    """What a step depends on and the step itself, in turns, round after round; `tokens` are of this process."""
    torch.set_num_threads(1)
    mesh = Mesh(codes=world_size(), device="cpu")
    runs, work = _rates(tokens * mesh.codes.size, codes, dim)
    more = _wires(mesh.codes, tokens * dim) if mesh.codes.size > 1 else ({}, {})
    runs, work = {**runs, **more[0], "step": _step(tokens, codes, dim, mesh)}, {**work, **more[1]}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    clock: list[float] = []
    with tally.silent():
        with ops.count_bytes() as sent, KernelCounter() as counter:
            runs["step"]()
        for run in runs.values():
            run()
        for _ in range(rounds):
            for name, run in runs.items():
                ops.barrier(mesh.codes)
                start, began = time.process_time(), time.perf_counter()
                run()
                seconds[name].append(time.process_time() - start)
            clock.append(time.perf_counter() - began)  # the step is the last
    return Measured(seconds, clock, work, sent.get("codes", 0), counter.operations)


Runs = dict[str, Callable[[], object]]


def _rates(group: int, codes: int, dim: int) -> tuple[Runs, dict[str, float]]:
    """Products, a sweep, a clamp and powers of two on a block as the scan cuts it; and how much each run does."""
    x_BD, keys_kD = torch.randn(group, dim), torch.randn(codes, dim) * dim**-0.5
    tokens, rows = next(scan.blocks_of(x_BD, codes, SCAN_MIB * 2**20))
    x_bD, keys_rD = x_BD[tokens], keys_kD[rows]
    l_br, dkeys_rD, dx_bD = x_bD @ keys_rD.t(), torch.zeros_like(keys_rD), torch.zeros_like(x_bD)
    top_b = l_br.amax(1) * 1e-6

    def multiply() -> None:
        torch.mm(x_bD, keys_rD.t(), out=l_br)
        dx_bD.addmm_(l_br, keys_rD)
        dkeys_rD.addmm_(l_br.t(), x_bD)

    def sweep() -> None:
        for _ in range(4):
            l_br.sub_(top_b[:, None])

    def power() -> None:
        for _ in range(4):
            l_br.clamp_(-20.0, 0.0).exp2_()

    runs: Runs = {"products": multiply, "sweep": sweep, "power": power}
    pairs = l_br.numel()
    return runs, {"products": 3 * 2 * pairs * dim, "sweep": 4 * 2 * 4 * pairs, "power": 4 * pairs}


def _wires(axis: Axis, numbers: int) -> tuple[Runs, dict[str, float]]:
    """Each kind of collective with a small message and with one of so many numbers per process; bytes that it sends."""
    kinds: dict[Kind, Callable[[Tensor], object]] = {
        "gather": partial(ops.gather, axis=axis),
        "scatter": partial(ops.scatter_sum, axis=axis),
        "all_reduce": partial(ops.sum_over, axis=axis),
    }
    runs: Runs = {}
    work: dict[str, float] = {}
    for kind, collective in kinds.items():
        for name, count in (("small", 64), ("large", max(numbers, 2**14))):
            x = torch.zeros(count * (axis.size if kind == "scatter" else 1))
            runs[f"{kind} {name}"] = partial(collective, x)
            work[f"{kind} {name}"] = traffic.Message("", "codes", kind, 4 * count).sent(axis.size)
    return runs, work


def _step(tokens: int, codes: int, dim: int, mesh: Mesh) -> Callable[[], object]:
    quantizer = quantizers.build(_settings(codes, dim), mesh, seed=0)
    quantizer.train()
    quantizer.begin()
    generator = torch.Generator().manual_seed(derive("check", mesh.codes.rank))
    x_ND = torch.randn(tokens, dim, generator=generator).requires_grad_()

    def run() -> None:
        out = quantizer(x_ND)
        losses = torch.stack(list(out.losses.values())).sum()
        torch.autograd.backward([out.z, losses], [torch.ones_like(out.z) / tokens, None])
        x_ND.grad = None
        for parameter in quantizer.parameters():
            parameter.grad = None

    return run


def measure_all(processes: int, tokens: int, codes: int, dim: int) -> tuple[Machine, dict[str, float], list[Measured]]:
    """(this machine as one of so many processes sees it, median CPU seconds by run, what each process measured).

    A round of a run takes what its busiest process takes.
    """
    found = spawn.run(measure, processes, tokens, codes, dim, ROUNDS, timeout_s=TIMEOUT_S)
    rounds = {name: zip(*(one.seconds[name] for one in found), strict=True) for name in found[0].seconds}
    typical = {name: median(max(each) for each in some) for name, some in rounds.items()}
    work = found[0].work
    product = work["products"] / typical["products"] / 1e12
    sweep = work["sweep"] / typical["sweep"]
    # clamping and exp2 pass the block twice each
    power = max(typical["power"] - 2 * 2 * 4 * work["power"] / sweep, 0.05 * typical["power"])
    wires: dict[Kind, Wire] = {}
    kinds: tuple[Kind, ...] = ("gather", "scatter", "all_reduce")
    for kind in kinds if processes > 1 else ():
        latency = typical[f"{kind} small"]
        rest = max(typical[f"{kind} large"] - latency, 0.05 * latency)
        wires[kind] = Wire(latency / Wire(1.0, 1.0).seconds(0, processes), work[f"{kind} large"] / rest)
    wire = wires.get("all_reduce", Wire(2e-4, 1e9))
    machine = Machine(
        name=f"here, {processes} processes of one thread",
        tflops={"fp32": product, "tf32": product, "bf16": product},
        memory_gb_per_s=sweep / 1e9,
        memory_gib=_memory_gib() / processes,
        exp_per_s=work["power"] / power,
        inside=wire,
        between=wire,
        per_node=1024,
        kernels=0.0,
        measured=wires,
    )
    return machine, typical, found


def calibrate(processes: int) -> Machine:
    """This machine as one of `processes` sees it while all of them work."""
    return measure_all(processes, 512 // processes, 8192, 64)[0]


def _memory_gib() -> float:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("MemTotal")) / 2**20


def compare(processes: int, sizes: Iterable[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """One row per size (tokens, codes, dim): the total of tokens stays, each process has its part of them."""
    out = []
    for total, codes, dim in sizes:
        if total % processes:
            raise ValueError(f"{total} tokens do not divide by {processes} processes: change --tokens or --gpus")
        tokens = total // processes
        machine, typical, measured = measure_all(processes, tokens, codes, dim)
        work, grid = Work(codes, dim, tokens, scan_mib=SCAN_MIB, revive_every=0), Grid(1, processes)
        axis = code_axis(_settings(codes, dim))
        step = cost.predict(work, grid, machine, axis)
        out.append(
            {
                "processes": processes,
                "tokens": total,
                "codes": codes,
                "dim": dim,
                "gflop_predicted": cost.products(work, grid, axis) / 1e9,
                "gflop_counted": max(one.operations for one in measured) / 1e9,
                "bytes_predicted": step.sent["codes"],
                "bytes_counted": max(one.sent for one in measured),
                "seconds_predicted": step.code_axis,
                "seconds_measured": typical["step"],
                "seconds_clock": median(max(each) for each in zip(*(one.clock for one in measured), strict=True)),
                "tflops": machine.tflops["fp32"],
                "memory_gb_per_s": machine.memory_gb_per_s,
                "exp_per_s": machine.exp_per_s,
            }
        )
    return out


def check(sizes: Sequence[tuple[int, int, int]], processes: Iterable[int], as_json: bool = False) -> int:
    """Print the tables; 1 where bytes or operations differ from what was counted, else 0. Times decide nothing."""
    table, kernels = [row for num in processes for row in compare(num, sizes)], interpreted.compare()
    print(json.dumps({"processes": table, "kernels": kernels}, indent=1) if as_json else text(table, kernels))
    exact = all(r["bytes_predicted"] == r["bytes_counted"] for r in table)
    exact &= all(r["gflop_predicted"] == r["gflop_counted"] for r in table)
    return 0 if exact and all(interpreted.agrees(row) for row in kernels) else 1


def text(table: list[dict[str, Any]], kernels: list[dict[str, Any]]) -> str:
    head = ["tokens in all", "K", "D", "processes", "tokens each", "GFLOP each", "counted", "bytes sent", "counted"]
    lines = [[*head, "CPU ms predicted", "measured", "error", "clock ms", "GFLOP/s", "GB/s", "Gexp/s"]]
    for row in sorted(table, key=lambda row: (row["codes"] * row["tokens"], row["processes"])):
        error = row["seconds_predicted"] / row["seconds_measured"] - 1
        sizes = [row["tokens"], row["codes"], row["dim"], row["processes"], row["tokens"] // row["processes"]]
        lines.append(
            [
                *(f"{n:,}" for n in sizes),
                *(f"{row[key]:.4f}" for key in ("gflop_predicted", "gflop_counted")),
                *(f"{row[key]:,}" for key in ("bytes_predicted", "bytes_counted")),
                *(f"{1e3 * row[key]:.1f}" for key in ("seconds_predicted", "seconds_measured")),
                f"{100 * error:+.0f}%",
                f"{1e3 * row['seconds_clock']:.0f}",
                *(f"{n:.1f}" for n in (1e3 * row["tflops"], row["memory_gb_per_s"], row["exp_per_s"] / 1e9)),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines]
    shown.append("")
    shown.append("the tokens of all processes together stay: the work of each (GFLOP) falls as 1 / processes")
    shown += ["", *interpreted.text(kernels)]
    return "\n".join(shown)
