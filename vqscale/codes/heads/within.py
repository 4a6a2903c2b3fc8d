"""The softmax over the members of a token's cluster: loss and drawing, with the output rows of a flat head.

    p(id | h, cluster g) = exp(h . row_id) / sum over the members m of g of exp(h . row_m)

K does not appear: a token meets K / G rows. Tokens of one cluster are taken together, in tiles of a few, and a block of
tiles is one batched product, tiles x tokens x D with tiles x D x members; clusters of equal size fill it, others are
filled up with members that nobody has. Members lie on any rank, so what is merged and sent is as in flat.py: tokens
are gathered (N x D per rank), a few numbers per token are merged, N x D go back.

Memory is tokens x D and the blocks, which are made again in the backward pass.

Letters: P tiles, T tokens of a tile, n those that are there, S members; G clusters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqscale.codes import noise, scan
from vqscale.codes.clusters import Clusters, Members
from vqscale.codes.heads import restrict
from vqscale.codes.heads.base import Losses
from vqscale.codes.heads.draw import Rule, check_scores, guided
from vqscale.codes.heads.flat import Head
from vqscale.codes.merge import full_precision, merge_best, own, refuse_second_order
from vqscale.codes.rows import Rows
from vqscale.parallel import ops
from vqscale.parallel.clock import clock
from vqscale.parallel.mesh import Axis

MOST_TOKENS = 64  # of a tile


def losses(
    h_ND: Tensor,
    head: Head,
    clusters: Clusters,
    cluster_N: Tensor,
    targets_N: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    right: bool = False,
) -> Losses:
    """-log p(target | h, cluster) of each token in nats, as `Head.losses` over the members alone. Collective.

    The target is in the cluster. label_smoothing mixes it with the uniform distribution over the members. With `right`
    the same pass says which targets are the likeliest of their cluster, the lowest id among equals.
    """
    plan = _Plan(head.layout, head.axis, clusters.members(), label_smoothing, z_loss, head.outputs.budget, right)
    with clock.span("codes"), full_precision(h_ND):
        return Losses(*_Within.apply(h_ND, head.rows, cluster_N, targets_N, plan))


@torch.no_grad()
def sample(
    h_ND: Tensor,
    head: Head,
    clusters: Clusters,
    cluster_N: Tensor,
    keys_N: Tensor,
    rule: Rule,
    unguided_ND: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """ids_N drawn from the members of each token's cluster, as `Head.sample` draws from all; collective, no gradient.

    FloatingPointError on all ranks of the code group where logits are not finite.
    """
    with clock.span("codes"), full_precision(h_ND):
        x_ND = guided(h_ND.to(head.rows.dtype), unguided_ND, guidance)
        x_BD, cluster_B, keys_B = (ops.gather(x, head.axis) for x in (x_ND * rule.scale, cluster_N, keys_N))
        score_B = x_BD.new_full((len(x_BD),), scan.LOWEST)
        row_B = torch.zeros(len(x_BD), dtype=torch.int64, device=x_BD.device)
        for tiles in _tiles(cluster_B, clusters.members(), x_BD, head.outputs.budget):
            l_nS, token_n = tiles.logits(x_BD, head.rows)[-1][tiles.full_PT], tiles.token_PT[tiles.full_PT]
            if rule.restricts(head.num_codes):
                kept = restrict.keep(l_nS, rule.top_k, rule.top_p, head.num_codes, head.axis)
                restrict.mask_(l_nS, kept, head.axis)
            row_nS = tiles.each_token(tiles.row_PS)
            if rule.temperature:
                noise_nS = noise.gumbel_at(keys_B[token_n], row_nS + head.layout.start, l_nS.dtype)
                l_nS += noise_nS.masked_fill_(l_nS <= scan.LOWEST, 0.0)
            place_n1 = l_nS.argmax(1, keepdim=True)  # the first among equals
            score_B[token_n], row_B[token_n] = l_nS.gather(1, place_n1)[:, 0], row_nS.gather(1, place_n1)[:, 0]
        ids_B, top_B = merge_best(score_B, row_B, head.layout, head.axis)
        check_scores(top_B)
        return own(ids_B, head.axis)


@dataclass(frozen=True)
class _Plan:
    layout: Rows
    axis: Axis
    members: Members
    smoothing: float
    z_loss: float
    budget: int
    right: bool


@dataclass(frozen=True)
class _Tiles:
    """Some tiles of tokens of one cluster each, and the members of it on this rank."""

    token_PT: Tensor  # their places among B; where a tile is not full, those of others
    full_PT: Tensor  # and here False
    row_PS: Tensor
    here_PS: Tensor

    def each_token(self, x_PS: Tensor) -> Tensor:
        """What is known of the members of each tile, for each of its tokens."""
        return x_PS[:, None].expand(*self.full_PT.shape, -1)[self.full_PT]

    def logits(self, x_BD: Tensor, rows_kD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, rows, logits with LOWEST where nobody is a member)."""
        x_PTD = x_BD[self.token_PT]
        rows_PSD = rows_kD[self.row_PS] if len(rows_kD) else rows_kD.new_zeros(*self.row_PS.shape, rows_kD.shape[1])
        l_PTS = torch.bmm(x_PTD, rows_PSD.transpose(1, 2))
        return x_PTD, rows_PSD, l_PTS.masked_fill_(~self.here_PS[:, None], scan.LOWEST)


