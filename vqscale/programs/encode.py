"""Encoding a data set into a token cache: every image in all its views, on any number of processes, to be continued
after any interruption.

The storage shards that the ledger lacks are dealt out in rounds, one to each rank. All ranks take equal numbers of
steps (short batches are filled up), so a codebook that is split over them is searched together, and what is said of
stopping and of broken images is agreed on at every step. The images of a batch do not depend on the number of
processes. Not here: what the ids are used for, and training.
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqscale.data.tokens import write as writing
from vqscale.data.tokens.format import Card, Entries, storage_for
from vqscale.data.views import Source, ViewBatch, lists
from vqscale.disk.owner import own
from vqscale.parallel import ops
from vqscale.parallel.background import on_first
from vqscale.parallel.clock import timed
from vqscale.parallel.mesh import Mesh
from vqscale.run.folder import RunError, StopRequest, commit, own_signals
from vqscale.show.progress import Progress
from vqscale.signals import Signal, check_reads


class Encodes(Protocol):
    """What is needed of a tokenizer; on a code axis `encode` and `fingerprint` are collective."""

    quantizer: Any  # num_codes, num_ids, digits

    @property
    def fingerprint(self) -> str: ...

    @property
    def signal(self) -> Signal: ...

    def encode(self, samples: Tensor, context: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Options:
    """How to encode; nothing of it but `storage` is in the files."""

    batch: int = 64  # pictures (images x views) of a step and process
    max_broken: int = 100
    storage: int = 0  # images of a storage shard of a new cache; 0 = by the number of images
    tokenizer_path: str = ""
    command: str = ""


@dataclass(frozen=True)
class Outcome:
    """What `encode` did in this start."""

    state: str  # "encoded", "already" (it was finished before), "stopped"
    card: Card
    finished: int = 0  # storage shards that are finished
    images: int = 0  # encoded in this start, by all ranks
    enlarged: int = 0  # of these, smaller than the resize asks for
    seconds: float = 0.0
    bytes: int = 0  # of ids on the disk
    reason: str = ""  # of stopping


@own_signals()
def encode(tokenizer: Encodes, source: Source, folder: Path, mesh: Mesh, options: Options) -> Outcome:
    """Make or continue the cache in `folder` until it is sealed, or until somebody asks to stop. Collective.

    ValueError for what the user has to change, RunError and CacheError for what went wrong; on all ranks. An OSError
    (a full disk) is raised on the rank that met it.
    """
    wanted = _card(tokenizer, source, mesh, options)
    card = on_first(lambda: writing.check(folder, wanted), mesh)
    if card is not None:
        return Outcome("already", card, card.num_shards)
    try:
        with ExitStack() as held:
            card, entries = on_first(lambda: _begin(folder, wanted, source, held), mesh)
            return _finish(tokenizer, source, folder, card, entries, mesh, options)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise writing.CacheError(
            f"the disk of {folder} is full ({error.strerror}): the storage shards that are finished stand; make room, "
            "and the same command goes on with the next"
        ) from error


def _finish(
    tokenizer: Encodes, source: Source, folder: Path, card: Card, entries: Entries, mesh: Mesh, options: Options
) -> Outcome:
    """Write what is missing, check everything, seal."""
    began = time.perf_counter()
    work = _Work(tokenizer, card, mesh, options, StopRequest(folder, mesh))
    work.broken = len(card.damage) + sum(len(entry["broken"]) for entry in entries.values())
    written = work.write_missing(source, folder, [shard for shard in range(card.num_shards) if shard not in entries])
    for lines, _ in written:
        entries |= lines
    work.stop.clear()
    outcome = Outcome("stopped", card, len(entries), work.images, work.enlarged, time.perf_counter() - began)
    if len(entries) < card.num_shards:
        return replace(outcome, reason=next(reason for _, reason in written if reason))
    mine = range(mesh.world.rank, card.num_shards, mesh.world.size)
    faults = ops.gather_objects(writing.verify(folder, card, entries, mine), mesh.world)
    every = [fault for found in faults for fault in found]
    card = on_first(lambda: writing.seal(folder, card, entries, every), mesh)
    return replace(outcome, state="encoded", card=card, bytes=sum(entry["bytes"] for entry in entries.values()))


def _card(tokenizer: Encodes, source: Source, mesh: Mesh, options: Options) -> Card:
    """The card of a new cache of these images; one blank sample is encoded to learn the grid."""
    config, index = source.config, source.index
    check_reads(tokenizer.signal.config, config)
    blank = torch.full((1, *config.shape), -1.0, device=mesh.device)
    shape, num_ids = tuple(tokenizer.encode(*tokenizer.signal.enter(blank)).shape[1:]), int(tokenizer.quantizer.num_ids)
    return Card(
        tokenizer=tokenizer.fingerprint,
        num_codes=int(tokenizer.quantizer.num_codes),
        num_ids=num_ids,
        grid=shape if num_ids == 1 else shape[:-1],
        views=source.views,
        num_images=len(index),
        source=index.fingerprint(),
        **config.card,
        digits=tokenizer.quantizer.digits or (),
        storage=options.storage or storage_for(len(index)),
        shards=config.patterns,
        tokenizer_path=options.tokenizer_path,
        command=options.command,
        commit=commit(),
        damage=tuple(index.samples.damage),
    )


def _begin(folder: Path, wanted: Card, source: Source, held: ExitStack) -> tuple[Card, Entries]:
    held.enter_context(own(folder, "the cache"))
    writing.check(folder, wanted)  # another one may have begun since it was looked at
    return writing.begin(folder, wanted, source.index.samples)


class _Work:
    """The encoding of storage shards; `images`, `broken` and `enlarged` count those of all ranks."""

    def __init__(self, tokenizer: Encodes, card: Card, mesh: Mesh, options: Options, stop: StopRequest) -> None:
        self.signal = tokenizer.signal
        self.tokenizer, self.card, self.mesh, self.options, self.stop = tokenizer, card, mesh, options, stop
        self.size = min(card.storage, max(1, options.batch // len(card.views)))  # images of a step
        self.steps = -(-card.storage // self.size)  # of a storage shard, also of a last short one
        self.images = self.broken = self.enlarged = 0
        self.stopped = False

    def write_missing(self, source: Source, folder: Path, missing: list[int]) -> list[tuple[Entries, str]]:
        """Encode and write these storage shards until all are written or a rank is asked to stop; of each rank the
        lines of its ledger and why it stopped, if it did.
        """
        card, rank, world = self.card, self.mesh.world.rank, self.mesh.world.size
        if not missing:  # killed before the seal
            return [({}, "")]
        rounds = -(-len(missing) // world)
        mine = [*missing[rank::world], None][:rounds]
        spans = [None if shard is None else card.span(shard) for shard in mine]
        writer = writing.Writer(folder, card, rank)
        progress = Progress(rounds * self.steps, rank=rank)
        there = card.num_images - sum(len(card.span(shard)) for shard in missing)
        progress.say(
            f"{there} of {card.num_images} images are encoded already; {len(card.views)} views of each, "
            f"{len(missing)} storage shards to go on {world} processes"
        )
        batches = timed(source.batches(lists(spans, card.storage, self.size), rank))
        try:
            for shard in mine:
                ids, broken, whole = self._encode(batches, writer.empty(), progress)
                if whole and shard is not None:
                    writer.write(shard, ids, broken)
                if not whole or self.stopped:
                    break
        finally:
            batches.close()
            progress.close()
        return ops.gather_objects((writer.entries, self.stop.reason), self.mesh.world)

    def _encode(
        self, batches: Iterator[tuple[ViewBatch, float]], ids: NDArray[np.int64], progress: Progress
    ) -> tuple[NDArray[np.int64], list[writing.Broken], bool]:
        """Fill `ids` with those of a storage shard; (ids, its broken images, whether it came to the end)."""
        broken: list[writing.Broken] = []
        for step in range(self.steps):
            batch, waited = next(batches)
            rows = step * self.size + batch.valid.nonzero().flatten().numpy()
            if len(rows) or self.mesh.codes.size > 1:
                pictures = batch.samples.flatten(0, 1).to(self.mesh.device, non_blocking=True)
                found = self.tokenizer.encode(*self.signal.enter(pictures)).cpu().unflatten(0, batch.samples.shape[:2])
                ids[rows] = found[batch.valid].numpy()
            broken += batch.broken
            done = self._agree(len(rows), len(batch.broken), batch.enlarged)
            progress.advance(done, waited)
            _check_broken(self.broken, broken, self.card, self.options)
            if self.stopped:
                return ids, broken, step == self.steps - 1
        return ids, broken, True

    def _agree(self, images: int, broken: int, enlarged: int) -> int:
        """Add up over all ranks what a step has done and whether one of them is asked to stop; the images of it."""
        counts = [float(images), float(broken), float(enlarged), float(self.stop.here())]
        done, met, small, asked = ops.sum_over(torch.tensor(counts, device=self.mesh.device), self.mesh.world).tolist()
        self.enlarged += int(small)
        self.images, self.broken, self.stopped = self.images + int(done), self.broken + int(met), asked > 0
        return int(done)


def _check_broken(total: int, here: list[writing.Broken], card: Card, options: Options) -> None:
    if total > options.max_broken:
        lines = [*card.damage[-3:], *(f"{key}: {reason}" for _, key, reason in here[-5:])]
        raise RunError(
            f"{total} images or shards are broken, --max-broken is {options.max_broken}: repair or leave out the "
            "shards, or raise --max-broken; what is finished stands. Met here:"
            + "".join(f"\n  {line}" for line in lines or ["none"])
        )


def summary(outcome: Outcome, folder: Path, world: int) -> str:
    """The closing line."""
    card = outcome.card
    if outcome.state == "stopped":
        return (
            f"stopped by {outcome.reason}: {outcome.finished} of {card.num_shards} storage shards of {folder} are "
            "finished; the same command goes on, on any number of processes"
        )
    views = len(card.views)
    ids = (card.num_images - len(card.broken)) * views * math.prod(card.ids_shape)
    what = (
        f"{card.num_images} images x {views} views x {' x '.join(map(str, card.ids_shape))} ids of {card.num_codes} "
        "codes"
    )
    left_out = f"; {len(card.broken)} broken images are left out, see {folder}/card.json" if card.broken else ""
    if outcome.state == "already":
        return f"{folder} is finished already: {what}{left_out}"
    if outcome.enlarged:
        left_out += f"; {outcome.enlarged} {_smaller(card)}"
    rate = outcome.images / max(outcome.seconds, 1e-9)
    return (
        f"encoded {what} in {folder}; {outcome.images} images in {outcome.seconds:.1f} s with {world} processes, "
        f"{rate:.1f} images/s, {outcome.bytes / max(ids, 1):.2f} bytes per id{left_out}"
    )


def _smaller(card: Card) -> str:
    if card.short_side:
        return f"images had a shorter side than {card.short_side} and were enlarged"
    return "samples were smaller than was asked for and were filled up"
