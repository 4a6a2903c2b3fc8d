"""The line that a prior has to be below: held-out ids, knowing how often each occurs in training and nothing else.

Frequencies are counted on the training cache, so that nothing of the held-out ids is known beforehand, and one is added
to every count, so that an id that was not met costs a finite number of nats. Counts lie where the rows lie.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vqscale.codes import tally
from vqscale.codes.rows import Rows
from vqscale.data.tokens.stream import TokenStream
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh

# Storage shards that are counted, evenly spread over the cache: of ImageNet in ten views 168 M ids, seconds to read.
# Counts of N ids cost about (K - 1) / 2N nats for not being exact: 0.0008 there with K = 262144.
COUNTED_SHARDS = 64


def count(stream: TokenStream, mesh: Mesh) -> Tensor:
    """How often each code of this rank's rows occurs in the training cache, in all views that are trained on: counts_k.

    Each rank reads its share of the storage shards. Collective.
    """
    card = stream.card
    layout = Rows(card.num_codes, mesh.codes.size, mesh.codes.rank)
    counts_k = torch.zeros(layout.count, dtype=torch.int64, device=mesh.device)
    num = min(COUNTED_SHARDS, card.num_shards)
    for first in range(0, num, mesh.world.size):
        number = first + mesh.world.rank
        block = stream.block(number * card.num_shards // num) if number < num else None
        for view in range(stream.num_views):
            ids = np.full((card.storage, *card.ids_shape), -1, dtype=np.int64)  # as many on every rank; -1 is nobody
            if block is not None:
                ids[: len(block)] = block[:, view]
            counts_k += tally.counts(torch.from_numpy(ids).flatten().to(mesh.device), layout, mesh)
    return counts_k


def cross_entropy(seen_k: Tensor, held_k: Tensor, num_codes: int, mesh: Mesh) -> float:
    """Nats of an id of those counted in `held_k`, given the counts of training: -log of (seen + 1) / (all seen + K).

    The same on every rank; collective on the code axis.
    """
    seen, held = ops.sum_over(torch.stack([seen_k.sum(), held_k.sum()]).double(), mesh.codes)
    nats_k = (seen + num_codes).log() - (seen_k + 1).double().log()
    return float(ops.sum_over((held_k * nats_k).sum(), mesh.codes) / held)
