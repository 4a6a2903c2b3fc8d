"""What a user can choose about precision, the engine and its optimiser. Imports no torch.

How the choices act: engine.py (both engines), schedule.py (the learning rate), average.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from vqscale.config import Before, Free


@dataclass(frozen=True)
class EngineConfig:
    """How gradients become steps: which engine, how it is split, in which precision, with which limits."""

    name: Free[Literal["deepspeed", "torch"]] = "deepspeed"
    """deepspeed (ZeRO), or torch: the plain twin, which holds everything on every process"""
    zero_stage: Free[Literal[0, 1, 2, 3]] = 1
    """what DeepSpeed splits over the processes: 0 nothing, 1 moments, 2 gradients too, 3 parameters too"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of the forward pass (autocast); parameters and moments are fp32 in both"""
    communication: Free[Annotated[Literal["fp32", "bf16"] | None, Before("fp32")]] = None
    """of messages about the replicated parameters; null: as precision. bf16 halves them: gradients are rounded to it,
    and so are their sums; parameters are where autocast rounds them at every use, which changes nothing"""
    matmul: Literal["highest", "high", "medium", "low"] = "highest"
    """torch.set_float32_matmul_precision while a run trains, but for the search, logits and softmaxes over codes, which
    stay float32; on a GPU high is TF32, and medium fuses the softmax over codes in bf16; on a CPU with bfloat16
    products medium rounds soft mean rows to 2^-8 and gradients over codes to 2^-6, but no logits. low is medium whose
    scores of that softmax are products of float8 on GPUs that have such; ids stay exact, the rest is off by as much as
    vqscale/codes/gpu/passes.py says"""
    accumulation: int = 1
    """micro-batches added up before a step; entropies and the tokens for revival are those of one micro-batch"""
    clip_norm: float = 1.0
    """largest norm of the gradient over all parameters together; 0 switches clipping off"""
    max_skipped: Free[int] = 20
    """steps in a row that may be skipped for non-finite gradients before the run stops"""
    timeout_s: Free[float] = 600.0
    """how long a process waits for the others before it calls them lost"""

    @property
    def sends_bf16(self) -> bool:
        """Whether messages about the replicated parameters are in bfloat16."""
        return (self.communication or self.precision) == "bf16"

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.communication == "bf16" and self.precision != "bf16":
            yield (
                "communication",
                "communication bf16 sends parameters as autocast rounds them, and with precision fp32 there is none: "
                "use precision bf16, or communication fp32",
            )
        if self.accumulation < 1:
            yield "accumulation", f"a step needs at least 1 micro-batch, not {self.accumulation}: use 1 or more"
        if self.clip_norm < 0:
            yield "clip_norm", f"a norm is not negative, but clip_norm is {self.clip_norm}: use 0 to switch it off"
        if self.max_skipped < 0:
            yield "max_skipped", f"a number of steps is not negative, but it is {self.max_skipped}: use 0 or more"
        if self.timeout_s <= 0:
            yield "timeout_s", f"waiting takes time, but timeout_s is {self.timeout_s}: use a positive number"


