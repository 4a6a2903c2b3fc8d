"""The settings that runs of all tasks have, and how a batch is cut. No torch here.

A key that is marked Free may have another value when a run goes on (vqscale/config/marks.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from vqscale.config import Free
from vqscale.engine.config import EngineConfig


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives, how long it is, and how often it speaks."""

    folder: Free[str]
    """the run folder: metrics, samples, checkpoints, and the resolved config"""
    steps: Free[int] = 1000
    """optimiser steps in all"""
    seed: int = 0
    """everything random in the run follows from it"""
    device: Free[Literal["auto", "cpu", "cuda"]] = "auto"
    """auto takes a GPU per process where there are GPUs, and says so where they are too few"""
    log_every: Free[int] = 10
    """steps between rows of metrics.jsonl and TensorBoard"""
    eval_every: Free[int] = 1000
    """steps between evaluations on data.val; the last step always evaluates"""
    eval_images: Free[int] = 0
    """images of data.val that evaluations before the last one look at; 0 is all"""
    checkpoint_every: Free[int] = 1000
    """steps between checkpoints; the last step always saves"""
    keep: Free[int] = 2
    """newest checkpoints that are kept"""
    profile_steps: Free[int] = 0
    """steps that rank 0 traces after 3 steps of every start, to the run folder's profile/; 0 is off"""
    compile: Free[bool] = False
    """compile the networks (torch.compile): minutes at the start, faster steps; needs a C++ compiler"""
    cuda_graphs: Free[bool] = False
    """with compile, of a tokenizer on a GPU: its whole forward pass, codes too, and its backward pass are captured as
    CUDA graphs and replayed, which saves launches; encoder and decoder alone where the codes cannot be, and the log
    says why; for engine.name torch and samples of one shape; not measured on a GPU yet"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if not self.folder.strip():
            yield "folder", "folder is empty, and a run would lie in the working folder: give it one, as runs/first"
        for key, least in (("steps", 1), ("log_every", 1), ("eval_every", 1), ("checkpoint_every", 1), ("keep", 1)):
            if getattr(self, key) < least:
                yield key, f"{key} is {getattr(self, key)}: use at least {least}"
        if self.eval_images < 0:
            yield "eval_images", f"eval_images is {self.eval_images}: use 0 (all) or more"
        if self.profile_steps < 0:
            yield "profile_steps", f"profile_steps is {self.profile_steps}: use 0 (no trace) or more"


def check_batch(batch: int, accumulation: int, world: int) -> None:
    """ValueError when a global batch cannot be cut into the micro-batches of all processes."""
    parts = world * accumulation
    if batch % parts:
        raise ValueError(
            f"data.batch {batch} does not divide by {world} processes x accumulation {accumulation} = {parts}: change "
            f"data.batch (nearest that divide: {batch // parts * parts or parts} and {(batch // parts + 1) * parts}), "
            "engine.accumulation or --nproc_per_node"
        )


def check_compile(run: RunConfig, engine: EngineConfig) -> Iterable[tuple[str, str]]:
    """(key, message) where compiled networks and an engine do not go together."""
    if run.compile and engine.name == "deepspeed" and engine.zero_stage == 3:
        yield (
            "run.compile",
            "run.compile does not go with engine.zero_stage 3, which takes parameters away between the layers of a "
            "compiled network: use a stage up to 2, or run.compile: false",
        )


def check_graphs(run: RunConfig, engine: EngineConfig, num_shapes: int) -> Iterable[tuple[str, str]]:
    """(key, message) where a tokenizer whose samples have so many shapes cannot be captured as CUDA graphs: what a
    graph returns, gradients too, lies where its next replay writes. How much of it is captured: train/compiled.py."""
    if not run.cuda_graphs:
        return
    off = "or run.cuda_graphs: false"
    if not run.compile:
        yield "run.cuda_graphs", f"CUDA graphs are captured of compiled networks: use run.compile: true, {off}"
    if engine.name != "torch":
        yield (
            "run.cuda_graphs",
            f"engine.name {engine.name} takes gradients while the backward pass goes on, which a captured one cannot "
            f"wait for: use engine.name: torch, {off}",
        )
    if engine.accumulation > 1:
        yield (
            "run.cuda_graphs",
            f"with engine.accumulation {engine.accumulation} a graph would write over the gradients of the micro-batch "
            f"before: use engine.accumulation: 1, {off}",
        )
    if num_shapes > 1:
        yield (
            "run.cuda_graphs",
            f"a graph is captured of one shape, and data.train.buckets are {num_shapes}: use images of one size, {off}",
        )
