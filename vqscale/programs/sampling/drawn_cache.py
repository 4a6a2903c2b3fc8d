"""Ids that a prior has drawn as a token cache, which a decoder learns from (drawn of a run).

    OUT/cache/      one view of every image, whose key is its number; the card says which prior has drawn the ids, and
                    of which tokenizer they are (data/tokens/format.py)

Written by one process when all parts are there. A start that was killed goes on with the next storage shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vqscale.data.tokens import write as writing
from vqscale.data.tokens.format import Card, storage_for
from vqscale.priors.base import Prior
from vqscale.programs.sampling import folder as sample_folder

if TYPE_CHECKING:
    from vqscale.tokenizer.model import Tokenizer


@dataclass(frozen=True)
class Numbered:
    """Images that have numbers for keys (writing.Named)."""

    labels: NDArray[np.int64]

    @property
    def key_bytes(self) -> NDArray[np.uint8]:
        return np.frombuffer(b"".join(self._keys()), np.uint8)

    @property
    def key_ends(self) -> NDArray[np.int64]:
        return np.cumsum([len(key) for key in self._keys()], dtype=np.int64)

    def _keys(self) -> Iterator[bytes]:
        return (f"{number:06d}".encode() for number in range(len(self.labels)))


def card(prior: Prior, tokenizer: Tokenizer, facts: Mapping[str, Any]) -> Card:
    """Of what these facts of samples say."""
    made_by = {key: facts[key]["fingerprint"] for key in ("prior", "tokenizer")}
    follows = json.dumps([made_by, facts["settings"]], sort_keys=True)
    return Card(
        # A decoder that was trained on decodes ids of the tokenizer that it began with.
        tokenizer=prior.card.get("tokenizer") or made_by["tokenizer"],
        num_codes=prior.num_codes,
        num_ids=prior.num_ids,
        grid=prior.grid,
        views=("drawn",),
        num_images=int(facts["settings"]["num_images"]),
        source=hashlib.blake2b(follows.encode(), digest_size=16).hexdigest(),
        storage=storage_for(int(facts["settings"]["num_images"])),
        digits=tokenizer.quantizer.digits or (),
        prior=made_by["prior"],
        tokenizer_path=facts.get("paths", {}).get("tokenizer", ""),
        command=facts.get("command", ""),
        commit=facts["commit"],
    )


def finish(folder: Path, facts: Mapping[str, Any], wanted: Card) -> None:
    """Put the parts of samples together as OUT/cache, sealed, and remove them."""
    place, settings = folder / sample_folder.CACHE, facts["settings"]
    labels = np.concatenate([*sample_folder.parts(folder, settings, "labels")])
    writing.check(place, wanted)
    made, entries = writing.begin(place, wanted, Numbered(labels))
    writer = writing.Writer(place, made)
    for shard, rows in enumerate(_blocks(sample_folder.parts(folder, settings, "ids"), made.storage)):
        if shard not in entries:
            ids = writer.empty()
            ids[: len(rows), 0] = rows
            writer.write(shard, ids)
    entries |= writer.entries
    writing.seal(place, made, entries, writing.verify(place, made, entries, range(made.num_shards)))
    sample_folder.close(folder, facts)


def _blocks(arrays: Iterable[NDArray[Any]], size: int) -> Iterator[NDArray[Any]]:
    """The rows of arrays that follow each other, so many at a time; the last ones may be fewer."""
    kept = next(arrays := iter(arrays))
    for array in arrays:
        while len(kept) >= size:
            yield kept[:size]
            kept = kept[size:]
        kept = np.concatenate([kept, array])
    for first in range(0, len(kept), size):
        yield kept[first : first + size]
