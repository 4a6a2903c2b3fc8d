"""The settings of a run, as frozen dataclasses that mirror the YAML: one file, one run. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from vqscale.data.config import ImagesConfig
from vqscale.parallel.config import EngineConfig, MeshConfig, OptimConfig
from vqscale.tokenizer_config import TokenizerConfig


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

    def problems(self) -> Iterable[tuple[str, str]]:
        for key, least in (("steps", 1), ("log_every", 1), ("eval_every", 1), ("checkpoint_every", 1), ("keep", 1)):
            if getattr(self, key) < least:
                yield key, f"{key} is {getattr(self, key)}: use at least {least}"
        if self.eval_images < 0:
            yield "eval_images", f"eval_images is {self.eval_images}: use 0 (all) or more"


@dataclass(frozen=True)
class LossConfig:
    """What the tokenizer is trained for; the quantizer adds its own losses."""

    reconstruction: Literal["l1", "l2"] = "l2"
    """distance of images"""
    reconstruction_weight: float = 1.0
    """its weight"""
    quantizer_weight: float = 0.01
    """weight of the sum of the quantizer's losses; at 1 their pull on the latents outweighs l2, and codes die"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.quantizer_weight < 0:
            yield "quantizer_weight", f"quantizer_weight is {self.quantizer_weight}: use 0 or more"
        if self.reconstruction_weight <= 0:
            yield (
                "reconstruction_weight",
                f"reconstruction_weight is {self.reconstruction_weight}, and nothing else trains the decoder: "
                "use a positive number",
            )


@dataclass(frozen=True)
class DataConfig:
    """What is trained on and what is measured on."""

    train: ImagesConfig
    """training shards"""
    val: ImagesConfig | None = None
    """held-out shards; null measures nothing"""
    batch: int = 256
    """images per optimiser step, over all processes and micro-batches"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.batch < 1:
            yield "batch", f"batch is {self.batch}: use at least 1"
        if self.val is not None and self.val.image_size != self.train.image_size:
            yield (
                "val.image_size",
                f"val.image_size {self.val.image_size} is not train.image_size {self.train.image_size}: "
                "measure on images of the size that is trained on",
            )


@dataclass(frozen=True)
class TokenizerRun:
    """Train a tokenizer."""

    data: DataConfig
    """images"""
    run: RunConfig
    """folder, length, seed, rhythm"""
    task: Literal["tokenizer"] = "tokenizer"
    """what is trained"""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """the model"""
    loss: LossConfig = field(default_factory=LossConfig)
    """losses on images"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """optimiser and learning rate"""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """DeepSpeed or plain torch, precision, clipping"""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """how the processes are laid out"""

    def problems(self) -> Iterable[tuple[str, str]]:
        stride, size = self.tokenizer.net.stride, self.data.train.image_size
        if size % stride:
            yield (
                "data.train.image_size",
                f"image_size {size} does not divide by {stride}, the stride of the "
                f"{len(self.tokenizer.net.multipliers)} levels in tokenizer.net.multipliers: change one of them",
            )

    def check_world(self, world: int) -> None:
        """ValueError when this run does not fit `world` processes."""
        self.mesh.resolve(world)
        parts = world * self.engine.accumulation
        if self.data.batch % parts:
            raise ValueError(
                f"data.batch {self.data.batch} does not divide by {world} processes x accumulation "
                f"{self.engine.accumulation} = {parts}: change data.batch (nearest that divide: "
                f"{self.data.batch // parts * parts or parts} and {(self.data.batch // parts + 1) * parts}), "
                "engine.accumulation or --nproc_per_node"
            )


# A run is one of these; `task` tells which.
Run = TokenizerRun

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
    "tokenizer.quantizer.scan_mib",
    "data.train.shards",
    "data.train.num_workers",
    "data.train.max_broken",
    "data.train.cache_",
    "data.train.index_dir",
    "data.val.",
    "data.val:",
)
