"""The predicted step of a prior on GPUs: what prior.py counts, over what machines do per second.

A transformer's kernels one after the other, each the longer of its operations and its bytes, the backward pass as two
forward ones. The head is plain products of blocks on a GPU: its logits in float32 unless `engine.matmul` is medium or
low, its gradients as that says; between them a block of logits is read and written some PASSES times. As for
tokenizers, nothing overlaps, nobody waits for data, and sampling is not predicted: prior.py counts its operations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vqscale.plan.cost import Step, blocks_rate, fits, kernel_seconds
from vqscale.plan.count import Kernel
from vqscale.plan.machines import Machine
from vqscale.plan.prior import forward_kernels, operations, plan, planned
from vqscale.plan.tokenizer import Costs, planned_mesh
from vqscale.plan.traffic import Grid, grids
from vqscale.train.config.prior import PriorRun

PASSES = 4  # of float32 over a block of logits: written, made exponentials, read by two products. Assumed
AXES = {"codes": "code axis", "data": "rows", "world": "replicated part"}  # by a word of what prior.plan calls it


@dataclass(frozen=True)
class PriorWork:
    """What a training step of one image is made of, whatever the grid."""

    kernels: tuple[Kernel, ...]
    """of a forward pass of all transformers"""
    passes: float
    """of the transformers in a training step"""
    tokens: int
    codes: int
    """rows of the largest table of outputs"""
    pairs: float
    """of a vector and a row that it is scored with, in a training step"""
    operations: dict[str, int]


def work(config: PriorRun) -> PriorWork:
    prior, tables = planned(config, planned_mesh(1, 1))
    nets = config.prior.transformers.values()
    outputs = {name: table.num_codes for name, table in tables.items() if name.endswith("outputs")}
    trained = prior.training_passes()
    return PriorWork(
        tuple(kernel for net in nets for kernel in forward_kernels(net, prior.grid)),
        trained.network,
        config.prior.num_tokens,
        max(outputs.values(), default=0),
        trained.asked * sum(prior.rows_met(name, num_codes) for name, num_codes in outputs.items()),
        operations(prior, tables),
    )


def predict(config: PriorRun, images: int, world: int, machine: Machine, step: PriorWork) -> list[Step]:
    """The step with so many images per GPU and micro-batch, for every split of the world into data x codes."""
    return [_predict(config, images, grid, machine, step) for grid in grids(world)]


def head_seconds(operations: int, matmul: str, machine: Machine) -> float:
    """Of the head's products: a third of them logits, or where these are made twice two of four."""
    return 1e-12 * operations / blocks_rate(machine, matmul, full=0.0 if matmul in ("medium", "low") else 1 / 3)


def _predict(config: PriorRun, images: int, grid: Grid, machine: Machine, step: PriorWork) -> Step:
    costs, times = plan(_on(config, grid, images), grid.world), config.engine.accumulation
    each, bandwidth = images * times, machine.memory_gb_per_s * 1e9
    head = each * step.operations["training: head"]
    products = replace(machine, convolutions=1.0)
    seconds = {
        "network": each * 3 * step.passes * kernel_seconds(step.kernels, products, config.engine.precision),
        "losses": 0.0,
        "code axis: products": head_seconds(head, config.engine.matmul, machine),
        "code axis: elementwise": each * step.pairs * (4 * PASSES / bandwidth + 1 / machine.exp_per_s),
        "code axis: rows": 0.0,
        "optimiser": 2 * _state(costs) / bandwidth,
    }
    sent = {axis: _sent(costs, word) for axis, word in AXES.items()}
    for axis, nbytes in sent.items():
        ranks = grid.size(axis)
        wire = machine.wire("all_reduce", ranks, grid.stride(axis))
        seconds[f"communication: {axis}"] = wire.seconds(nbytes, ranks) if nbytes else 0.0
    return Step(grid, seconds, costs.memory, sent, head, each, fits(costs.memory, machine))


def _on(config: PriorRun, grid: Grid, images: int) -> PriorRun:
    mesh = replace(config.mesh, data=grid.data, codes=grid.codes)
    batch = images * grid.world * config.engine.accumulation
    return replace(config, mesh=mesh, data=replace(config.data, batch=batch))


def _state(costs: Costs) -> int:
    """Bytes of parameters, gradients and moments of a rank: an optimiser's step reads and writes them."""
    return sum(n for name, n in costs.memory.items() if name.startswith(("transformer", "rows")))


def _sent(costs: Costs, word: str) -> int:
    (found,) = (n for name, n in costs.sent.items() if word in name)
    return found
