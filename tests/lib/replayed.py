"""A stand-in for what captures compiled networks as CUDA graphs and replays them, for machines without a GPU.

It is a backend of torch.compile. What it is given it runs as it is, and it does the three things by which a captured
graph differs: what no capture takes is an error where it is compiled; what a pass has returned (outputs, what is kept
for a backward pass, gradients) is overwritten when the next step begins, which is where torch says it does: with the
first forward pass after a backward pass, and with each that has none; and what torch calls static (parameters, and
whatever else a module has) is read where it was in the first pass, so that it is an error where it has moved, which
would be another capture. Whoever reads what was overwritten reads what is not a number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch.utils._pytree import tree_leaves

from vqscale.codes.softmax import forward

Compiled = Callable[..., Any]


def dense_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of softmax/forward.py as a GPU has them; on a CPU it reads on the host which blocks are sparse."""
    whole = forward._pass
    monkeypatch.setattr(forward, "_pass", lambda *args, **_: whole(*args[:4], sparse=False))


class Replayed:
    """`passes` counts what was compiled: forward, backward, inference; `operators` are those of ours that were in it;
    `modes` are those that were asked for; `copied` is how many numbers a forward pass was given at another address, at
    most."""

    def __init__(self) -> None:
        self.passes, self.modes, self.copied = Counter[str](), set[str | None](), 0
        self.operators = set[str]()
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
        named = [node.target.name() for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        self.operators.update(name for name in named if name.startswith("vqscale::"))
        known = torch._guards.TracingContext.get().fw_metadata
        assert known is not None
        assert not any(given.mutates_data for given in known.input_info), "what is given is changed in place"
        static = {} if kind == "backward" else dict.fromkeys(known.static_input_indices, 0)
        return make_boxed_func(partial(self._replay, kind, graph, static))  # type: ignore[no-any-return]

    def _replay(self, kind: str, graph: fx.GraphModule, static: dict[int, int], *args: Any) -> Any:
        for place in static:
            address = args[place].data_ptr()
            assert static[place] in (0, address), f"input {place} of {[*args[place].shape]} has moved"
            static[place] = address
        if kind != "backward":
            moved = [x.numel() for place, x in enumerate(args) if place not in static and isinstance(x, Tensor)]
            self.copied = max(self.copied, sum(moved))
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
