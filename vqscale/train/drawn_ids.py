"""Ids that a prior has drawn, which a decoder is trained to do with (drawn of a run).

Every process has all of them in memory, four bytes each, and looks up those of its own images: which image gives drawn
ids its place in the batch says, and which ids its class and its key of the step. So they are the same on any number of
processes, and a run that goes on needs no state of them. Not here: what is made of them (tokenizer/model.py,
train/tokenizer.py), and who draws them (programs/sampling).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vqscale.codes import noise
from vqscale.data.tokens.stream import Cache
from vqscale.train import nulls
from vqscale.train.config import TokenizerRun
from vqscale.train.config.drawn_ids import DrawnIdsConfig

DRAWS = 5  # derives the keys of drawn ids from those of images, as SWAPS (codes/swaps.py) has 4


def check(config: TokenizerRun) -> None:
    """ValueError where the cache of a run cannot be read, is none of a prior, or is of other ids than the tokenizer's,
    as far as its config tells; before any process group."""
    if config.drawn is None:
        return
    there = nulls.made_of(nulls.without_codes(config.tokenizer), config.tokenizer.net, config.data.train.sides).ids
    cache = Cache(config.drawn.from_)
    cache.expect(None, there["num_codes"], tuple(there["grid"]), there["num_ids"])
    if not cache.card.prior:
        raise ValueError(
            f"drawn.from is {cache.path}, a cache of ids of images, and a decoder has those of its own images: draw "
            "some with vqscale sample PRIOR TOKENIZER OUT --ids, and give OUT/cache"
        )


class DrawnIds:
    """The drawn ids of a run. `images` are those that this process has at a time, the first of which stands at a
    multiple of so many in the batch; `own` are their places that keep their own ids."""

    def __init__(self, config: DrawnIdsConfig, images: int, device: torch.device) -> None:
        self.cache, self._device = Cache(config.from_), device
        count, place = config.count(images), torch.arange(images)
        drawn = (place + 1) * count // images > place * count // images  # spread evenly
        self._places, self.own = drawn.nonzero()[:, 0], (~drawn).nonzero()[:, 0].to(device)
        self._ids = self.cache.first(self.cache.card.num_images)
        self._by_label = np.argsort(self.cache.labels, kind="stable")
        self._labels = self.cache.labels[self._by_label]

    def fingerprint(self, images: str) -> str:
        """Names the drawn ids, and by their fingerprint the images beside them."""
        return hashlib.blake2b(f"{images} {self.cache.fingerprint()}".encode(), digest_size=16).hexdigest()

    def expect(self, ids_of: Sequence[str]) -> None:
        """ValueError where the ids are none of these tokenizers'."""
        card = self.cache.card
        if card.tokenizer not in ids_of:
            raise ValueError(
                f"the ids in {self.cache.path} (drawn.from) were drawn by the prior {card.prior}, which models those "
                f"of the tokenizer {card.tokenizer}, and init takes {' which is of '.join(ids_of)} (fingerprints): "
                "give ids of a prior of this one, or the other init.weights"
            )

    def ids(self, labels_B: Tensor, keys_B: Tensor) -> Tensor:
        """(B, *grid), or (B, *grid, num_ids): drawn ids where an image gives these, and -1 where it keeps its own.

        Labels and keys are the host's, and ids go to the device in a copy that neither of them waits for.
        """
        pinned = self._device.type == "cuda"
        ids = torch.full((len(keys_B), *self.cache.card.ids_shape), -1, pin_memory=pinned)
        numbers_n = self._numbers(labels_B[self._places].numpy(), keys_B[self._places])
        ids[self._places] = torch.from_numpy(self._ids[numbers_n].astype(np.int64))
        return ids.to(self._device, non_blocking=True)

    def _numbers(self, labels_n: np.ndarray, keys_n: Tensor) -> np.ndarray:
        """Of each image a number in the cache: any of its class, or any at all where none is."""
        low_n, high_n = (np.searchsorted(self._labels, labels_n, side) for side in ("left", "right"))
        low_n, high_n = np.where(high_n > low_n, (low_n, high_n), [[0], [len(self._labels)]])
        at_n = noise.uniform(noise.keys(DRAWS, keys_n), 0, 1, torch.float64)[:, 0].numpy() * (high_n - low_n)
        return self._by_label[np.minimum(low_n + at_n.astype(np.int64), high_n - 1)]
