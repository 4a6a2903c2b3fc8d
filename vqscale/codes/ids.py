"""Ids as they are given: whole numbers of K codes, or an error on all ranks that share the codes.

Not here: which rank owns them (rows.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqscale.parallel import ops
from vqscale.parallel.mesh import Axis


def whole_ids(ids: Tensor, what: str) -> Tensor:
    """These ids as int64; ValueError where they are no whole numbers."""
    if ids.is_floating_point() or ids.is_complex():
        kind = str(ids.dtype).removeprefix("torch.")
        raise ValueError(f"{what} are {kind}, and ids are whole numbers: give them as int64, as `encode` does")
    return ids.to(torch.int64)


def check_ids(ids_N: Tensor, lowest: int, num_codes: int, what: str, axis: Axis, wait: bool = False) -> None:
    """ValueError on every rank of the axis when any has an id outside lowest .. num_codes - 1. On a GPU the
    check waits for nobody and fails inside the device, unless it is to `wait`.
    """
    if ids_N.device.type != "cpu" and not wait:
        inside = ((ids_N >= lowest) & (ids_N < num_codes)).all()
        torch._assert_async(inside, f"{what} must be in {lowest} .. {num_codes - 1}")
        return
    found = torch.stack([-ids_N.min(), ids_N.max()]) if ids_N.numel() else ids_N.new_zeros(2)
    least, most = ops.max_over(found, axis).tolist()
    if -least < lowest or most >= num_codes:
        raise ValueError(
            f"{what} must be in {lowest} .. {num_codes - 1}, for there are {num_codes} codes, but they go from "
            f"{-least} to {most}: give ids of the tokenizer that this was made for"
        )
