"""Where ids come from, without torch: a cache of them (data/tokens/), or a medium whose samples a tokenizer encodes."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vqscale.config import Free, OneOf
from vqscale.data.config import MEDIA, MediumConfig, ShardsConfig


@dataclass(frozen=True)
class TokensConfig:
    """A token cache: ids of images that `vqscale encode` has encoded."""

    without_name: ClassVar[bool] = True  # where ids are asked for, configs without a medium are of caches

    path: Free[str]
    "folder of the cache"
    views: Literal["all", "first"] = "all"
    "views that training draws from, one per sample and epoch; first = the centre alone; evaluation always takes it"
    window_shards: int = 64
    "storage shards whose samples are shuffled together; a rank holds its part of two windows in memory; 0 = all"
    tokenizer: str | None = None
    "fingerprint, or how it begins, that the tokenizer of the cache must have; null = not asked for"
    contexts: MediumConfig | None = None
    "shards that the cache was encoded from, for a prior whose condition is their contexts; null = ids alone"
    medium: Literal["tokens"] = "tokens"
    "ids that lie in a cache"

    def problems(self) -> Iterable[tuple[str, str]]:
        """(key, message) of all that cannot be read, as far as one can say without looking at the disk."""
        if not self.path:
            yield "path", "path is empty, which names no cache: give the folder that `vqscale encode` wrote"
        if self.window_shards < 0:
            yield (
                "window_shards",
                f"window_shards is {self.window_shards}, but must be at least 0 (all): raise window_shards",
            )


# Where ids come from: a cache of them, or a medium whose samples a tokenizer encodes.
SOURCES = ChainMap(MEDIA, {"tokens": "vqscale.data.config_tokens:TokensConfig"})
if TYPE_CHECKING:
    SourceConfig = TokensConfig | ShardsConfig
else:
    SourceConfig = OneOf(SOURCES)
