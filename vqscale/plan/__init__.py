"""What a run would cost, on any grid of machines: operations, memory, bytes and seconds, by counting and arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vqscale.plan.tokenizer import Costs
    from vqscale.train.config import Run


def costs_of(config: Run, world: int) -> Costs:
    """What a run of any task costs on each of `world` processes."""
    if config.task == "prior":
        from vqscale.plan.prior import plan as plan_prior
        from vqscale.train import nulls

        return plan_prior(nulls.fill(config), world)
    from vqscale.plan.tokenizer import plan

    return plan(config, world)


def operations_of(config: Run) -> int:
    """Operations of products that a run of any task does for one image in training; 0 where a network looks at values,
    so that they cannot be counted without any."""
    from vqscale.plan import operations

    try:
        return operations.training(config)
    except RuntimeError:  # of the meta device
        return 0