@dataclass(frozen=True)
class LrFactor:
    """Another learning rate for some of the replicated parameters."""

    part: str
    """a part of the model, by the name or names, dots between them, that its parameters have somewhere in theirs"""
    factor: float
    """they learn, and decay, at lr times this"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if not self.part:
            yield "part", "part is empty: name a part of the model, such as image_encoder"
        if self.factor < 0:
            yield "factor", f"factor must not be negative, but it is {self.factor}: use 0 or more"


@dataclass(frozen=True)
class OptimConfig:
    """AdamW or, for matrices, Muon; the learning rate, and the weight decay, which biases and norms never have."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon: torch's Muon for matrices (two dims, no embedding), its updates scaled to the size of AdamW's so
    that lr and weight_decay serve both; AdamW for vectors, convolutions, embeddings and rows of codes"""
    lr: float = 1e-4
    """peak learning rate, reached at the end of the warm-up"""
    betas: tuple[float, float] = (0.9, 0.95)
    """decay of the first and the second moment"""
    eps: float = 1e-8
    """added to the root of the second moment"""
    momentum: float = 0.95
    """for muon: of the gradients of matrices, with Nesterov's step"""
    weight_decay: float = 0.0
    """decoupled decay of matrices: per step they lose this times the learning rate"""
    rows_weight_decay: float = 0.0
    """the same of tables: codebook rows, a prior's tables of ids, embeddings; rows decay in every step, used or not"""
    final_weight_decay: float | None = None
    """what both decays, where they are not 0, have become by the last step, along half a cosine over all steps; null:
    they stay"""
    schedule: Literal["constant", "cosine", "linear", "steps"] = "cosine"
    """what the learning rate does after the warm-up"""
    warmup_steps: int = 0
    """steps of linear growth before the schedule"""
    drop_steps: tuple[int, ...] = ()
    """for schedule steps: at each of these the learning rate is multiplied by drop_factor"""
    drop_factor: float = 0.1
    """for schedule steps: see drop_steps"""
    final_factor: float = 0.0
    """for schedules cosine and linear: the last step has lr * final_factor"""
    flat_share: float = 0.0
    """for schedule linear: so large a share of the steps after the warm-up still has lr"""
    rows_lr_factor: float = 1.0
    """codebook rows learn at lr times this"""
    lr_factors: tuple[LrFactor, ...] = ()
    """parts of the model that learn at another rate, e.g. [{part: image_encoder, factor: 0.1}]; of several that fit a
    parameter the last is taken"""

    def problems(self) -> Iterable[tuple[str, str]]:
        for key in ("lr", "eps", "drop_factor"):
            if getattr(self, key) <= 0:
                yield key, f"{key} must be positive, but it is {getattr(self, key)}: give a number above 0"
        for key in (
            *("weight_decay", "rows_weight_decay", "final_weight_decay"),
            *("warmup_steps", "final_factor", "rows_lr_factor"),
        ):
            if (getattr(self, key) or 0) < 0:
                yield key, f"{key} must not be negative, but it is {getattr(self, key)}: use 0 or more"
        if self.final_weight_decay is not None and self.weight_decay == self.rows_weight_decay == 0:
            yield (
                "final_weight_decay",
                f"final_weight_decay {self.final_weight_decay} is where a decay goes, but weight_decay and "
                "rows_weight_decay are 0, which stays 0: give one of them, or leave final_weight_decay out",
            )
        if not 0 <= self.flat_share < 1:
            yield "flat_share", f"flat_share is {self.flat_share}, a share of the steps: use 0 to below 1"
        if not 0 <= self.momentum < 1:
            yield "momentum", f"a momentum lies in [0, 1), but it is {self.momentum}: bring it into that range"
        if not all(0 <= beta < 1 for beta in self.betas):
            yield "betas", f"a decay lies in [0, 1), but betas are {list(self.betas)}: bring both into that range"
        if (self.schedule == "steps") != bool(self.drop_steps):
            yield (
                "drop_steps",
                f"drop_steps {list(self.drop_steps)} and schedule {self.schedule} do not go together: "
                "schedule steps needs drop_steps, the others have none",
            )
        if list(self.drop_steps) != sorted(set(self.drop_steps)) or any(s < 1 for s in self.drop_steps):
            yield (
                "drop_steps",
                f"drop_steps are growing step numbers from 1 on, not {list(self.drop_steps)}: put them in order",
            )


def check_whole(engine: EngineConfig, optim: OptimConfig, key: str = "optim.name") -> Iterable[tuple[str, str]]:
    """(key, message) where the engine cuts what the optimiser needs whole."""
    if optim.name == "muon" and engine.name == "deepspeed" and engine.zero_stage > 0:
        yield (
            key,
            f"muon takes whole matrices, and engine.zero_stage {engine.zero_stage} gives each process a flat part of "
            "all of them: use engine.zero_stage=0 or engine.name=torch, or name: adamw",
        )


def check_engine(config: EngineConfig, device: str) -> None:
    """ValueError where this machine cannot run the engine on `device`; call it before any process group is made."""
    if config.name == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(
            "engine.name deepspeed needs the package deepspeed, which is not installed here: "
            "pip install deepspeed, or use engine.name: torch"
        )
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError(
                "run.device cuda needs a GPU that torch can use, and it finds none here: use run.device=cpu or auto"
            )


@dataclass(frozen=True)
class AverageConfig:
    """A moving average of the weights, which is evaluated, saved beside them and loaded in their place."""

    decay: float = 0.0
    """decay per step, 0.999 for published tokenizers; 0 keeps no average"""
    warmup: bool = False
    """use (1 + step) / (10 + step) while it is less than decay; the published tokenizers do not"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if not 0 <= self.decay < 1:
            yield "decay", f"a decay lies in [0, 1), but decay is {self.decay}: use 0.999, say, or 0 for no average"
