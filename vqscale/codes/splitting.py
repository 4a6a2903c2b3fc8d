"""Splitting of moving averages, after Linde, Buzo and Gray and as UViM does it: while a code has too small a count, the
one with the smallest takes half of the one with the largest, at nearly the same place.

Which codes are split is decided on every rank alike, from counts alone. What is sent: one number where no code is rare;
else, for S rare codes, S x M counts and ids, and S sums of D numbers. Not here: when, and what rows are made of sums.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import torch
from torch import Tensor

from vqscale.codes import noise
from vqscale.codes.codebook import look_up
from vqscale.codes.rows import Rows
from vqscale.parallel import ops
from vqscale.parallel.mesh import Axis

SPREAD = 1e-3  # the numbers of a new code are those of the split one, times 1 - SPREAD to 1 + SPREAD


class Splits(NamedTuple):
    """Of S rare codes that take over: their ids, whose sums they begin with; and all counts that change, by id."""

    ids: list[int]
    origins: list[int]
    counts: dict[int, float]


@torch.no_grad()
def split(counts_k: Tensor, sums_kD: Tensor, layout: Rows, axis: Axis, below: float, seed: int) -> Tensor:
    """Split in place until no count is less than `below`, or none is twice as large; collective.

    Returns the local rows that stand for something new.
    """
    num_rare = int(ops.sum_over((counts_k < below).sum(), axis))
    smallest, largest = _extremes(counts_k, layout, axis, num_rare) if num_rare else ([], [])
    found, device = _decide(smallest, largest, below), counts_k.device
    if not found.ids:
        return torch.zeros(0, dtype=torch.int64, device=device)
    ids_S, touched_T = (torch.tensor(list(ids), device=device) for ids in (found.ids, found.counts))
    origins_S = torch.tensor(found.origins, device=device)
    both_kE = torch.cat([sums_kD, counts_k[:, None].to(sums_kD.dtype)], 1)
    both_SE = look_up(both_kE, origins_S, layout, axis)
    noise_SD = noise.uniform(noise.keys(seed, ids_S), 0, sums_kD.shape[1]).to(sums_kD.dtype)
    means_SD = both_SE[:, :-1] / both_SE[:, -1:] * (1 + SPREAD * (2 * noise_SD - 1))

    mine_T, local_T = layout.find(touched_T)
    new_T = torch.tensor(list(found.counts.values()), dtype=counts_k.dtype, device=device)[mine_T]
    local_T = local_T[mine_T]
    sums_kD[local_T] *= (new_T / counts_k[local_T])[:, None].to(sums_kD.dtype)
    counts_k[local_T] = new_T
    mine_S, local_S = layout.find(ids_S)
    local_S = local_S[mine_S]
    sums_kD[local_S] = means_SD[mine_S] * counts_k[local_S, None].to(sums_kD.dtype)
    return local_S


def _extremes(counts_k: Tensor, layout: Rows, axis: Axis, num: int) -> list[list[tuple[float, int]]]:
    """(count, id) of the `num` smallest and of the `num` largest counts of all ranks, each best first, equal ones in
    the order of ids; the same on every rank."""
    found = []
    for sign in (1.0, -1.0):
        value_k = sign * counts_k.double()
        order = value_k.argsort(stable=True)[:num]
        value_S = torch.full((num,), torch.inf, dtype=torch.float64, device=counts_k.device)
        ids_S = torch.full((num,), -1, dtype=torch.int64, device=counts_k.device)
        value_S[: len(order)], ids_S[: len(order)] = value_k[order], order + layout.start
        every = zip(ops.gather(value_S, axis).tolist(), ops.gather(ids_S, axis).tolist(), strict=True)
        best = sorted((value, code) for value, code in every if code >= 0)[:num]
        found.append([(sign * value, code) for value, code in best])
    return found


def _decide(smallest: list[tuple[float, int]], largest: list[tuple[float, int]], below: float) -> Splits:
    heap = [(-count, code) for count, code in largest if count >= below]
    heapq.heapify(heap)
    splits, origin = Splits([], [], {}), dict[int, int]()
    for _, rare in smallest:
        if not heap or -heap[0][0] / 2 < below:
            break
        most, code = heapq.heappop(heap)
        origin[rare] = origin.get(code, code)
        splits.ids.append(rare)
        splits.origins.append(origin[rare])
        for half in (code, rare):
            splits.counts[half] = -most / 2
            heapq.heappush(heap, (most / 2, half))
    return splits
