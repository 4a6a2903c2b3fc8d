"""Bytes of memory that are new inside a block: counted, whoever frees what when."""

from __future__ import annotations

import tracemalloc

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LARGE = 1 << 20


def _storages(tree):
    return {x.untyped_storage()._cdata: x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)}


def _files():
    """The spans of memory in which a file is shown as it lies on the disk (mmap): none is taken for it."""
    with open("/proc/self/maps") as file:
        lines = (line.split() for line in file)
        return [tuple(int(end, 16) for end in span.split("-")) for span, _, _, _, inode, *_ in lines if inode != "0"]


class NewBytes(TorchDispatchMode):
    """`peak`: the most bytes of tensors that operations of this block made, alive at one time, on any device."""

    def __init__(self):
        super().__init__()
        self.peak, self._alive, self._spans = 0, {}, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        before = _storages((args, kwargs))
        out = operation(*args, **(kwargs or {}))
        for key, storage in _storages(out).items():
            if key not in before and not self._in_a_file(storage):
                self._alive[key] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out

    def _in_a_file(self, storage):
        if storage.nbytes() < LARGE or storage.device.type != "cpu":
            return False
        at = storage.data_ptr()
        if not any(low <= at < high for low, high in self._spans):
            self._spans = _files()
        return any(low <= at < high for low, high in self._spans)


def peak(work):
    """(work(), the most bytes that it had at one time, of tensors and of everything in Python and numpy)"""
    tracemalloc.start()
    try:
        with NewBytes() as tensors:
            result = work()
        return result, tensors.peak + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
