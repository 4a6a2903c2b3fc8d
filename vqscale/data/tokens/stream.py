"""Batches of ids from a token cache, with the order and the state of data/samples.py: one number, the samples consumed.

Training step s takes positions [s * B, (s + 1) * B) of the order, rank r its r-th part, so the global batch is the same
on any number of ranks. Images without ids (broken when they were encoded) are left out of the order for good. A window
of storage shards is read at a time, each file once, while the one before is consumed; of it a rank keeps its own
samples in the views that were drawn. Nothing here communicates, and nothing here writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqscale.data.config_tokens import TokensConfig
from vqscale.data.order import Ints, Order, Sequential
from vqscale.data.tokens import format as form
from vqscale.data.tokens.contexts import ContextOf, Contexts
from vqscale.data.tokens.write import bad_rows
from vqscale.disk.arrays import open_array
from vqscale.errors import ExplainedError
from vqscale.seed import derive


@dataclass
class TokenBatch:
    """The b = global batch / world samples of one rank."""

    ids: Tensor  # (b, h, w) int64, or (b, h, w, num_ids); zero where not valid
    labels: Tensor  # (b,) int64; -1 = unknown
    keys: list[str]
    valid: Tensor  # (b,) bool; false only in evaluation, past the last sample
    numbers: Tensor  # (b,) int64: number of the image in the cache; -1 past the last
    views: Tensor  # (b,) int64: which view of it
    context: Tensor | None = None  # (b, ...) that the tokenizer was given beside each; of a cache only where asked for
    broken: list[str] = field(default_factory=list)  # of samples that are encoded as they come: see data/samples.py


class Cache:
    """A finished cache: its card, labels and keys in memory, ids on the disk."""

    def __init__(self, path: str | Path) -> None:
        """ValueError where there is none, where it is not finished, or where files are not those that were sealed."""
        self.path = Path(path).expanduser()
        card = form.read_card(self.path)
        if card is None:
            raise ValueError(
                f"there is no token cache in {self.path} (no card.json): change the path, or make one with "
                "vqscale encode TOKENIZER FOLDER --shards PATTERN"
            )
        self.card = card
        command = card.command or "vqscale encode"
        seal = form.sealed(self.path)
        if seal is None:
            done = len(form.finished(self.path, card))
            raise ValueError(
                f"the token cache in {self.path} is not finished: {done} of {card.num_shards} storage shards are "
                f"there, and no seal; the command that began it finishes it, on any number of processes: {command}"
            )
        damage = form.damage(self.path, seal)
        if damage:
            raise ValueError(
                f"the token cache in {self.path} is not what was sealed: {damage}; copy it again, or repair it with "
                f"the command that made it: {command}"
            )
        self.ids = form.open_ids(self.path, card)
        self.labels: Ints = open_array(self.path / "labels", (card.num_images,))[:]
        self._key_ends: Ints = open_array(self.path / "key_ends", (card.num_images,))[:]
        self._key_bytes = open_array(self.path / "key_bytes", (int(self._key_ends[-1]) if card.num_images else 0,))[:]

    def key(self, number: int) -> str:
        begin = int(self._key_ends[number - 1]) if number else 0
        text: bytes = self._key_bytes[begin : int(self._key_ends[number])].tobytes()
        return text.decode("utf-8", "backslashreplace")

    def block(self, shard: int, num_views: int = 1) -> NDArray[Any]:
        """The ids of the images of a storage shard in the first views, -1 for images without ids; ExplainedError where
        they cannot be read, or are no codes."""
        card, span = self.card, self.card.span(shard)
        try:
            found: NDArray[Any] = self.ids[span.start : span.stop, :num_views]
            wrong = bad_rows(found, card, [number - span.start for number, _, _ in card.broken if number in span])
        except Exception as error:  # a codec may raise anything on damaged data
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            path, how = form.shard_file(self.path, card, shard), "remove this file and repair the cache"
            raise ExplainedError(
                f"{path} was damaged after the cache was sealed ({wrong}): copy the cache again, or "
                f"{'draw it again' if card.prior else how} with the command that made it: {card.command}"
            )
        return found

    def first(self, count: int) -> NDArray[Any]:
        """The ids of so many images, at least one, in the first view; as `block`."""
        shards = range(-(-count // self.card.storage))
        return np.concatenate([self.block(shard)[:, 0] for shard in shards])[:count]

    def fingerprint(self) -> str:
        """Names the tokenizer, the images, their views and which are left out: all that the order and the ids follow
        from.
        """
        card = self.card
        left_out = [number for number, _, _ in card.broken]
        parts = (card.tokenizer, card.source, card.views, card.grid, card.image_size, card.short_side, card.storage)
        more = (card.reading,) if card.reading else ()
        return hashlib.blake2b(repr((*parts, card.interpolation, left_out, *more)).encode(), digest_size=16).hexdigest()

    def expect(
        self,
        tokenizer: str | None = None,
        num_codes: int | None = None,
        grid: tuple[int, ...] | None = None,
        num_ids: int | None = None,
    ) -> None:
        """ValueError with all that is not as expected; None is not asked for. `tokenizer` is a fingerprint, or how it
        begins.
        """
        card = self.card
        faults = []
        if tokenizer is not None and not (tokenizer and card.tokenizer.startswith(tokenizer)):
            faults.append(
                f"its ids come from the tokenizer with fingerprint {card.tokenizer} ({card.tokenizer_path}), the one "
                f"in use has {tokenizer}"
            )
        for what, there, here in (
            ("codes", card.num_codes, num_codes),
            ("positions along the sides (grid)", list(card.grid), None if grid is None else list(grid)),
            ("ids of a position", card.num_ids, num_ids),
        ):
            if here is not None and there != here:
                faults.append(f"it has {there} {what}, but expected are {here}")
        if faults:
            raise ValueError(
                f"the token cache in {self.path} does not fit:\n  " + "\n  ".join(faults) + "\ngive the cache of this "
                "tokenizer, or make it with vqscale encode"
            )


class TokenStream:
    """A rank's part of the batches of a cache. `rank` and `world` count all processes of the run; every rank has the
    same config and seed.
    """

    def __init__(
        self, config: TokensConfig, batch: int, rank: int = 0, world: int = 1, seed: int = 0, train: bool = True
    ) -> None:
        """`batch` is global: a rank takes batch / world. ValueError where the cache cannot be read."""
        if batch < 1 or batch % world:
            near = f"{batch // world * world or world} or {(batch // world + 1) * world}"
            raise ValueError(
                f"a global batch of {batch} images does not divide by {world} processes: "
                f"change the batch, for example to {near}, or the number of processes"
            )
        self.config, self.batch, self.rank, self.world, self.seed = config, batch, rank, world, seed
        self.cache = Cache(config.path)
        self.cache.expect(tokenizer=config.tokenizer)
        self.card = self.cache.card
        self.num_codes, self.num_ids, self.grid = self.card.num_codes, self.card.num_ids, self.card.grid
        self.tokenizer_fingerprint = self.card.tokenizer
        self.fingerprint = self.cache.fingerprint()
        good = np.ones(self.card.num_images, dtype=bool)
        good[[number for number, _, _ in self.card.broken]] = False
        self._images: Ints = np.flatnonzero(good)  # the order counts these
        self.num_samples = len(self._images)
        if not self.num_samples:
            raise ValueError(f"the token cache in {config.path} has no image with ids: encode other images")
        spans = [self.card.span(shard) for shard in range(self.card.num_shards)]
        counts = np.array([good[span.start : span.stop].sum() for span in spans])
        self.order = Order(counts, seed, config.window_shards) if train else Sequential(counts)
        self.num_views = len(self.card.views) if train and config.views == "all" else 1
        self.contexts = None if config.contexts is None else Contexts(config.contexts, self.card, config.path)
        self._context_of: ContextOf | None = None

    def begin(self, context_of: ContextOf) -> None:
        """What makes a context of a sample, before any batch of a cache that is read with contexts."""
        self._context_of = context_of

    def batches(self, consumed: int = 0) -> Iterator[TokenBatch]:
        """Training: endless, from sample number `consumed` of the run. Evaluation: from `consumed` to the last sample,
        each once, in order, with as many batches on every rank; what lies past the last sample has valid = False.
        """
        if self.contexts is None:
            return self._batches(consumed)
        assert self._context_of is not None, "begin comes first"
        return self.contexts.beside(self._batches(consumed), self._context_of, self.rank)

    def _batches(self, consumed: int) -> Generator[TokenBatch, None, None]:
        part = self.batch // self.world
        left = None if isinstance(self.order, Order) else max(0, -(-(self.num_samples - consumed) // self.batch))
        kept: list[_Piece] = []
        pieces = self._pieces(consumed)
        try:
            while left is None or left > 0:
                while sum(len(piece.ids) for piece in kept) < part:
                    piece = next(pieces, None)
                    if piece is None:  # the end of an evaluation
                        break
                    kept.append(piece)
                joined = _Piece.join(kept, self.card)
                yield self._batch(joined.cut(0, part), part)
                kept = [joined.cut(part, len(joined.ids))]
                left = None if left is None else left - 1
        finally:
            pieces.close()

    def _batch(self, piece: _Piece, size: int) -> TokenBatch:
        there, more = len(piece.ids), size - len(piece.ids)
        ids = np.zeros((size, *self.card.ids_shape), dtype=np.int64)
        ids[:there] = piece.ids
        labels = np.pad(self.cache.labels[piece.numbers], (0, more), constant_values=-1)
        return TokenBatch(
            torch.from_numpy(ids),
            torch.from_numpy(labels.astype(np.int64)),
            [self.cache.key(int(number)) for number in piece.numbers] + [""] * more,
            torch.arange(size) < there,
            torch.from_numpy(np.pad(piece.numbers, (0, more), constant_values=-1)),
            torch.from_numpy(np.pad(piece.views, (0, more))),
        )

    def _pieces(self, consumed: int) -> Generator[_Piece, None, None]:
        """This rank's samples from `consumed` on, a window of the order at a time; the next is read meanwhile."""
        with ThreadPoolExecutor(1, thread_name_prefix="tokens") as pool:
            coming: Future[_Piece] | None = None
            number = consumed
            while coming is not None or self._within(number):
                current, coming = coming, None
                if self._within(number):
                    epoch, begin, window = self.order.stretch(number)
                    coming = pool.submit(self._read, epoch, self._mine(number, begin, window, consumed))
                    number = begin + len(window)
                if current is not None:
                    yield current.result()

    def _within(self, number: int) -> bool:
        return isinstance(self.order, Order) or number < self.num_samples

    def _mine(self, number: int, begin: int, window: Ints, consumed: int) -> Ints:
        """Of a window that begins at position `begin`, the images from position `number` on that fall to this rank."""
        positions = np.arange(number, begin + len(window))
        ranks = (positions - consumed) % self.batch // (self.batch // self.world)
        return self._images[window[number - begin :][ranks == self.rank]]

    def _read(self, epoch: int, numbers: Ints) -> _Piece:
        """The ids of these images in the views drawn for the epoch; every storage shard is read once."""
        ids = np.empty((len(numbers), *self.card.ids_shape), dtype=self.card.dtype)
        views = np.zeros(len(numbers), dtype=np.int64)
        shards = numbers // self.card.storage
        for shard in np.unique(shards):
            at, span = np.flatnonzero(shards == shard), self.card.span(int(shard))
            rows = numbers[at] - span.start
            views[at] = self.draw(epoch, int(shard))[rows]
            ids[at] = self.cache.block(int(shard), self.num_views)[rows, views[at]]
        return _Piece(ids, numbers, views)

    def draw(self, epoch: int, shard: int) -> Ints:
        """The view of each image of a storage shard in an epoch: a pure function of the seed."""
        raw = np.random.PCG64(derive("views", self.seed, epoch, shard)).random_raw(self.card.storage)
        return np.asarray(raw % np.uint64(self.num_views)).astype(np.int64)


@dataclass
class _Piece:
    """Some samples of this rank, in the order in which they are consumed."""

    ids: NDArray[Any]
    numbers: Ints
    views: Ints

    def cut(self, begin: int, end: int) -> _Piece:
        return _Piece(self.ids[begin:end], self.numbers[begin:end], self.views[begin:end])

    @staticmethod
    def join(pieces: list[_Piece], card: form.Card) -> _Piece:
        if len(pieces) == 1:
            return pieces[0]
        none = _Piece(np.empty((0, *card.ids_shape), card.dtype), np.empty(0, np.int64), np.empty(0, np.int64))
        names = ("ids", "numbers", "views")
        return _Piece(*(np.concatenate([getattr(piece, name) for piece in (none, *pieces)]) for name in names))
