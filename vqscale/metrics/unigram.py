"""The line that a prior has to be below: held-out ids, knowing how often each occurs in training and nothing else.

Frequencies are counted on the training cache, so that nothing of the held-out ids is known beforehand, and one is added
to every count, so that an id that was not met costs a finite number of nats. Counts lie where the rows lie. Where a
token has several ids, I of them, each is counted by itself, and the nats of a token are the sum over them.
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
    """counts_Ik: how often each code of this rank's rows occurs in the training cache, in all views trained on.

    Each rank reads its share of the storage shards. Collective.
    """
    card = stream.card
    layout = Rows(card.num_codes, mesh.codes.size, mesh.codes.rank)
    counts_Ik = torch.zeros(card.num_ids, layout.count, dtype=torch.int64, device=mesh.device)
    num = min(COUNTED_SHARDS, card.num_shards)
    for first in range(0, num, mesh.world.size):
        number = first + mesh.world.rank
        block = stream.cache.block(number * card.num_shards // num, stream.num_views) if number < num else None
        for view in range(stream.num_views):
            ids = np.full((card.storage, *card.ids_shape), -1, dtype=np.int64)  # as many on every rank; -1 is nobody
            if block is not None:
                ids[: len(block)] = block[:, view]
            counts_Ik += columns(torch.from_numpy(ids).to(mesh.device), card.num_ids, layout, mesh)
    return counts_Ik


def columns(ids: Tensor, num_ids: int, layout: Rows, mesh: Mesh) -> Tensor:
    """counts_Ik of ids of any shape, the ids of a token along the last dim where it has several; -1 is nobody."""
    ids_NI = ids.reshape(-1, num_ids)
    return torch.stack([tally.counts(ids_N.contiguous(), layout, mesh) for ids_N in ids_NI.unbind(1)])


def cross_entropy(seen_Ik: Tensor, held_Ik: Tensor, num_codes: int, mesh: Mesh) -> float:
    """Nats of a token of those counted in `held_Ik`, given the counts of training: -log of (seen + 1) / (all seen + K).

    The same on every rank; collective on the code axis.
    """
    seen_I, held_I = ops.sum_over(torch.stack([seen_Ik.sum(1), held_Ik.sum(1)]).double(), mesh.codes)
    nats_Ik = (seen_I[:, None] + num_codes).log() - (seen_Ik + 1).double().log()
    return float((ops.sum_over((held_Ik * nats_Ik).sum(1), mesh.codes) / held_I).sum())
