"""Bytes that a rank sends in collectives of torch.distributed, whoever calls them, counted as a ring sends them."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from torch import distributed

# (name, place of the tensor that is sent, times it goes over the wire on M ranks)
COUNTED = (
    ("all_reduce", 0, lambda size: 2 * (size - 1) / size),
    ("reduce", 0, lambda size: (size - 1) / size),
    ("reduce_scatter_tensor", 1, lambda size: (size - 1) / size),
    ("all_gather_into_tensor", 1, lambda size: size - 1),
    ("all_gather", 1, lambda size: size - 1),
    ("broadcast", 0, lambda size: 1),
)
NAMES = ("input_tensor", "input", "tensor")


@contextmanager
def counted():
    """{name: bytes} while the block runs; tensors of up to 4 numbers (norms, flags) are left out.

    DeepSpeed keeps some of these functions when it joins a group: begin before it does.
    """
    sent = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, place, times in COUNTED:
            patch.setattr(distributed, name, _metered(getattr(distributed, name), name, place, times, sent))
        yield sent


def _metered(collective, name, place, times, sent):
    def call(*args, **given):
        tensor = args[place] if len(args) > place else next(given[key] for key in NAMES if key in given)
        if tensor.numel() > 4:
            size = distributed.get_world_size(given.get("group"))
            sent[name] = sent.get(name, 0) + round(tensor.nbytes * times(size))
        return collective(*args, **given)

    return call
