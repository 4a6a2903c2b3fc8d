"""What a rank sends in one tokenizer training step, by operation: the arithmetic of ops.count_bytes. No torch.

N tokens of D numbers per rank and micro-batch, B = N M tokens of a code group, k rows of this rank, P replicated
parameters, W = R M ranks (data R x codes M). A gather or a scatter sends its part (M - 1) times, an all-reduce
2 (M - 1) / M of the whole; fp32 numbers have 4 bytes, ids and counts 8.

    axis    operation                            collective            bytes of the part or the whole
    codes   tokens                               gather                4 N D
            best score, best id                  all-reduce            4 B, 8 B         8 B, 8 B without a softmax
            ids, to be counted                   gather                8 N
            softmax: sum and excess              all-reduce            8 B              ibq
            mean rows and chosen rows            scatter               8 N D            ibq
            their gradients, a shift             gather                8 N D + 4 N      ibq
            gradient of the tokens               scatter               4 N D            ibq
            entropies' softmax: sum and excess   all-reduce            8 B              entropy
            gradient of the entropies            (with the gradients)  4 N              entropy
            means of the columns' gradient       all-reduce            4 B              entropy
            entropy of the mean, its gradient    all-reduce            4, 4             entropy
            ids, to be looked up; rows back      gather, scatter       8 N, 4 N D       vq, ema
            gradient of the rows looked up       gather                4 N D            vq
            sums of tokens for averages          gather, gather        8 N, 4 N D       ema
            sum of their counts                  all-reduce            4                ema; once a step
            statistics, on logged steps          all-reduce            24, 4
    data    counts                               all-reduce            8 k
            mean probability, its gradient       all-reduce            4 k, 4 k         entropy
            gradient of the rows                 all-reduce            4 k D            ibq, vq; once a step
            sums of tokens for averages          all-reduce            4 k D            ema
    world   gradients of the network             by engine and stage   4 P, 2 P in bf16
            parameters of the network            gather at stages 1-3  4 P, less 2 for what autocast rounds
            norm, agreement                      all-reduce            8, 16            once a step
    every revive_every steps how many codes are dead: all-reduce 8 on the codes axis; if any, Q = min(candidates, dead):
    gather 8 Q and 8 N, scatter 4 N on the codes axis; gather 8 min(Q, N) twice, all-reduce 4 Q D on the world
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from vqscale.engine.config import EngineConfig
from vqscale.plan.machines import Kind

KNOWN = ("ibq", "vq", "ema")
REUSED = 500_000_000  # numbers: half of DeepSpeed's max_reuse_distance, to the end of the forward pass and back


@dataclass(frozen=True)
class Work:
    """What one step of one rank is made of, whatever the grid."""

    codes: int
    dim: int
    tokens: int
    """per rank and micro-batch"""
    quantizer: str = "ibq"
    entropy: bool = False
    accumulation: int = 1
    parameters: int = 0
    """replicated and trained: encoder, decoder, 1x1 convolutions"""
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    zero_stage: int = 1
    communication: Literal["fp32", "bf16"] = "fp32"
    """of messages about the parameters"""
    rounded: int = 0
    """of the parameters: numbers that bf16 messages have rounded (engine/rounded.py)"""
    scan_mib: int = 64
    revive_every: int = 1
    revive_most: int | None = None
    images: int = 0
    """per rank and micro-batch; 0 is a step without a network"""
    activations: int = 0
    """bytes that autograd keeps for one image, of the network, LPIPS and the discriminator"""
    beside: int = 0
    """bytes of LPIPS and the discriminator, and of the average of the replicated weights"""
    muon: int = 0
    """of the parameters: numbers in matrices that Muon steps, which have one moment"""
    averaged: bool = False
    """there is an average of the weights, and so of the rows"""
    precision: Literal["fp32", "bf16"] = "bf16"
    """of the network"""
    codes_precision: Literal["highest", "high", "medium", "low"] = "highest"
    """of float32 products: engine.matmul"""
    entropy_temperature: float = 0.01
    """of the softmax of the entropies, where there are any"""


@dataclass(frozen=True)
class Grid:
    data: int
    codes: int

    @property
    def world(self) -> int:
        return self.data * self.codes

    def size(self, axis: str) -> int:
        return {"codes": self.codes, "data": self.data, "world": self.world}[axis]

    def stride(self, axis: str) -> int:
        """How far neighbours on the axis lie apart in the world."""
        return self.codes if axis == "data" else 1


def grids(world: int) -> list[Grid]:
    """Every split of a world into data x codes with codes a power of two."""
    out, size = [], 1
    while size <= world:
        if world % size == 0:
            out.append(Grid(world // size, size))
        size *= 2
    return out


@dataclass(frozen=True)
class Message:
    """One collective. `part` is bytes: what a rank gives to a gather or gets of a scatter; all of an all-reduce."""

    what: str
    axis: Literal["codes", "data", "world"]
    kind: Kind
    part: int
    times: float = 1

    def sent(self, ranks: int) -> int:
        """Bytes that one rank sends, once, as a ring does (the formulas of ops.count_bytes)."""
        return 2 * (ranks - 1) * self.part // ranks if self.kind == "all_reduce" else (ranks - 1) * self.part


def rows(work: Work, grid: Grid, rank: int | None = None) -> int:
    """Rows of a rank of the code group; of the last, which has no fewer than any other, when none is given."""
    rank = grid.codes - 1 if rank is None else rank
    return work.codes * (rank + 1) // grid.codes - work.codes * rank // grid.codes


def messages(work: Work, grid: Grid, *, rank: int | None = None, logged: bool = False) -> Iterator[Message]:
    """The collectives of one step after the warm-up, without a revival; `rank` is the place in the code group."""
    for part in (*_codes(work, grid, logged), *_data(work, rows(work, grid, rank)), *_world(work, grid)):
        if grid.size(part.axis) > 1:
            yield part


def _codes(work: Work, grid: Grid, logged: bool) -> Iterator[Message]:
    num, all_tokens, often = work.tokens, work.tokens * grid.codes, work.accumulation
    vectors = 4 * num * work.dim

    def message(what: str, kind: Kind, part: int) -> Message:
        return Message(what, "codes", kind, part, often)

    yield message("tokens", "gather", vectors)
    yield message("best score", "all_reduce", (4 if work.quantizer == "ibq" else 8) * all_tokens)
    yield message("best id", "all_reduce", 8 * all_tokens)
    yield message("ids, to be counted", "gather", 8 * num)
    if work.quantizer == "ibq":
        yield message("softmax: sum and excess", "all_reduce", 8 * all_tokens)
        yield message("mean rows and chosen rows", "scatter", 2 * vectors)
        yield message("their gradients, a shift", "gather", 2 * vectors + 4 * num * (2 if work.entropy else 1))
        yield message("gradient of the tokens", "scatter", vectors)
    else:
        yield message("ids, to be looked up", "gather", 8 * num)
        yield message("rows looked up", "scatter", vectors)
    if work.quantizer == "vq":
        yield message("gradient of the rows looked up", "gather", vectors)
    if work.quantizer == "ema":
        yield message("ids, for sums", "gather", 8 * num)
        yield message("tokens, for sums", "gather", vectors)
        yield Message("sum of the counts", "codes", "all_reduce", 4)
    if work.entropy:
        yield message("entropies' softmax: sum and excess", "all_reduce", 8 * all_tokens)
        yield message("means of the columns' gradient", "all_reduce", 4 * all_tokens)
        yield message("entropy of the mean", "all_reduce", 4)
        yield message("its gradient", "all_reduce", 4)
    if logged:
        yield message("statistics: usage", "all_reduce", 24)
        yield message("statistics: norm of the rows", "all_reduce", 4)


def _data(work: Work, here: int) -> Iterator[Message]:
    often = work.accumulation
    yield Message("counts", "data", "all_reduce", 8 * here, often)
    if work.entropy:
        yield Message("mean probability", "data", "all_reduce", 4 * here, often)
        yield Message("its gradient", "data", "all_reduce", 4 * here, often)
    if work.quantizer == "ema":
        yield Message("sums of tokens", "data", "all_reduce", 4 * here * work.dim, often)
    else:
        yield Message("gradient of the rows", "data", "all_reduce", 4 * here * work.dim)


def _world(work: Work, grid: Grid) -> Iterator[Message]:
    if work.parameters:
        yield from _network(work, grid.world)
    for what, nbytes in (("norm of the gradient", 8), ("agreement to stop, and on what is saved", 16)):
        yield Message(what, "world", "all_reduce", nbytes)


def _network(work: Work, world: int) -> Iterator[Message]:
    """DeepSpeed's stages 1 and 2 reduce gradients on all ranks, 3 to their owners; from 2 on for every micro-batch.
    Parameters are gathered after a step, and at stage 3 in both passes of every micro-batch, but for the last REUSED of
    the forward pass, which the backward pass begins with."""
    low, stage = work.communication == "bf16", work.zero_stage if work.engine == "deepspeed" else 0
    whole, often = (2 if low else 4) * work.parameters, work.accumulation if stage > 1 else 1
    if stage == 3:
        yield Message("gradients of the network", "world", "scatter", -(-whole // world), often)
    else:
        yield Message("gradients of the network", "world", "all_reduce", whole, often)
    if stage:
        part = -(-(4 * work.parameters - (2 * work.rounded if low else 0)) // world)
        again = max(0.0, 1 - REUSED / work.parameters) if stage == 3 else 0.0
        yield Message("parameters of the network", "world", "gather", part, often * (1 + again) if stage == 3 else 1)


def engine_terms(engine: EngineConfig) -> dict[str, Any]:
    """What an engine is, in the fields of Work."""
    communication = "bf16" if engine.sends_bf16 else "fp32"
    out = {"engine": engine.name, "zero_stage": engine.zero_stage, "communication": communication}
    return {**out, "accumulation": engine.accumulation}


def network_bytes(parameters: int, rounded: int, engine: EngineConfig, world: int) -> int:
    """What a rank sends in a step of a network alone that has so many parameters, and so many of them rounded."""
    work = Work(1, 1, 0, parameters=parameters, rounded=rounded, **engine_terms(engine))
    return sum(round(message.times * message.sent(world)) for message in _network(work, world))


def revival(work: Work, grid: Grid, dead: int = 0) -> list[Message]:
    """The collectives of reviving so many dead codes, beside those of every step; with the usual none, one number."""
    if not work.revive_every:
        return []
    share, num = 1 / work.revive_every, min(candidates(work, grid), dead)
    parts = [Message("number of dead codes", "codes", "all_reduce", 8, share)]
    if num:
        local = min(num, work.tokens)
        parts += [
            Message("dead ids", "codes", "gather", 8 * num, share),
            Message("ids of tokens", "codes", "gather", 8 * work.tokens, share),
            Message("use of their codes", "codes", "scatter", 4 * work.tokens, share),
            Message("chances of tokens", "world", "gather", 8 * local, share),
            Message("their places", "world", "gather", 8 * local, share),
            Message("tokens for dead codes", "world", "all_reduce", 4 * num * work.dim, share),
        ]
    return [message for message in parts if grid.size(message.axis) > 1]


def candidates(work: Work, grid: Grid) -> int:
    every = work.tokens * grid.world
    return min(every, work.codes, max(1, every // 4) if work.revive_most is None else work.revive_most)


def sent(parts: list[Message], grid: Grid) -> dict[str, int]:
    """Bytes that a rank sends, by axis."""
    out = {"codes": 0, "data": 0, "world": 0}
    for message in parts:
        out[message.axis] += round(message.times * message.sent(grid.size(message.axis)))
    return out
