"""The cost model of one tokenizer training step: operations, memory and seconds, by arithmetic. No torch.

Bytes come from traffic.py, operations of the code axis and of the network from count.py, rates from machines.py.
Seconds are operations over achievable rates, one after the other: nothing overlaps, nobody waits for data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import log
from statistics import NormalDist
from typing import TYPE_CHECKING

from vqscale.engine.config import EngineConfig
from vqscale.plan.machines import Machine
from vqscale.plan.traffic import Grid, Work, candidates, messages, revival, rows, sent

if TYPE_CHECKING:
    from vqscale.plan.count import CodeAxis, Kernel, Network

GIB = 2**30


def products(work: Work, grid: Grid, axis: CodeAxis) -> int:
    """Operations of products on the code axis, per rank: 2 N K D each, B tokens with k rows; the split moves none."""
    each = 2 * work.tokens * grid.codes * rows(work, grid) * work.dim
    return axis.products * each * work.accumulation


def split_bytes(parameters: int, stage: int, world: int, muon: int = 0, frozen: int = 0) -> int:
    """fp32 parameters, gradients and two moments on one rank at a ZeRO stage (0 for the plain engine). `muon` of the
    parameters have one moment; the stages that split moments refuse them. `frozen` ones have neither."""
    learned, part = parameters - frozen, -(-(parameters - frozen) // world)
    moments = part if stage >= 1 else learned
    gradients = part if stage >= 2 else learned
    weights = -(-parameters // world) if stage >= 3 else parameters
    return 4 * (weights + gradients + 2 * moments - muon)


def averaged(engine: EngineConfig, parameters: int, world: int) -> int:
    """Of how many parameters a rank keeps the average: its own where the unrounded ones are divided, or all."""
    divided = engine.name == "deepspeed" and (engine.zero_stage == 3 or (engine.zero_stage > 0 and engine.sends_bf16))
    return -(-parameters // world) if divided else parameters


def memory(work: Work, grid: Grid) -> dict[str, int]:
    """Bytes on one rank, roughly at the worst moment; without the allocator's overhead and libraries."""
    here = rows(work, grid)
    table = 4 * here * work.dim
    learned = work.quantizer != "ema"
    stage = work.zero_stage if work.engine == "deepspeed" else 0
    return {
        "rows": table,
        "gradients of rows (two terms being added)" if learned else "sums of tokens, being added": 2 * table,
        "moments of rows" if learned else "moving averages": (2 if learned else 1) * table,
        "copy of the rows' gradient for the data axis": table if grid.data > 1 else 0,
        "counts and ages": 28 * here,
        "gathered tokens, means and their gradients": 4 * 4 * work.tokens * grid.codes * work.dim,
        "tokens for dead codes": 2 * 4 * candidates(work, grid) * work.dim if work.revive_every else 0,
        "blocks of the scan": work.scan_mib * 2**20,
        "replicated parameters, gradients, moments": split_bytes(work.parameters, stage, grid.world, work.muon),
        "activations": work.images * work.activations,
        "LPIPS, discriminator, average of the weights": work.beside + (table if work.averaged else 0),
    }


@dataclass(frozen=True)
class Step:
    """The prediction for one grid."""

    grid: Grid
    seconds: dict[str, float]
    memory: dict[str, int]
    sent: dict[str, int]
    products: int
    images: int
    """per rank and step"""
    fits: bool

    CODES = ("code axis: products", "code axis: elementwise", "code axis: rows", "communication: codes")

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def code_axis(self) -> float:
        """Seconds of what the clock's span `codes` covers: products, elementwise, rows, and its collectives."""
        return sum(self.seconds[name] for name in self.CODES)


