"""The part of a run's settings that all tasks have, and what they must agree with. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives, how long it is, and how often it speaks."""

    folder: str
    """the run folder: metrics, samples, checkpoints, and the resolved config"""
    steps: int = 1000
    """optimiser steps in all"""
    seed: int = 0
    """everything random in the run follows from it"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU per process where there are GPUs"""
    log_every: int = 10
    """steps between rows of metrics.jsonl and TensorBoard"""
    eval_every: int = 1000
    """steps between evaluations on data.val; the last step always evaluates"""
    eval_images: int = 0
    """images of data.val that evaluations before the last one look at; 0 is all"""
    checkpoint_every: int = 1000
    """steps between checkpoints; the last step always saves"""
    keep: int = 2
    """newest checkpoints that are kept"""
    profile_steps: int = 0
    """steps that rank 0 traces after 3 steps of every start, to the run folder's profile/; 0 is off"""
    compile: bool = False
    """compile the networks (torch.compile): minutes at the start, faster steps; needs a C++ compiler"""

    def problems(self) -> Iterable[tuple[str, str]]:
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


# What may change when a run goes on: none of these changes what is computed, only where, how fast and how often.
FREE_TO_CHANGE = (
    "mesh.",
    "engine.name",
    "engine.zero_stage",
    "engine.max_skipped",
    "engine.timeout_s",
    "run.folder",
    "run.device",
    "run.steps",
    "run.log_every",
    "run.eval_every",
    "run.eval_images",
    "run.checkpoint_every",
    "run.keep",
    "run.profile_steps",
    "run.compile",
    "loss.perceptual.vgg:",
    "loss.perceptual.heads:",
    "tokenizer.net.checkpointing",
    "tokenizer.quantizer.scan_mib",
    "prior.net.checkpointing",
    "prior.head.scan_mib",
    "tokenizer:",
    "data.train.path",
    "data.train.shards",
    "data.train.num_workers",
    "data.train.max_broken",
    "data.train.cache_",
    "data.train.index_dir",
    "data.val.",
    "data.val:",
)

# Of a prior the micro-batches too: nothing in it is of one of them, as entropies and revival are in a tokenizer.
FREE_OF_PRIORS = ("engine.accumulation",)
