"""A trained module as a folder that stands for itself, model.safetensors and card.json, and as a fingerprint.

Both go over the same tensors in the same order: every parameter, by name, the K rows of a table whole and in global
order. Rows are streamed in blocks from whichever rank owns them, so no rank holds those of all. Buffers are the state
of a training (windows of usage, moving counts) and not part of what is saved, unless a module names them in
`saved_buffers`: what it computes depends on them, as a whitening on its running moments. Reading is in saved.py.

Written over another one, the weights take their place first and the card after them. A kill between the two leaves new
weights, the old card, and beside it the new one, which fits: `card_file` finds it.

card.json      format, version, fingerprint, config, size and sha256 of the weights, and what is known about them:
               origin (run, step, averages or parameters), commit, metrics; of a tokenizer the image_size, of a prior
               the fingerprint of the tokenizer whose ids it models
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor, nn

from vqscale import config as configuration
from vqscale.codes.clusters import Clusters
from vqscale.codes.codebook import Codebook
from vqscale.codes.rows import Rows, Table
from vqscale.config.schema import fields_of, is_config
from vqscale.disk import files, manifest
from vqscale.disk.checkpoint import CheckpointError
from vqscale.disk.tensors import BLOCK_BYTES, DTYPES, header
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh

Kind = Literal["tokenizer", "prior", "shapes classifier", "sounds classifier"]  # what a folder may hold
FORMATS: dict[Kind, str] = {
    "tokenizer": "vqscale tokenizer",
    "prior": "vqscale prior",
    "shapes classifier": "vqscale shapes classifier",
    "sounds classifier": "vqscale sounds classifier",
}
VERSION = 1
WEIGHTS, CARD = "model.safetensors", "card.json"
# These change how fast and in how much memory something is computed, not what.
NOT_IDENTITY = ("scan_mib", "checkpointing", "clusters")
UNNAMED = ("flat",)  # was the only head when its settings had no name


@dataclass(frozen=True)
class Entry:
    """A parameter or a buffer that is saved: the same on every rank, or (with a table) this rank's rows of it."""

    tensor: Tensor
    table: Codebook | Clusters | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return (*([self.table.num_codes] if self.table else self.tensor.shape[:1]), *self.tensor.shape[1:])

    def blocks(self) -> Iterator[bytes]:
        """The whole tensor in order, in blocks of bytes. Rows are broadcast by their owners: collective."""
        if self.table is None:
            yield _bytes(self.tensor.detach())
            return
        axis, row_bytes = self.table.axis, self.tensor[0:0].element_size() * self.tensor.shape[1:].numel()
        step = max(1, BLOCK_BYTES // row_bytes)
        for owner in range(axis.size):
            count = Rows(self.table.num_codes, axis.size, owner).count
            for low in range(0, count, step):
                high = min(low + step, count)
                if owner == axis.rank:
                    block = self.tensor.detach()[low:high]
                else:
                    block = self.tensor.new_empty((high - low, *self.tensor.shape[1:]))
                yield _bytes(ops.broadcast(block, axis, owner))


def entries(module: nn.Module) -> dict[str, Entry]:
    """Every parameter of a module by name, in the order of names; also those of tables that were set aside."""
    found = {}
    for name, table in _tables(module).items():
        for key, rows in table.named_parameters():
            assert isinstance(table, Codebook), f"{name} has parameters and no axis to send them on"
            found[f"{name}.{key}"] = Entry(rows, table)
        if isinstance(table, Clusters):
            found[f"{name}.cluster_k"] = Entry(table.cluster_k, table)
    rest = {name: Entry(p) for name, p in module.named_parameters() if name not in found}
    kept = {name: Entry(buffer) for name, buffer in _saved_buffers(module)}
    return dict(sorted((found | rest | kept).items()))


def _saved_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, part in module.named_modules():
        for name in getattr(part, "saved_buffers", ()):
            yield f"{prefix}.{name}" if prefix else name, part.get_buffer(name)


def fingerprint(module: nn.Module, config: Any) -> str:
    """The sha256 of a config and the parameters of a module; collective on the code axis, the same on every rank."""
    digest = _begin(config)
    for name, entry in entries(module).items():
        _announce(digest, name, entry)
        for block in entry.blocks():
            digest.update(block)
    return digest.hexdigest()


def write(
    folder: Path | str, module: nn.Module, config: Any, card: Mapping[str, Any], mesh: Mesh, kind: Kind = "tokenizer"
) -> Path:
    """Write the folder; collective, rank 0 writes. What fails there is raised on all ranks.

    A tokenizer takes the place of one that lies there; nothing else is written over.
    """
    target = _Target(Path(folder), kind) if mesh.world.rank == 0 else None
    digest, tensors = _begin(config), entries(module)
    if target is not None:
        target.open(tensors)
    for name, entry in tensors.items():
        _announce(digest, name, entry)
        for block in entry.blocks():
            digest.update(block)
            if target is not None:
                target.put(block)
    if target is not None:
        known = {"format": FORMATS[kind], "version": VERSION, "fingerprint": digest.hexdigest()}
        target.close({**card, **known, "config": configuration.to_dict(config)})
    failure = ops.gather_objects(target.failure if target else None, mesh.world)[0]
    if isinstance(failure, ValueError):
        raise failure
    if failure is not None:
        raise CheckpointError(
            f"the {kind} was not written to {folder}: {type(failure).__name__}: {failure}; make room there, or "
            "choose another folder"
        )
    return Path(folder)


class _Target:
    """Rank 0's files. After a failure it takes no more and says nothing, because the other ranks go on sending."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.folder, self.kind = folder, kind
        self.failure: Exception | None = None
        self._file: BinaryIO | None = None

    def open(self, tensors: Mapping[str, Entry]) -> None:
        try:
            if (self.folder / "run.yaml").exists() or (self.folder / manifest.NAME).exists():
                raise ValueError(
                    f"{self.folder} holds a run or a checkpoint, and a {self.kind} is saved in a folder of "
                    "its own: give another folder"
                )
            there = _format(self.folder)
            if there is not None and (there, self.kind) != (FORMATS["tokenizer"], "tokenizer"):
                raise ValueError(
                    f"{self.folder} has the card of a {there!r}, and a {self.kind} is not written over it: give "
                    "another folder, or remove this one"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = files.beside(self.folder / WEIGHTS).open("wb")
            self._file.write(_header(tensors))
        except (OSError, ValueError) as error:
            self.failure = error

    def put(self, block: bytes) -> None:
        if self.failure is None and self._file is not None:
            try:
                self._file.write(block)
            except OSError as error:
                self.failure = error

    def close(self, card: Mapping[str, Any]) -> None:
        try:
            if self._file is not None:
                self._file.close()
            if self.failure is None:
                self._finish(card)
        except OSError as error:
            self.failure = self.failure or error
        if self.failure is not None:
            with contextlib.suppress(OSError):
                files.beside(self.folder / WEIGHTS).unlink(missing_ok=True)
                if card_file(self.folder) != self._new_card:
                    self._new_card.unlink(missing_ok=True)

    def _finish(self, card: Mapping[str, Any]) -> None:
        """What lay there stands until weights and card are on the disk."""
        if card_file(self.folder) == self._new_card:  # of a save that was killed
            files.place(self._new_card, self.folder / CARD)
        made = files.beside(self.folder / WEIGHTS)
        files.write_json(self._new_card, {**card, "weights": {"file": WEIGHTS, **manifest.seal(made)}})
        files.place(made, self.folder / WEIGHTS)
        files.place(self._new_card, self.folder / CARD)

    @property
    def _new_card(self) -> Path:
        return files.beside(self.folder / CARD)


def card_file(folder: Path) -> Path:
    """The card of the weights in a folder: card.json, or the one beside it where a save was killed in between."""
    made, weights = files.beside(folder / CARD), folder / WEIGHTS
    try:
        said = json.loads(made.read_text(encoding="utf-8"))["weights"]
        if said["bytes"] == weights.stat().st_size and said["sha256"] == manifest.seal(weights)["sha256"]:
            return made
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return folder / CARD


def _format(folder: Path) -> Any:
    """What the card of a folder says that it holds; None without a card that can be read."""
    try:
        return json.loads(card_file(folder).read_text(encoding="utf-8"))["format"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _header(tensors: Mapping[str, Entry]) -> bytes:
    return header({name: (entry.tensor.dtype, tuple(entry.shape)) for name, entry in tensors.items()})


def _bytes(x: Tensor) -> bytes:
    return x.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _begin(config: Any) -> Any:
    return hashlib.sha256(json.dumps(_identity(config), sort_keys=True).encode())


def _announce(digest: Any, name: str, entry: Entry) -> None:
    digest.update(f"{name} {DTYPES[entry.tensor.dtype]} {list(entry.shape)}\n".encode())


def _identity(value: Any) -> Any:
    """A config without what has its default, or had it before (config.Before): what is added or changed later does not
    change the fingerprint of what is."""
    if is_config(value):
        keys = fields_of(value.__class__)
        chosen = {key: getattr(value, field.attribute) for key, field in keys.items() if key not in NOT_IDENTITY}
        told = {key for key, x in chosen.items() if x != keys[key].before or (key == "name" and x not in UNNAMED)}
        return {key: _identity(x) for key, x in chosen.items() if key in told}
    return [_identity(item) for item in value] if isinstance(value, tuple) else value


def _tables(module: nn.Module) -> dict[str, Table]:
    """Every table by dotted name, whether it is still a child or was set aside (codes.rows.set_aside)."""
    found: dict[str, Table] = {}
    for prefix, part in module.named_modules():
        for name, child in [*part.named_children(), *part.__dict__.items()]:
            if isinstance(child, Table):
                found[f"{prefix}.{name}" if prefix else name] = child
    return found
