"""A stand-in for what captures compiled networks as CUDA graphs and replays them, for machines without a GPU.

It is a backend of torch.compile. What it is given it runs as it is, and it does the two things by which a captured
graph differs: what no capture takes is an error where it is compiled, and what a pass has returned (outputs, what is
kept for a backward pass, gradients) is overwritten when the next step begins, which is where torch says it does: with
the first forward pass after a backward pass. Whoever reads it later reads what is not a number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch.utils._pytree import tree_leaves

Compiled = Callable[..., Any]


class Replayed:
    """`passes` counts what was compiled: forward, backward, inference; `modes` are those that were asked for."""

    def __init__(self) -> None:
        self.passes, self.modes = Counter[str](), set[str | None]()
        self._returned: list[torch.UntypedStorage] = []  # no tensors: a gradient that nobody else holds is not copied
        self._pending = False

    def __call__(self, graph: fx.GraphModule, inputs: Any, mode: str | None = None) -> Compiled:
        self.modes.add(mode)
        forward, backward, inference = (partial(self._capture, kind) for kind in ("forward", "backward", "inference"))
        compilers = {"fw_compiler": forward, "bw_compiler": backward, "inference_compiler": inference}
        compiled: Compiled = aot_autograd(**compilers)(graph, inputs)
        return compiled

    def _capture(self, kind: str, graph: fx.GraphModule, inputs: Any) -> Compiled:
        check_capturable(graph)
        self.passes[kind] += 1
        return make_boxed_func(partial(self._replay, kind, graph))  # type: ignore[no-any-return]

    def _replay(self, kind: str, graph: fx.GraphModule, *args: Any) -> Any:
        if kind != "backward" and not self._pending:
            for storage in self._returned:
                storage.fill_(255)  # not a number, and as an integer -1
            self._returned.clear()
        self._pending = kind == "forward" or (self._pending and kind != "backward")
        given = {storage.data_ptr() for storage in _storages(args)}
        returned = graph(*args)
        self._returned += [storage for storage in _storages(returned) if storage.data_ptr() not in given]
        return returned


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, Tensor)]


def check_capturable(graph: fx.GraphModule) -> None:
    """Every number on one device, every shape a constant, and no operation that waits for the device."""
    values = [x for node in graph.graph.nodes for x in tree_leaves(node.meta.get("val"))]
    tensors = [x for x in values if isinstance(x, Tensor)]
    assert len({x.device for x in tensors}) <= 1, graph
    assert not [x for x in values if isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool)], graph
    assert all(isinstance(side, int) for x in tensors for side in x.shape), graph
    assert get_first_incompatible_cudagraph_node(graph) is None, graph
