"""How many bytes autograd keeps, counted by building the graph on meta tensors. Nothing is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def activation_bytes(module: nn.Module, *inputs: Any) -> int:
    """Bytes kept for a backward pass through module(*inputs), parameters not counted. On the meta device."""
    own = {id(parameter) for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(*inputs)
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
