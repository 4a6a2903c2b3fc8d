"""The settings of a run, as frozen dataclasses that mirror the YAML: one file, one run. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from vqscale.data.config import ImagesConfig
from vqscale.parallel.config import EngineConfig, MeshConfig, OptimConfig
from vqscale.tokenizer_config import TokenizerConfig
from vqscale.train.config_losses import AverageConfig, LossConfig


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
    """compile encoder and decoder (torch.compile): minutes at the start, faster steps; needs a C++ compiler"""

    def problems(self) -> Iterable[tuple[str, str]]:
        for key, least in (("steps", 1), ("log_every", 1), ("eval_every", 1), ("checkpoint_every", 1), ("keep", 1)):
            if getattr(self, key) < least:
                yield key, f"{key} is {getattr(self, key)}: use at least {least}"
        if self.eval_images < 0:
            yield "eval_images", f"eval_images is {self.eval_images}: use 0 (all) or more"
        if self.profile_steps < 0:
            yield "profile_steps", f"profile_steps is {self.profile_steps}: use 0 (no trace) or more"


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
    average: AverageConfig = field(default_factory=AverageConfig)
    """moving average of the weights"""
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
        yield from self._game_problems(size)
        if self.run.compile and self.engine.name == "deepspeed" and self.engine.zero_stage == 3:
            yield (
                "run.compile",
                "run.compile does not go with engine.zero_stage 3, which takes parameters away between the layers "
                "of a compiled network: use a stage up to 2, or run.compile: false",
            )

    def _game_problems(self, size: int) -> Iterable[tuple[str, str]]:
        game = self.loss.adversarial
        if self.loss.perceptual is not None and size < LEAST_PERCEPTUAL:
            yield (
                "loss.perceptual",
                f"LPIPS halves the side of an image four times, and data.train.image_size is {size}: use images of "
                f"at least {LEAST_PERCEPTUAL} pixels, or loss.perceptual: null",
            )
        if game is None:
            return
        if size < game.net.least_side:
            yield (
                "loss.adversarial.net.num_layers",
                f"num_layers {game.net.num_layers} leave no patch of images of data.train.image_size {size}, they need "
                f"{game.net.least_side} pixels: use fewer layers or larger images",
            )
        if game.adaptive and self.engine.name == "deepspeed" and self.engine.zero_stage == 3:
            yield (
                "loss.adversarial.adaptive",
                "adaptive asks for a gradient at the decoder's last layer, and engine.zero_stage 3 takes that layer "
                "apart before it can be had: use a stage up to 2, or adaptive: false with a constant weight",
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


LEAST_PERCEPTUAL = 16

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
    "run.profile_steps",
    "run.compile",
    "loss.perceptual.vgg:",
    "loss.perceptual.heads:",
    "tokenizer.net.checkpointing",
    "tokenizer.quantizer.scan_mib",
    "data.train.shards",
    "data.train.num_workers",
    "data.train.max_broken",
    "data.train.cache_",
    "data.train.index_dir",
    "data.val.",
    "data.val:",
)
