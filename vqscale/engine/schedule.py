"""Learning rate and weight decay of a step: pure functions, so that a resumed run needs no state. No torch."""

from __future__ import annotations

import math

from vqscale.engine.config import OptimConfig


def learning_rate(step: int, config: OptimConfig, total_steps: int) -> float:
    """The learning rate of step number `step` (from 0) of a run of `total_steps`.

    warm-up    lr (step + 1) / (warmup_steps + 1), so that the first step is not lost and step `warmup_steps` has lr
    constant   lr
    cosine     lr (f + (1 - f) (1 + cos(pi p)) / 2), f = final_factor, p from 0 after the warm-up to 1 at the last step
    linear     lr while p < flat_share, then straight down to lr final_factor at p = 1
    steps      lr drop_factor^(how many of drop_steps have been reached)
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    span = max(1, total_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    if config.schedule == "linear":
        fallen = max(0.0, (progress - config.flat_share) / (1 - config.flat_share))
        return config.lr * (1 - (1 - config.final_factor) * fallen)
    if config.schedule == "cosine":
        return config.lr * (config.final_factor + (1 - config.final_factor) * (1 + math.cos(math.pi * progress)) / 2)
    if config.schedule == "steps":
        return config.lr * config.drop_factor ** sum(step >= drop for drop in config.drop_steps)
    return config.lr


def decay_share(step: int, total_steps: int) -> float:
    """How far weight decay has gone from its first to its final value at step number `step` (from 0): half a cosine,
    0 at the first step and 1 at the last, the warm-up included."""
    return (1 - math.cos(math.pi * min(1.0, step / max(1, total_steps - 1)))) / 2
