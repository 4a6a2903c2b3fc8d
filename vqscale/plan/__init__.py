"""What a run would cost, on any grid of machines: operations, memory, bytes and seconds, by counting and arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vqscale.plan.tokenizer import Costs
    from vqscale.train.config import Run


def costs_of(config: Run, world: int) -> Costs:
    """What a run of any task costs on each of `world` processes. ValueError for sizes that no memory has."""
    with _sizes_that_exist():
        if config.task == "prior":
            from vqscale.plan.prior import plan as plan_prior
            from vqscale.train import nulls

            return plan_prior(nulls.fill(config), world)
        from vqscale.plan.tokenizer import plan

        return plan(config, world)


def operations_of(config: Run) -> int:
    """Operations of products that a run of any task does for one image in training; 0 where a network looks at values,
    so that they cannot be counted without any. ValueError as of `costs_of`."""
    from vqscale.plan import operations

    try:
        with _sizes_that_exist():
            return operations.training(config)
    except RuntimeError:  # of the meta device
        return 0


@contextmanager
def _sizes_that_exist() -> Iterator[None]:
    """What torch says of a tensor of more than 2^63 bytes, as an error that tells what to do."""
    try:
        yield
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise ValueError(
            f"a tensor of this run would have more bytes than there are addresses ({error}): lower the sizes in the "
            "config that these are of (channels, width, dim, num_codes, image_size, data.batch)"
        ) from None
