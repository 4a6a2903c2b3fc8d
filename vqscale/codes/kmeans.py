"""K-means over rows that are split over the ranks, plain and with clusters of equal size: the same to the last bit on
any number of ranks, and on any machine.

Arithmetic with real numbers would not be: sums depend on their order, and products on how they are blocked. So rows and
centres are rounded to whole numbers of so few bits (24 at 8 dimensions, 21 at 256) that every score is a whole number
below 2^53, which float64 holds exactly whatever the order. Ties are then ties, and go to the lowest number.

    euclid   the score of a row x at a centre c is 2 x.c - |c|^2, higher is nearer; a centre is the mean of its rows
    cosine   rows and centres have length one, and the score is x.c

Bytes: the G centres go to all in every iteration. Balanced clusters are a matching of all rows with all clusters, so a
score and a cluster of every row go to all in every round of it, 16 K bytes; rows do not.

Letters: G clusters, H those and one more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vqscale.codes import noise
from vqscale.codes.rows import Rows
from vqscale.parallel import ops
from vqscale.parallel.mesh import Axis
from vqscale.seed import derive

Metric = Literal["euclid", "cosine"]
METRICS: tuple[Metric, ...] = ("euclid", "cosine")
BLOCK_BYTES = 64 << 20
WORST = -(2.0**60)  # below every score


@dataclass(frozen=True)
class Method:
    """How codes are clustered."""

    num_clusters: int
    metric: Metric = "euclid"
    balanced: bool = False  # the sizes of clusters differ by one at most
    iterations: int = 25  # at most; it ends when no code changes its cluster
    seed: int = 0


@torch.no_grad()
def kmeans(rows_kD: Tensor, layout: Rows, axis: Axis, method: Method) -> Tensor:
    """The cluster of each row of this rank, cluster_k int64; collective on the code axis, and no cluster is empty.

    ValueError on all ranks for rows that are not finite, for more clusters than rows, and where fewer rows are
    different than there are clusters (plain ones: equal rows are then in one).
    """
    num = method.num_clusters
    if not 1 <= num <= layout.num_codes:
        raise ValueError(
            f"{num} clusters of {layout.num_codes} codes: each code is in one cluster, and none is empty; ask for 1 to "
            f"{layout.num_codes} clusters"
        )
    points = _Points(rows_kD, layout, axis, method.metric)
    centre_GD = points.rows(points.drawn(num, method.seed))
    room_G = _sizes(layout.num_codes, num).to(rows_kD.device) if method.balanced else None
    cluster_k = torch.full((layout.count,), -1, dtype=torch.int64, device=rows_kD.device)
    for _ in range(max(1, method.iterations)):
        before_k = cluster_k
        cluster_k, score_k = points.best(centre_GD) if room_G is None else points.matched(centre_GD, room_G)
        if not int(ops.sum_over((cluster_k != before_k).sum(), axis)):
            break
        centre_GD = points.centres(cluster_k, score_k, centre_GD)
    empty = int((points.counts(cluster_k, num) == 0).sum())
    if empty:
        raise ValueError(
            f"{empty} of the {num} clusters are empty after {method.iterations} iterations: rows that are equal are in "
            "one cluster, so ask for fewer clusters, or for balanced ones"
        )
    return cluster_k


def by_digits(radices: tuple[int, ...], num_clusters: int, layout: Rows, device: torch.device | None = None) -> Tensor:
    """The cluster of each row of this rank by the leading digits of its id, which is written in `radices`, the most
    significant first: clusters of equal size, whose codes agree in the channels of these digits.

    ValueError where no number of leading digits has so many values.
    """
    products = [math.prod(radices[:digits]) for digits in range(len(radices) + 1)]
    if num_clusters not in products or math.prod(radices) != layout.num_codes:
        raise ValueError(
            f"{num_clusters} clusters by digits, and ids of {layout.num_codes} codes have the digits "
            f"{' x '.join(map(str, radices))}, the first the most significant: ask for {', '.join(map(str, products))} "
            "clusters, or for another method"
        )
    ids_k = torch.arange(layout.start, layout.stop, device=device)
    return ids_k // (layout.num_codes // num_clusters)


def _sizes(num_codes: int, num_clusters: int) -> Tensor:
    return num_codes // num_clusters + (torch.arange(num_clusters) < num_codes % num_clusters).long()


class _Points:
    """The rows of this rank as whole numbers in float64, and what is computed on those of all ranks."""

    def __init__(self, rows_kD: Tensor, layout: Rows, axis: Axis, metric: Metric) -> None:
        self.layout, self.axis, self.metric = layout, axis, metric
        x_kD = rows_kD.double()
        if metric == "cosine":
            x_kD = x_kD / x_kD.square().sum(1, keepdim=True).sqrt().clamp_min(1e-300)
        size_k = x_kD.abs().amax(1).nan_to_num(math.inf, math.inf)
        largest = float(ops.max_over(torch.cat([size_k, size_k.new_zeros(1)]).max(), axis))
        if not math.isfinite(largest):
            raise ValueError(
                "the vectors of some codes are not finite, and have no nearest centre: give a tokenizer whose are"
            )
        bits = (51 - math.ceil(math.log2(rows_kD.shape[1]))) // 2
        self.scale = 2.0**bits / largest if largest else 1.0
        self.unit = 2.0**bits  # the length of a centre with cosine
        self.x_kD = (x_kD * self.scale).round()

    def drawn(self, num: int, seed: int) -> Tensor:
        """Ids of rows that are drawn without putting back, the same on every rank."""
        ids_k = torch.arange(self.layout.start, self.layout.stop, device=self.x_kD.device)
        ticket_k = noise.keys(derive(seed, "clusters"), ids_k) >> 11  # 53 bits are exact in float64
        return self._highest(ticket_k.double(), num)

    def rows(self, ids_P: Tensor) -> Tensor:
        """The rows of these ids, on every rank."""
        return ops.sum_over(self.layout.take(self.x_kD, ids_P), self.axis)

    def best(self, centre_GD: Tensor) -> tuple[Tensor, Tensor]:
        """(the nearest centre of each row, the lowest among equals; its score)."""
        return self._choose(self.x_kD, centre_GD, None, None)

    def matched(self, centre_GD: Tensor, room_G: Tensor) -> tuple[Tensor, Tensor]:
        """As `best`, but cluster g has room_G rows: the stable matching of rows with clusters, which both prefer by
        score, then by number. It is what taking all pairs (row, cluster) in that order would give.

        Rows ask at the best cluster that would have them; a full one keeps its best and sends the others away. Its bar
        is the score, and the id, of the worst that it keeps.
        """
        device = self.x_kD.device
        bar_G = torch.full(
            (len(room_G),), WORST, dtype=torch.float64, device=device
        )  # of the worst that a full one has
        last_G = torch.zeros_like(room_G)  # and its id
        cluster_k = torch.full((self.layout.count,), -1, dtype=torch.int64, device=device)
        score_k = torch.zeros(self.layout.count, dtype=torch.float64, device=device)
        while True:
            free_k = (cluster_k < 0).nonzero()[:, 0]
            bars = (bar_G, last_G)
            cluster_k[free_k], score_k[free_k] = self._choose(self.x_kD[free_k], centre_GD, bars, free_k)
            cluster_K, score_K = self._all(cluster_k), self._all(score_k)
            order_K = score_K.argsort(stable=True, descending=True)
            order_K = order_K[cluster_K[order_K].argsort(stable=True)]
            count_G = torch.bincount(cluster_K, minlength=len(room_G))
            first_G = count_G.cumsum(0) - count_G
            held_K = cluster_K[order_K]
            away_K = torch.arange(len(order_K), device=device) - first_G[held_K] >= room_G[held_K]
            if not bool(away_K.any()):
                return cluster_k, score_k
            full_G = count_G >= room_G
            worst_G = order_K[(first_G + room_G - 1).clamp(max=len(order_K) - 1)]
            bar_G = torch.where(full_G, score_K[worst_G], bar_G)
            last_G = torch.where(full_G, worst_G, last_G)
            mine_P, local_P = self.layout.find(order_K[away_K])
            cluster_k[local_P[mine_P]] = -1

    def centres(self, cluster_k: Tensor, score_k: Tensor, before_GD: Tensor) -> Tensor:
        """The centres of these clusters; an empty one goes to a row that is farthest from its own."""
        sums_GD = torch.zeros_like(before_GD, dtype=torch.int64)
        sums_GD.index_add_(0, cluster_k, self.x_kD.to(torch.int64))
        sums_GD = ops.sum_over(sums_GD, self.axis).double()
        count_G = self.counts(cluster_k, len(before_GD))
        centre_GD = sums_GD / count_G.clamp_min(1)[:, None]
        if self.metric == "cosine":
            length_G = centre_GD.square().sum(1, keepdim=True).sqrt()
            centre_GD = centre_GD * (self.unit / length_G.clamp_min(1.0))
        centre_GD = centre_GD.round()
        empty_G = (count_G == 0).nonzero()[:, 0]
        if len(empty_G):
            far_k = self.x_kD.square().sum(1) - score_k
            centre_GD[empty_G] = self.rows(self._highest(far_k, len(empty_G)))
        return centre_GD

    def counts(self, cluster_k: Tensor, num: int) -> Tensor:
        return ops.sum_over(torch.bincount(cluster_k, minlength=num), self.axis)

    def _choose(
        self, x_pD: Tensor, centre_GD: Tensor, bars: tuple[Tensor, Tensor] | None, local_p: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The best centre of some rows of this rank and its score; with bars, of those where a row is above."""
        cluster_p = torch.zeros(len(x_pD), dtype=torch.int64, device=x_pD.device)
        score_p = torch.zeros(len(x_pD), dtype=torch.float64, device=x_pD.device)
        square_G = centre_GD.square().sum(1)
        step = max(1, BLOCK_BYTES // (8 * len(centre_GD)))
        for first in range(0, len(x_pD), step):
            some = slice(first, first + step)
            s_bG = x_pD[some] @ centre_GD.t()
            if self.metric == "euclid":
                s_bG.mul_(2.0).sub_(square_G)
            if bars is not None and local_p is not None:
                bar_G, last_G = bars
                above_bG = (s_bG > bar_G) | ((s_bG == bar_G) & (local_p[some, None] + self.layout.start < last_G))
                s_bG.masked_fill_(~above_bG, WORST)
            cluster_p[some] = s_bG.argmax(1)
            score_p[some] = s_bG.gather(1, cluster_p[some, None])[:, 0]
        return cluster_p, score_p

    def _all(self, x_k: Tensor) -> Tensor:
        """The numbers of the rows of all ranks, in the order of ids."""
        widest = self.layout.most
        padded = torch.cat([x_k, x_k.new_zeros(widest - len(x_k))])
        parts = ops.gather(padded, self.axis).view(self.axis.size, widest)
        counts = [Rows(self.layout.num_codes, self.axis.size, rank).count for rank in range(self.axis.size)]
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def _highest(self, x_k: Tensor, num: int) -> Tensor:
        """The ids of the rows with the highest numbers, the lowest among equals, the same on every rank."""
        order_k = x_k.argsort(stable=True, descending=True)[:num]
        best_P = torch.full((num,), WORST * 2, dtype=torch.float64, device=x_k.device)
        ids_P = torch.zeros(num, dtype=torch.int64, device=x_k.device)
        best_P[: len(order_k)], ids_P[: len(order_k)] = x_k[order_k], order_k + self.layout.start
        every = ops.gather(best_P, self.axis).argsort(stable=True, descending=True)[:num]
        return ops.gather(ids_P, self.axis)[every]