def _tiles(cluster_B: Tensor, members: Members, x_BD: Tensor, budget: int) -> Iterator[_Tiles]:
    """All tokens, those of the largest clusters first, in blocks within the budget: the same ones on every rank."""
    num, (num_tokens, dim), device = len(members.size_G), x_BD.shape, x_BD.device
    tokens = min(MOST_TOKENS, 1 << (max(1, -(-num_tokens // num)) - 1).bit_length())
    order_B = cluster_B.argsort(stable=True)
    count_G = torch.bincount(cluster_B, minlength=num)
    first_G, tiles_G = count_G.cumsum(0) - count_G, -(-count_G // tokens)
    cluster_P = torch.repeat_interleave(torch.arange(num, device=device), tiles_G)
    tile_P = torch.arange(len(cluster_P), device=device) - (tiles_G.cumsum(0) - tiles_G)[cluster_P]
    largest_P = members.most_G[cluster_P].argsort(stable=True, descending=True)
    cluster_P, tile_P = cluster_P[largest_P], tile_P[largest_P]
    sizes, at_T, first = members.most_G[cluster_P].tolist(), torch.arange(tokens, device=device), 0
    while first < len(sizes):
        bytes_of_one = x_BD.element_size() * (sizes[first] * (dim + 2 * tokens) + tokens * dim)
        some = slice(first, first + max(1, budget // (2 * bytes_of_one)))
        cluster_p = cluster_P[some]
        place_PT = (first_G[cluster_p] + tile_P[some] * tokens)[:, None] + at_T
        full_PT = place_PT < (first_G + count_G)[cluster_p][:, None]
        token_PT = order_B[place_PT.clamp(max=num_tokens - 1)]
        yield _Tiles(token_PT, full_PT, *_members_of(members, cluster_p, sizes[first]))
        first = some.stop


def _members_of(members: Members, cluster_P: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(rows of this rank in each cluster, which of them there are), P x most; 0 where there is none."""
    at_S = torch.arange(most, device=cluster_P.device)
    place_PS = members.start_H[cluster_P][:, None] + at_S
    here_PS = place_PS < members.start_H[cluster_P + 1][:, None]
    if not len(members.rows_k):
        return torch.zeros_like(place_PS), here_PS
    return torch.where(here_PS, members.rows_k[place_PS.clamp(max=len(members.rows_k) - 1)], 0), here_PS


class _Within(torch.autograd.Function):
    """`losses`, with its own backward pass, because autograd would keep the members of every tile."""

    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, rows_kD: Tensor, cluster_N: Tensor, targets_N: Tensor, plan: _Plan
    ) -> tuple[Tensor, ...]:
        axis = plan.axis
        h_BD, cluster_B, targets_B = (ops.gather(x, axis) for x in (h_ND, cluster_N, targets_N))
        mine_B, local_B = plan.layout.find(targets_B)
        x_BD, local_B = h_BD.to(rows_kD.dtype), torch.where(mine_B, local_B, -1)
        top_B = x_BD.new_full((len(x_BD),), scan.LOWEST)
        sum_B, target_B, mean_B = (x_BD.new_zeros(len(x_BD)) for _ in range(3))
        row_B = torch.zeros_like(targets_B)
        for tiles in _tiles(cluster_B, plan.members, x_BD, plan.budget):
            _, _, l_PTS = tiles.logits(x_BD, rows_kD)
            token_n, l_nS = tiles.token_PT[tiles.full_PT], l_PTS[tiles.full_PT]
            here_nS, row_nS = tiles.each_token(tiles.here_PS), tiles.each_token(tiles.row_PS)
            mean_B[token_n] = (l_nS * here_nS).sum(1)
            target_B[token_n] = (l_nS * (here_nS & (row_nS == local_B[token_n, None]))).sum(1)
            top_B[token_n] = l_nS.amax(1)
            if plan.right:
                row_B[token_n] = row_nS.gather(1, l_nS.argmax(1, keepdim=True))[:, 0]  # the first among equals
            sum_B[token_n] = (l_nS - l_nS.amax(1, keepdim=True)).exp().sum(1)
        most_B = ops.max_over(top_B, axis)
        sums = torch.stack([sum_B * torch.exp(top_B - most_B), target_B, mean_B])
        sum_B, target_B, mean_B = ops.sum_over(sums, axis)
        size_B = plan.members.size_G[cluster_B]
        lse_B = most_B + sum_B.log()
        loss_B = lse_B - (1.0 - plan.smoothing) * target_B + plan.z_loss * lse_B.square()
        if plan.smoothing:
            loss_B -= plan.smoothing * mean_B / size_B
        ctx.plan = plan
        ctx.save_for_backward(h_BD, rows_kD, lse_B, cluster_B, local_B)
        told = [loss_B, lse_B - target_B, lse_B.square()]
        if plan.right:
            told.append(merge_best(top_B, row_B, plan.layout, axis)[0] == targets_B)
        whole_N, *others = (own(x, axis).clone() for x in told)
        ctx.mark_non_differentiable(*others)
        return whole_N, *others

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        refuse_second_order("within.losses")
        # A backward pass runs under the autocast of whoever calls it.
        with clock.span("codes"), full_precision(grads[0]):
            h_BD, rows_kD, lse_B, cluster_B, local_B = ctx.saved_tensors
            plan, x_BD = ctx.plan, h_BD.to(rows_kD.dtype)
            g_B = ops.gather(grads[0], plan.axis)
            weight_B = 1.0 + 2.0 * plan.z_loss * lse_B
            even_B = plan.smoothing / plan.members.size_G[cluster_B].to(x_BD.dtype)
            dx_BD, drows_kD = torch.zeros_like(x_BD), torch.zeros_like(rows_kD)
            for tiles in _tiles(cluster_B, plan.members, x_BD, plan.budget):
                x_PTD, rows_PSD, u_PTS = tiles.logits(x_BD, rows_kD)
                at = tiles.token_PT
                u_PTS = u_PTS.sub_(lse_B[at][..., None]).exp_().mul_(weight_B[at][..., None])
                u_PTS -= even_B[at][..., None]
                here_PTS = tiles.row_PS[:, None] == local_B[at][..., None]
                u_PTS -= (1.0 - plan.smoothing) * here_PTS.to(u_PTS.dtype)
                u_PTS *= (g_B[at] * tiles.full_PT)[..., None]
                u_PTS.masked_fill_(~tiles.here_PS[:, None], 0.0)
                dx_BD.index_add_(0, at.flatten(), torch.bmm(u_PTS, rows_PSD).flatten(0, 1))
                if len(rows_kD):
                    drows_kD.index_add_(0, tiles.row_PS.flatten(), torch.bmm(u_PTS.mT, x_PTD).flatten(0, 1))
            dh_ND = ops.scatter_sum(dx_BD, plan.axis).to(h_BD.dtype)
            return dh_ND, drows_kD, None, None, None
