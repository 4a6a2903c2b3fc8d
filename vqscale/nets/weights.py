"""Weights that others published: read from a file that the user fetched, checked, and loaded key by key or not at all.

Nothing here downloads, renames keys or guesses. Not here: checkpoints of runs (disk/checkpoint.py), and which keys
a network has (the network's file).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SUFFIXES = (".pth", ".pt", ".th", ".ckpt", ".bin", ".safetensors")
HELD = ("state_dict", "model")  # under which of its keys a file may have the tensors
SHOWN = 3
Shape = Sequence[int]


def read_state(path: Path | str, *, what: str, where: str, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors in a file by name, on the CPU; where it holds them under `state_dict` (a Lightning .ckpt) or `model`
    (LlamaGen's), those.

    `what` says what the file is and `where` how to get it, both for messages. The file's sha256 must begin with the
    given hexadecimal digits; None checks nothing. ValueError for what is missing, damaged, or no dictionary of tensors.
    """
    path = Path(path)
    check_file(path, what=what, where=where)
    if sha256 is not None:
        _check_hash(path, sha256.lower(), what, where)
    try:
        found = _read(path)
    except Exception as error:  # zipfile, pickle, struct and safetensors each have their own
        first = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{what}: {path} ({path.stat().st_size} bytes) cannot be read as weights ({type(error).__name__}: "
            f"{first}): it is cut off, or it holds more than tensors; {where}"
        ) from None
    for key in HELD:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(x, Tensor) for x in found.values()):
        raise ValueError(f"{what}: {path} holds {_kind(found)} and not tensors by name: {where}")
    views = [str(name) for name, x in found.items() if x.numel() * x.element_size() > x.untyped_storage().nbytes()]
    if views:  # a few bytes may say that they are terabytes
        raise ValueError(
            f"{what}: {path} has fewer values than the shape of {_first(views)} says, the same ones again and again: "
            f"{where}"
        )
    return {str(name): tensor for name, tensor in found.items()}


def check_file(path: Path | str, *, what: str, where: str) -> None:
    """ValueError where there is no such file, or none whose name tells how to read it. Reads nothing."""
    path = Path(path)
    if not path.is_file():
        found = "is no file" if path.exists() else "does not exist"
        raise ValueError(f"{what}: {path} {found}, and nothing is downloaded at run time: {where}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{what}: {path} ends in none of {', '.join(SUFFIXES)}, which tell how to read it: {where}")


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path, device="cpu")
    return torch.load(path, map_location="cpu", weights_only=True)


def _check_hash(path: Path, prefix: str, what: str, where: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(prefix):
        raise ValueError(
            f"{what}: the sha256 of {path} is {digest[: max(len(prefix), 8)]}..., and {prefix}... is expected: another "
            f"file, or a download that was cut off; {where}, or change the expected sha256 if you trust this file"
        )


def _kind(found: Any) -> str:
    if not isinstance(found, Mapping):
        return f"a {type(found).__name__}"
    name, value = next((name, x) for name, x in found.items() if not isinstance(x, Tensor))
    return f"a {type(value).__name__} under {name!r}"


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], *, what: str) -> None:
    """Copy a state dictionary into a module in place; every key and shape must be there, and no other.

    ValueError names the first of what is missing, unknown or of another shape; then the module is as it was.
    """
    check_shapes(_shapes(module.state_dict()), _shapes(state), what=what)
    module.load_state_dict(dict(state))


def check_shapes(mine: Mapping[str, Shape], given: Mapping[str, Shape], *, what: str) -> None:
    """ValueError that names the first names of `mine` that are missing in `given`, unknown, or of another shape."""
    missing, unknown = [name for name in mine if name not in given], [name for name in given if name not in mine]
    shapes = [
        f"{name} is {tuple(given[name])} and not {tuple(shape)}"
        for name, shape in mine.items()
        if name in given and tuple(given[name]) != tuple(shape)
    ]
    found = [("missing", missing), ("unknown", unknown), ("of another shape", shapes)]
    if any(names for _, names in found):
        parts = "; ".join(f"{len(names)} {kind}: {_first(names)}" for kind, names in found if names)
        raise ValueError(
            f"{what}: the {len(given)} tensors of the file are not the {len(mine)} of the network ({parts}): give the "
            "weights of this network, or change the network's config to theirs"
        )


def _shapes(state: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tensor.shape for name, tensor in state.items()}


def _first(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
