"""Soft targets: a code shares what a loss wants of it with the codes nearest to it (SNCE, 2603.15150).

    w_ij = exp(-d_ij / (T s)) / (the sum of that over i's m neighbours)         j among the m codes nearest to i, and i

d is the squared distance of the codes' frozen vectors and s the mean of it from a code to the one nearest to it, so
that T has no unit. The paper takes distances from the latent, which a cache of ids does not have; here they are from
its code. The loss -sum_j w_ij log p(j) is exact: it has lse(h) as before, and one product of h with sum_j w_ij row_j.

Both tables, K x m, lie with the rows of their codes; for a token its m ids and weights are sent, whatever K is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vqscale.codes.rows import Rows
from vqscale.parallel import ops
from vqscale.parallel.mesh import Axis

QUERIES = 256  # codes of a rank that look for their neighbours at a time
BLOCK = 16384  # rows that they are compared with at a time


@dataclass(frozen=True)
class Neighbours:
    """Of this rank's codes: the m nearest of all K (-1 where there are fewer), and how they share a target."""

    ids_km: Tensor
    weights_km: Tensor
    layout: Rows
    axis: Axis

    def of(self, ids_B: Tensor) -> tuple[Tensor, Tensor]:
        """(ids_Bm, weights_Bm) for codes of any rank, the same ids on all; of nobody (-1) nobody. Collective."""
        mine_B, local_B = self.layout.find(ids_B)
        if not len(self.ids_km):
            mine_B = torch.zeros_like(mine_B)
        here_B = torch.nonzero(mine_B).squeeze(1)
        ids_Bm = ids_B.new_zeros(len(ids_B), self.ids_km.shape[1])
        weights_Bm = self.weights_km.new_zeros(ids_Bm.shape)
        ids_Bm[here_B], weights_Bm[here_B] = self.ids_km[local_B[here_B]] + 1, self.weights_km[local_B[here_B]]
        return ops.sum_over(ids_Bm, self.axis) - 1, ops.sum_over(weights_Bm, self.axis)


@dataclass(frozen=True)
class Shared:
    """Targets that are shared: of each token m ids, as far as this rank has their rows, and the weight of each."""

    local_Bm: Tensor
    weights_Bm: Tensor
    """0 where another rank has the row"""

    @classmethod
    def among(cls, neighbours: Neighbours, targets_B: Tensor) -> Shared:
        """Those of targets, -1 for none. Collective."""
        ids_Bm, weights_Bm = neighbours.of(targets_B)
        mine_Bm, local_Bm = neighbours.layout.find(ids_Bm)
        return cls(local_Bm, weights_Bm * mine_Bm)

    def row(self, rows_kD: Tensor) -> Tensor:
        """The weighted sum of the rows of each token, B x D, of those here; one neighbour after the other."""
        out_BD = rows_kD.new_zeros(len(self.local_Bm), rows_kD.shape[1])
        for local_B, weight_B in zip(self.local_Bm.T, self.weights_Bm.T, strict=True) if len(rows_kD) else ():
            out_BD.addcmul_(rows_kD[local_B], weight_B[:, None].to(rows_kD.dtype))
        return out_BD

    def add_(self, out_kD: Tensor, values_BD: Tensor) -> None:
        """out[row] += weight x value for every neighbour whose row is here, in place."""
        for local_B, weight_B in zip(self.local_Bm.T, self.weights_Bm.T, strict=True) if len(out_kD) else ():
            out_kD.index_add_(0, local_B, values_BD * weight_B[:, None].to(values_BD.dtype))


