"""Tensors in a file: safetensors, written in blocks and read by ranges, so that neither takes more memory than a block.

By hand, because the library's writer takes whole tensors only. Not here: which files there are (checkpoint.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vqscale.disk import files

BLOCK_BYTES = 16 << 20
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """The head of a safetensors file of these types and shapes; the bytes of the tensors follow in the same order."""
    names, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        names[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **names}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with files.writing(path) as file:
        file.write(header({name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()}))
        for x in tensors.values():
            for block in blocks(x.detach().reshape(-1)):
                file.write(block.cpu().view(torch.uint8).numpy().data)


def blocks(flat: Tensor) -> Iterator[Tensor]:
    """Views of a flat tensor, in order."""
    yield from flat.split(max(1, BLOCK_BYTES // flat.element_size()))


class Ranges:
    """Files of flat tensors, open to be read by ranges."""

    def __init__(self) -> None:
        self._open: dict[Path, Any] = {}

    def fill(self, out: Tensor, file: Path, name: str, start: int) -> None:
        """out = the elements of a flat tensor from `start` on, in place, on whatever device."""
        if file not in self._open:
            from safetensors import safe_open  # here: who only computes needs no files

            self._open[file] = safe_open(file, framework="pt")
        given = self._open[file].get_slice(name)
        for block in blocks(out):
            block.copy_(given[start : start + len(block)])
            start += len(block)
