"""Where a training waits for its device in a step that logs nothing: `waits.py CONFIG` prints a line for each wait.

It runs the loop of the config's task, in this process, as it is. With a GPU it is told by torch where the host waited.
Without one the loop runs on a device that stands in for it: tensors there have shapes and no numbers, so that whatever
needs a number of them, or a copy of them, is seen where it asks, gets a made-up answer, and the loop goes on. Tensors
of the host are real. A line is what was asked for, and the functions of vqscale that it was asked in, innermost first.

`waits.py probe` says of a few operations, each by itself, whether it waits: that the stand-in sees what it should.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

PACKAGE = Path(__file__).resolve().parents[2] / "vqscale"
NAME = "standin"
# Operators whose result, or the shape of it, or whether they converged, the host has to read from the device.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal")
READS = (*READS, "is_nonzero", "bincount", "repeat_interleave", "_linalg_eigh")

Told = Callable[[str], None]


class Leave(Exception):
    """The step that logs has come: enough was seen."""


def asked_in() -> str:
    """The functions of the package that are running, innermost first: train/loop.py:agree < ..."""
    frame: FrameType | None = sys._getframe(1)
    found = []
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents:
            found.append(f"{path.relative_to(PACKAGE)}:{frame.f_code.co_qualname}")
        frame = frame.f_back
    return " < ".join(found)


class StandIn(FakeTensorMode):
    """Tensors of the device are fake, those of the host are real; `told` hears of every wait."""

    avoid_device_init = True

    def __init__(self, told: Told) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._told = told

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        target = kwargs.get("device")
        here = any(isinstance(x, FakeTensor) for x in tensors)
        if not here and (target is None or torch.device(target).type != NAME):
            return func(*args, **kwargs)
        name, answer = func.overloadpacket.__name__, None
        if here and name in READS:
            self._told(name)
            answer = self._read(name, tensors[0], args[2] if name == "bincount" else 1)
        elif name == "_to_copy" and _crosses(args[0], target):
            if not kwargs.get("non_blocking"):
                self._told(f"copy from {args[0].device.type} to {torch.device(target).type}")
            if torch.device(target).type == "cpu":
                answer = torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        elif name == "copy_" and args[0].device.type != args[1].device.type and args[1].dim():
            if not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking"):
                self._told(f"copy_ from {args[1].device.type} to {args[0].device.type}")
            if args[0].device.type == "cpu":
                answer = args[0]
        elif name == "index" and any(_is_mask(x) for x in args[1]):
            self._told("index by a mask")
            args = (args[0], tree_map_only(Tensor, self._first, args[1]))
        return super().__torch_dispatch__(func, types, args, kwargs) if answer is None else answer

    def _read(self, name: str, x: Tensor, length: int) -> Any:
        """Something that data may well have given: one thing found, a number of 0.0, no to every question."""
        if name in ("nonzero", "bincount", "repeat_interleave"):
            return x.new_zeros((1, x.dim()) if name == "nonzero" else length, dtype=torch.int64)
        if name == "_local_scalar_dense" and x.dtype != torch.bool:
            return 0.0 if x.is_floating_point() else 1
        return False if name in ("_local_scalar_dense", "equal", "is_nonzero") else None

    def _first(self, index: Tensor) -> Tensor:
        return index.new_zeros(1, dtype=torch.int64) if _is_mask(index) else index


def _crosses(x: Tensor, target: Any) -> bool:
    return target is not None and torch.device(target).type != x.device.type


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def _moved(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply with new parameters in the place of old ones: those of the host cannot become fake."""
    for child in module.children() if recurse else ():
        child._apply(function)
    with torch.no_grad():
        for name, x in module._parameters.items():
            if x is not None:
                module._parameters[name] = nn.Parameter(function(x.detach()), x.requires_grad)
        for name, x in module._buffers.items():
            module._buffers[name] = None if x is None else function(x)
    return module


@contextmanager
def stood_in(told: Told) -> Iterator[torch.device]:
    """The device is there until this process ends: use a process of its own."""
    from vqscale.engine import engine

    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    nn.Module._apply = _moved  # type: ignore[method-assign]
    engine.SQUARED_TOGETHER[NAME] = engine.SQUARED_TOGETHER["cuda"]
    with StandIn(told):
        yield torch.device(NAME, 0)


@contextmanager
def watched(told: Told) -> Iterator[torch.device]:
    """A GPU, of which torch says where the host waits for it."""
    warnings.showwarning = lambda message, *_, **__: told(str(message)) if "synchron" in str(message) else None
    warnings.simplefilter("always")
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield torch.device("cuda", 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


device_watched = watched if torch.cuda.is_available() else stood_in


def probe() -> None:
    heard: list[str] = []
    with device_watched(heard.append) as device:
        x = torch.zeros(8, device=device)
        numbers = torch.arange(3)
        operations: dict[str, Callable[[], Any]] = {
            "item": lambda: x.sum().item(),
            "float": lambda: float(x[0]),
            "bool": lambda: bool(x.any()),
            "tolist": lambda: x.tolist(),
            "cpu": lambda: x.cpu(),
            "nonzero": lambda: x.nonzero(),
            "mask": lambda: x[x > 0],
            "tensor": lambda: torch.tensor([1.0, 2.0], device=device),
            "to": lambda: numbers.to(device),
            "nothing: arithmetic": lambda: (x * 2.0 + torch.full((), 3.0, device=device)).sum(),
            "nothing: places": lambda: x[torch.zeros(2, dtype=torch.int64, device=device)],
            "nothing: where": lambda: torch.where(x > 0, x, 0.0).masked_fill(x > 1, 2.0),
            "nothing: to": lambda: numbers.to(device, non_blocking=True),
            "nothing: host": lambda: numbers.sum().item(),
        }
        for name, operation in operations.items():
            heard.clear()
            operation()
            print(f"{name}\t{bool(heard)}")


def main(path: str) -> None:
    from vqscale import config as configuration
    from vqscale.codes.convex import exact
    from vqscale.parallel.mesh import Mesh
    from vqscale.tokenizer import saved
    from vqscale.train import nulls, prior, tokenizer, watch
    from vqscale.train.config import Run

    config = configuration.load(Run, path)
    config = nulls.fill(config) if config.task == "prior" else config
    quiet = False

    def told(what: str) -> None:
        if quiet:
            print(f"{what}\t{asked_in()}")

    begin = watch.Watch.begin

    def begun(self: watch.Watch, log: bool) -> None:
        nonlocal quiet
        quiet = not log
        if log:
            raise Leave
        begin(self, log)

    watch.Watch.begin = begun  # type: ignore[method-assign]
    saved.Saved.check_finite = lambda *_: None  # type: ignore[method-assign]  # made-up numbers are not
    exact.PASSES = 2  # where numbers are made up there is always a token that is not solved
    with device_watched(told) as device:
        try:
            (prior if config.task == "prior" else tokenizer).train(config, Mesh(device=device))
        except Leave:
            print("left")


if __name__ == "__main__":
    probe() if sys.argv[1:] == ["probe"] else main(sys.argv[1])