def predict(work: Work, grid: Grid, machine: Machine, axis: CodeAxis, network: Network | None = None) -> Step:
    """One step on one rank of the grid: seconds by part, bytes of memory, bytes sent by axis.

    `axis` is the passes over blocks (count.code_axis).
    """
    axis = on_machine(axis, work, machine)
    every = [*messages(work, grid), *revival(work, grid)]
    bandwidth = machine.memory_gb_per_s * 1e9
    here, group = rows(work, grid), work.tokens * grid.codes
    images = work.images * work.accumulation
    pairs = work.accumulation * group * here
    stage = work.zero_stage if work.engine == "deepspeed" else 0
    dense = work.parameters if stage == 0 else -(-work.parameters // grid.world)
    counted = products(work, grid, axis)
    seconds = {
        "network": images * kernel_seconds(() if network is None else network.kernels, machine, work.precision),
        "losses": images * kernel_seconds(() if network is None else network.loss_kernels, machine, work.precision),
        "code axis: products": counted / (codes_rate(work, machine) * 1e12),
        "code axis: elementwise": pairs * (4 * axis.passes / bandwidth + axis.exponentials / machine.exp_per_s),
        # norms, zeros, two gradients summed: about ten passes over the rows, twelve over the tokens of the group
        "code axis: rows": 4 * work.dim * work.accumulation * (10 * here + 12 * group) / bandwidth,
        # AdamW reads and writes parameter and moments, reads the gradient; norm and clipping pass it thrice. The
        # products of Muon are not in it
        "optimiser": 40 * (dense + here * work.dim) / bandwidth,
    }
    for name in ("codes", "data", "world"):
        seconds[f"communication: {name}"] = sum(
            m.times
            * machine.wire(m.kind, grid.size(name), grid.stride(name)).seconds(m.sent(grid.size(name)), grid.size(name))
            for m in every
            if m.axis == name
        )
    held = memory(work, grid)
    return Step(grid, seconds, held, sent(every, grid), counted, images, fits(held, machine))


def fits(held: Mapping[str, int], machine: Machine) -> bool:
    """Whether a rank holds this, with a tenth left over for the allocator and libraries."""
    return sum(held.values()) <= 0.9 * machine.memory_gib * GIB


def has_kernels(work: Work, machine: Machine) -> bool:
    """The products on the code axis are those of fused GPU kernels: the choice of codes/backend.py."""
    wanted = work.codes_precision in ("medium", "low") or work.quantizer != "ibq"  # a search is exact in any precision
    return wanted and machine.kernels > 0 and work.dim <= 256


def codes_rate(work: Work, machine: Machine) -> float:
    """1e12 operations per second of products on the code axis."""
    if has_kernels(work, machine):
        library = LIBRARY / _waves(work) if work.quantizer == "ibq" else 0.0
        scores = _scores(work) / _waves(work) if work.quantizer == "ibq" and work.codes_precision == "low" else 0.0
        saved = scores * (1 - machine.tflops["bf16"] / machine.tflops.get("fp8", machine.tflops["bf16"]))
        return machine.tflops["bf16"] / ((1 - library - saved) / machine.kernels + library / machine.library)
    logits = 1 / 3 if work.quantizer == "ibq" else 1.0  # of the products: these are float32 whatever is asked for
    return blocks_rate(machine, work.codes_precision, full=logits)


def blocks_rate(machine: Machine, matmul: str, full: float) -> float:
    """1e12 operations per second of plain products in blocks, of which a share is in full float32."""
    other = machine.tflops[{"highest": "fp32", "high": "tf32", "medium": "bf16", "low": "bf16"}[matmul]]
    return 1 / (full / machine.tflops["fp32"] + (1 - full) / other)


LIBRARY = 2  # products of a step that the library does, of blocks that a kernel wrote: for the tokens and for the rows


def _waves(work: Work) -> int:
    """Products of a step of IBQ, by codes/gpu/passes.py: mix 2, mix_backward 4; column_sums and row_means 1 each."""
    return 8 if work.entropy else 6


def _scores(work: Work) -> int:
    """How many of these are scores: one of each operation."""
    return 4 if work.entropy else 2


def on_machine(axis: CodeAxis, work: Work, machine: Machine) -> CodeAxis:
    """What is done per token and code there: `axis`, passes over blocks, or what codes/gpu/passes.py says of itself.

    Tiles never leave the chip, but for the block of gradients of logits: two bytes, half a pass, that are written and
    stay in the cache until two products have read them. Of the entropy's four exponentials per pair, those are left out
    whose tile holds no probability that counts.
    """
    if not has_kernels(work, machine):
        return axis
    if work.quantizer != "ibq":
        return replace(axis, products=1, passes=0, exponentials=0)
    entropy = sum(live_tiles(work.codes, work.entropy_temperature, pairs) for pairs in ENTROPY_TILES)
    return replace(axis, products=_waves(work), passes=0.5, exponentials=2 + (entropy if work.entropy else 0.0))


ENTROPY_TILES = (128 * 64, 128 * 128, 128 * 128, 128 * 64)
"""pairs of the tiles of codes/gpu that make the entropies' probabilities: mix, columns, means, gradient"""


def live_tiles(codes: int, temperature: float, pairs: int) -> float:
    """The share of tiles of so many pairs that hold a probability above 2^-56 at a temperature.

    For independent logits of unit variance, of which the highest of a token is about where the normal distribution
    leaves one of all codes above it. At K = 2^18 and a temperature of 0.01: 16 % of tiles of 128 x 64 and 30 % of
    128 x 128, where 14 % and 26 % were counted.
    """
    normal = NormalDist()
    floor = -normal.inv_cdf(1.0 / max(codes, 2)) - 56 * log(2.0) * temperature
    return 1.0 - normal.cdf(floor) ** pairs


def kernel_seconds(kernels: Iterable[Kernel], machine: Machine, precision: str) -> float:
    """One after the other, each the longer of its operations and its bytes.

    Under bf16 products and convolutions read and write half the bytes; norms and activations stay float32.
    """
    rate, bandwidth = machine.tflops[precision] * 1e12 * machine.convolutions, machine.memory_gb_per_s * 1e9
    half = 2 if precision == "bf16" else 1
    total = 0.0
    for kernel in kernels:
        moved = sum(kernel.sizes) / (half if kernel.operations else 1)
        total += max(kernel.operations / rate, moved / bandwidth)
    return total
