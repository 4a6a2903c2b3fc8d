"""The contexts of the images of a token cache, which the cache does not keep: they are read again, by number and view,
from the shards that it was encoded from. So a prior that is given contexts learns from ids that are computed once.

What a sample's context is only the tokenizer's signal knows: it comes as a function. Nothing here communicates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vqscale.data.config import ShardsConfig
from vqscale.data.tokens.format import Card
from vqscale.data.views import Source
from vqscale.errors import ExplainedError

if TYPE_CHECKING:
    from vqscale.data.tokens.stream import TokenBatch

ContextOf = Callable[[Tensor], Tensor]  # samples (b, C, *sides) -> what encoder and decoder see beside them


class Contexts:
    """The shards of a cache. ValueError where it was encoded from others, or read in another way."""

    def __init__(self, config: ShardsConfig, card: Card, path: str) -> None:
        kind = next((kind for kind, views in config.views.items() if views == card.views), next(iter(config.views)))
        self.source = source = Source(config, kind)
        read: dict[str, Any] = {"image_size": 0, "short_side": 0, "interpolation": "", "reading": (), **config.card}
        images: dict[str, Any] = {"num_images": len(source.index), "source": source.index.fingerprint()}
        if wrong := card.differences(replace(card, views=source.views, **images, **read)):
            raise ValueError(
                f"the token cache in {path} was encoded from {', '.join(card.shards) or 'other shards'}, and its "
                f"`contexts` are to be read from {', '.join(config.patterns)}: {'; '.join(wrong)} (there: in the "
                "cache, now: in the config); give the shards and the settings that it was encoded with"
            )

    def beside(
        self, batches: Iterator[TokenBatch], context_of: ContextOf, rank: int
    ) -> Generator[TokenBatch, None, None]:
        """The batches with their contexts. ExplainedError for a sample that had ids and cannot be read any more."""
        waiting: deque[TokenBatch] = deque()  # workers read ahead of what is taken

        def numbers() -> Iterator[list[int]]:
            for batch in batches:
                waiting.append(batch)
                yield batch.numbers.tolist()

        reading = self.source.batches(numbers(), rank)
        try:
            for found in reading:
                if found.broken:
                    raise ExplainedError(
                        f"{self.source.config.patterns[0]} and following: {found.broken[0][1]} was encoded and cannot "
                        f"be read any more ({found.broken[0][2]}): restore the shards, or encode the cache again"
                    )
                batch = waiting.popleft()
                yield replace(batch, context=context_of(found.samples[torch.arange(len(batch.views)), batch.views]))
        finally:
            reading.close()
