"""Ids of samples as they come: a frozen tokenizer encodes each batch of a medium's shards, so that every crop of every
epoch has ids of its own, and the context beside them (UViM's stage 2).

To a run that trains a prior it is what a token cache is (data/tokens/stream.py), and its order and its state are those
of the shards' stream: one number, whatever the number of processes. Ids are computed in float32, as `vqscale encode`
does. Ids and contexts lie where the tokenizer does; waiting for one counts the encoding as data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from vqscale.codes.rows import Rows
from vqscale.data.config import ShardsConfig
from vqscale.data.samples import SampleBatch, SampleStream
from vqscale.data.tokens.stream import TokenBatch
from vqscale.metrics import unigram
from vqscale.parallel.mesh import Mesh
from vqscale.tokenizer.model import Tokenizer

COUNTED = 4096  # samples whose ids are counted for the unigram, the first of the shards


class EncodedStream:
    """A rank's part of the batches of a data set and their ids. `begin` gives it the tokenizer, before any batch."""

    def __init__(
        self, config: ShardsConfig, batch: int, rank: int = 0, world: int = 1, seed: int = 0, train: bool = True
    ) -> None:
        self.config, self.batch = config, batch
        self.samples = SampleStream(config, batch, rank, world, seed, train)
        self._place = (rank, world)
        self._tokenizer: Tokenizer | None = None
        self._device = torch.device("cpu")
        self.tokenizer_fingerprint = ""

    def begin(self, tokenizer: Tokenizer, fingerprint: str, device: torch.device) -> None:
        """The tokenizer, which is only asked to encode, and its fingerprint, which takes a while to find."""
        self._tokenizer, self.tokenizer_fingerprint, self._device = tokenizer, fingerprint, device

    @property
    def fingerprint(self) -> str:
        """Names the samples and the tokenizer: all that the order and the ids follow from."""
        both = f"{self.samples.fingerprint} {self.tokenizer_fingerprint}"
        return hashlib.blake2b(both.encode(), digest_size=16).hexdigest()

    @property
    def whose(self) -> dict[str, Any]:
        """What a prior has learned from, for its run folder."""
        return {"shards": list(self.config.patterns), "fingerprint": self.fingerprint, "num_images": len(self)}

    def __len__(self) -> int:
        return self.samples.num_samples

    def batches(self, consumed: int = 0) -> Iterator[TokenBatch]:
        """As of SampleStream; on a code axis collective."""
        yield from map(self._encoded, self.samples.batches(consumed))

    @torch.no_grad()
    def _encoded(self, batch: SampleBatch) -> TokenBatch:
        assert self._tokenizer is not None, "begin comes first"
        samples = batch.samples.to(self._device, non_blocking=True)
        entered, *context = self._tokenizer.signal.enter(samples)
        return TokenBatch(
            self._tokenizer.encode(entered, *context),
            batch.labels,
            batch.keys,
            batch.valid,
            batch.numbers,
            torch.zeros_like(batch.numbers),
            context[0] if context else None,
            batch.broken,
        )

    def count(self, mesh: Mesh) -> Tensor:
        """counts_Ik: how often each code of this rank's rows occurs in the first COUNTED samples, not augmented.
        Collective."""
        assert self._tokenizer is not None, "begin comes first"
        quantizer = self._tokenizer.quantizer
        layout = Rows(quantizer.num_codes, mesh.codes.size, mesh.codes.rank)
        counts_Ik = torch.zeros(quantizer.num_ids, layout.count, dtype=torch.int64, device=mesh.device)
        plain = SampleStream(self.config, self.batch, *self._place, train=False)
        for batch in islice(plain.batches(), -(-COUNTED // self.batch)):
            ids = self._encoded(batch).ids
            there = batch.valid.to(ids.device).view(-1, *[1] * (ids.dim() - 1))
            counts_Ik += unigram.columns(torch.where(there, ids, -1), quantizer.num_ids, layout, mesh)
        return counts_Ik