@torch.no_grad()
def find(rows_kF: Tensor, layout: Rows, axis: Axis, count: int, temperature: float) -> Neighbours:
    """The neighbours of every code by its vector, exactly: in float64, the lowest id among equals, a code itself first.

    2 K k F operations on each rank, once: with 2^16 codes of 16 numbers under a minute of one core. The same on any
    number of ranks, but where two distances are within rounding. Collective.
    """
    ids_km = torch.full((layout.count, count), -1, dtype=torch.int64, device=rows_kF.device)
    distance_km = torch.full((layout.count, count), torch.inf, dtype=torch.float64, device=rows_kF.device)
    for first in range(0, layout.most, QUERIES):
        # Every rank asks for as many, so that shapes are equal; what is beyond its rows is thrown away.
        asked = (torch.arange(first, first + QUERIES, device=rows_kF.device)).clamp(max=max(layout.count - 1, 0))
        own_qF = rows_kF[asked] if layout.count else rows_kF.new_zeros(QUERIES, rows_kF.shape[1])
        ids_B, x_BF = ops.gather(asked + layout.start, axis), ops.gather(own_qF.double(), axis)
        near_Bm, at_Bm = _among(x_BF, ids_B, rows_kF, layout, count)
        every = [ops.gather(part_Bm[None], axis) for part_Bm in (near_Bm, at_Bm)]
        near_BMm, at_BMm = (part_MBm.transpose(0, 1).flatten(1) for part_MBm in every)
        near_Bm, column_Bm = _least(near_BMm, count)
        mine = slice(QUERIES * axis.rank, QUERIES * axis.rank + max(0, min(QUERIES, layout.count - first)))
        ids_km[first : first + QUERIES] = at_BMm.gather(1, column_Bm)[mine]
        distance_km[first : first + QUERIES] = near_Bm[mine]
    return Neighbours(ids_km, _weights(distance_km, layout, axis, temperature).to(rows_kF.dtype), layout, axis)


def _among(x_BF: Tensor, ids_B: Tensor, rows_kF: Tensor, layout: Rows, count: int) -> tuple[Tensor, Tensor]:
    """(squared distances, ids) of the nearest of this rank's rows, in growing order; a code is at -inf from itself."""
    best_Bm = x_BF.new_full((len(x_BF), count), torch.inf)
    at_Bm = ids_B.new_full((len(x_BF), count), -1)
    for low in range(0, layout.count, BLOCK):
        y_RF = rows_kF[low : low + BLOCK].double()
        d_BR = torch.addmm(y_RF.square().sum(1), x_BF, y_RF.T, alpha=-2)  # but for |x|^2, which changes no order
        column_B = ids_B - layout.start - low
        itself_B = torch.nonzero((column_B >= 0) & (column_B < len(y_RF))).squeeze(1)
        d_BR[itself_B, column_B[itself_B]] = -torch.inf
        near_Bn, column_Bn = _least(d_BR, min(count, len(y_RF)))
        best_Bm, column_Bm = _least(torch.cat([best_Bm, near_Bn], 1), count)
        at_Bm = torch.cat([at_Bm, column_Bn + layout.start + low], 1).gather(1, column_Bm)
    return best_Bm + x_BF.square().sum(1, keepdim=True), at_Bm


def _least(values_BR: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(the `count` least of each row in growing order, their columns), the lowest column among equals."""
    near_Bn, column_Bn = values_BR.topk(min(count + 1, values_BR.shape[1]), largest=False)
    column_Bm = column_Bn[:, :count].sort(dim=1).values
    unsure_B = near_Bn[:, count - 1] == near_Bn[:, -1]  # which of equal ones topk takes is not said
    if near_Bn.shape[1] > count and unsure_B.any():
        column_Bm[unsure_B] = _least_with_ties(values_BR[unsure_B], count)
    values_Bm, order_Bm = values_BR.gather(1, column_Bm).sort(dim=1, stable=True)
    return values_Bm, column_Bm.gather(1, order_Bm)


def _least_with_ties(values_BR: Tensor, count: int) -> Tensor:
    """The columns of the `count` least of each row in growing order, the lowest among equals: ten times slower."""
    edge_B1 = values_BR.kthvalue(count, dim=1, keepdim=True).values
    below_BR, equal_BR = values_BR < edge_B1, values_BR == edge_B1
    room_B1 = count - below_BR.sum(1, keepdim=True)
    kept_BR = below_BR | (equal_BR & (equal_BR.cumsum(1) <= room_B1))
    return torch.nonzero(kept_BR)[:, 1].view(-1, count)


def _weights(distance_km: Tensor, layout: Rows, axis: Axis, temperature: float) -> Tensor:
    nearest_k = distance_km[:, 1:2]
    known = nearest_k.isfinite()
    sums = torch.stack([torch.where(known, nearest_k, 0.0).sum(), known.sum()])
    total, pairs = ops.sum_over(sums, axis)
    scale = (total / pairs.clamp(min=1)).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.softmax(-distance_km.clamp(min=0) / (temperature * scale), dim=1)
