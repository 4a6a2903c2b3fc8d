"""Convex combinations of codes, exactly: minimise |x - C P|^2 + lam |P - onehot|^2 over the simplex, per token.

onehot is the nearest code (the lowest id among equals). A solution has few codes, so columns are generated: with the
residual r = x - C P and the level theta = c_j . r - lam (p_j - onehot_j) that the support shares, a code off it
belongs to the solution if c_j . r > theta. One pass over the rows finds the best such code in each of 16 classes of
ids; their rows travel to the token's rank, which solves the small program over its support and these codes exactly
(active_set.py); until no code is better than TOLERANCE times the size of the slope, |r| max |c| + lam. Every pass
lowers the objective.

Per pass and open token, D numbers (r), the ids of its support, 16 scores and ids, and D numbers per new code are sent;
at the end the ids and weights of supports. K is in none of them, and nothing is tokens x K.

Three codes on a line, c = 0, 1, 3, and the token x = 1.9 with lam = 0.1. The nearest is c_1, so P begins as (0, 1, 0)
and r = 0.9. Scores c_j . r, with - lam (p_j - onehot_j) = 0 everywhere: 0, 0.9, 2.7; theta is that of the support, 0.9.
Code 2 is better by 1.8 and enters. On {1, 2} the minimum has equal scores 1 r - lam (p_1 - 1) = 3 r - lam p_2 with
r = 1.9 - p_1 - 3 p_2 and p_1 + p_2 = 1: p_2 = 0.9 / 2.1 = 0.43, r = 0.043, theta = 0.086. Code 0 scores 0: not
better, so P = (0, 0.57, 0.43) and z = 1.86. On the support every score is theta, off it none is above: these are the
KKT conditions.

The solution is differentiated on its support S with onehot constant. With A = C_S C_S^T + lam I, an upstream gradient g
of C P, v = (A^-1 - A^-1 1 1^T A^-1 / 1^T A^-1 1) C_S g and h = C_S^T v:

    dx = h,    dc_j = v_j r + p_j (g - h)

Suffixes: N tokens of this rank; n those of them that are worked on (unsolved, or a chunk); B tokens of the code group;
s slots of a support, slot 0 the nearest code's; q residue classes of ids; m new codes of a token; E entries, the pairs
(token, local row) with a positive weight on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.codes.codebook import Codebook
from vqscale.codes.convex import active_set, simplex
from vqscale.codes.convex.simplex import Entries
from vqscale.codes.merge import full_precision, own, refuse_second_order
from vqscale.codes.rows import Rows
from vqscale.parallel import ops
from vqscale.parallel.clock import clock
from vqscale.parallel.mesh import Axis

# Codes whose score is better by less than this share of the slope's size are left out: about the rounding of a score.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
# Supports have one or two codes per dimension. But many equal rows share a weight among all of them: supports stop
# growing here, and so do the passes. What is left, about lam / MOST of the objective, shows in the residual.
MOST, MOST_PER_DIM = 128, 4
FLOOR = 1e-13  # of |x - c|^2: float64 cannot tell a smaller lam from this
PASSES = 200


@dataclass
class Support:
    """What n tokens of this rank are made of: s slots each, the nearest code in slot 0, id -1 where there is none."""

    ids_Ns: Tensor
    weight_Ns: Tensor  # float64
    rows_NsD: Tensor

    def at(self, which_n: Tensor | slice) -> Support:
        return Support(self.ids_Ns[which_n], self.weight_Ns[which_n], self.rows_NsD[which_n])

    def widened(self, slots: int) -> Support:
        more = max(0, slots - self.ids_Ns.shape[1])
        return Support(
            F.pad(self.ids_Ns, (0, more), value=-1),
            F.pad(self.weight_Ns, (0, more)),
            F.pad(self.rows_NsD, (0, 0, 0, more)),
        )

    def joined(self, ids_nm: Tensor, rows_nmD: Tensor) -> Support:
        wide = self.widened(self.ids_Ns.shape[1] + ids_nm.shape[1])
        wide.ids_Ns[:, -ids_nm.shape[1] :] = ids_nm
        wide.rows_NsD[:, -ids_nm.shape[1] :] = rows_nmD
        return wide

    def trimmed(self) -> Support:
        """Without the slots whose weight is zero, but for slot 0."""
        keep_Ns = self.weight_Ns > 0
        keep_Ns[:, 0] = True
        order_Ns = torch.argsort((~keep_Ns).to(torch.uint8), dim=1, stable=True)[:, : int(keep_Ns.sum(1).amax())]
        ids_Ns = torch.where(keep_Ns, self.ids_Ns, -1).gather(1, order_Ns)
        rows_NsD = self.rows_NsD.gather(1, order_Ns[:, :, None].expand(-1, -1, self.rows_NsD.shape[2]))
        return Support(ids_Ns, self.weight_Ns.gather(1, order_Ns), rows_NsD)

    def put(self, which_n: Tensor, other: Support) -> Support:
        """These tokens with `other` in place of tokens `which_n`."""
        slots = max(self.ids_Ns.shape[1], other.ids_Ns.shape[1])
        out, new = self.widened(slots), other.widened(slots)
        out.ids_Ns[which_n], out.weight_Ns[which_n] = new.ids_Ns, new.weight_Ns
        out.rows_NsD[which_n] = new.rows_NsD
        return out


@dataclass
class Solution:
    """The answer for the tokens of this rank."""

    support: Support  # as wide as the widest of any rank
    residual_N: Tensor  # of the KKT conditions, as a share of the size of the slope
    passes: int  # over the rows


@dataclass
class _Slope:
    """Minus half the gradient of the objective at a point: scores c_j . r - lam (p_j - onehot_j)."""

    r_nD: Tensor
    theta_n: Tensor  # the scores' mean, weighted with p: at a solution every score on the support
    uneven_n: Tensor  # the largest distance of a score on the support from theta
    size_n: Tensor

    @staticmethod
    def of(x_nD: Tensor, support: Support, lam: float, longest: Tensor) -> _Slope:
        rows_nsD, p_ns = support.rows_NsD.double(), support.weight_Ns
        r_nD = x_nD - torch.einsum("ns,nsd->nd", p_ns, rows_nsD)
        score_ns = torch.einsum("nsd,nd->ns", rows_nsD, r_nD) - lam * p_ns
        score_ns[:, 0] += lam
        theta_n = (p_ns * score_ns).sum(1)
        uneven_n = torch.where(p_ns > 0, (score_ns - theta_n[:, None]).abs(), 0.0).amax(1)
        return _Slope(r_nD, theta_n, uneven_n, longest * r_nD.norm(dim=1) + lam)


@torch.no_grad()
def solve(x_ND: Tensor, codebook: Codebook, lam: float) -> Solution:
    """The supports and weights of the tokens of this rank. A token that is not a number is its nearest code."""
    axis = codebook.axis
    nearest_N, _ = codebook.nearest(x_ND)
    rows_ND = codebook.lookup(nearest_N)
    open_N = torch.isfinite(x_ND).all(1)
    x_ND = torch.where(open_N[:, None], x_ND.to(rows_ND.dtype), rows_ND).double()
    held = Support(nearest_N[:, None], torch.ones_like(x_ND[:, :1]), rows_ND[:, None])
    longest = simplex.longest(codebook)
    residual_N, passes = torch.zeros_like(x_ND[:, 0]), 0
    while True:
        # Tokens that are done are not sent; every rank sends as many as the one with the most, supports as wide.
        sizes = torch.stack([open_N.sum(), nearest_N.new_full((), held.ids_Ns.shape[1])])
        most, slots = ops.max_over(sizes, axis).tolist()
        if not most or passes == PASSES:
            return Solution(held.widened(slots), residual_N, passes)
        passes += 1
        which_n = torch.argsort((~open_N).to(torch.uint8), stable=True)[:most]
        here = held.at(which_n).widened(slots)
        found, residual_N[which_n], better_n = _improve(x_ND[which_n], here, codebook, lam, longest)
        held = held.put(which_n, found)
        open_N[which_n] = better_n & ((found.weight_Ns > 0).sum(1) < MOST + MOST_PER_DIM * codebook.dim)


def _improve(
    x_nD: Tensor, support: Support, codebook: Codebook, lam: float, longest: Tensor
) -> tuple[Support, Tensor, Tensor]:
    """One pass: (better supports, the residual before, which tokens were not yet solved)."""
    axis, low = codebook.axis, codebook.rows.dtype
    slope = _Slope.of(x_nD, support, lam, longest)
    score_Bq, ids_Bq = simplex.best_of_residues(
        ops.gather(slope.r_nD.to(low), axis), codebook, ops.gather(support.ids_Ns, axis)
    )
    over_nq = own(score_Bq, axis) - slope.theta_n[:, None]
    bar_n1 = (TOLERANCE[low] * slope.size_n)[:, None]
    some_nq = over_nq > bar_n1
    width = int(ops.max_over(F.pad(some_nq.sum(1), (0, 1)).amax(), axis))
    residual_n = torch.maximum(over_nq.amax(1).clamp_min(0.0), slope.uneven_n) / slope.size_n
    if not width:
        return support, residual_n, torch.zeros_like(some_nq[:, 0])
    order_nm = torch.argsort((~some_nq).to(torch.uint8), dim=1, stable=True)[:, :width]
    ids_nm = torch.where(some_nq, own(ids_Bq, axis), -1).gather(1, order_nm)
    rows_nmD = codebook.lookup(ids_nm.flatten()).unflatten(0, ids_nm.shape)
    # A score found in float32 may be better by rounding alone: the rows are here now, so look again.
    over_nm = torch.einsum("nmd,nd->nm", rows_nmD.double(), slope.r_nD) - slope.theta_n[:, None]
    over_nm = torch.where(ids_nm >= 0, over_nm, 0.0)
    some_n, better_n = some_nq.any(1), (over_nm > bar_n1).any(1)
    residual_n = torch.where(
        some_n, torch.maximum(over_nm.amax(1).clamp_min(0.0), slope.uneven_n) / slope.size_n, residual_n
    )
    wide = support.joined(ids_nm, rows_nmD)
    if bool(better_n.any()):
        which_n = torch.nonzero(better_n)[:, 0]
        part = wide.at(which_n)
        for some in _chunks(len(which_n), part.ids_Ns.shape[1], codebook.budget):
            part.weight_Ns[some] = _reweigh(x_nD[which_n[some]], part.at(some), lam)
        # New codes that got no weight have nothing to give beyond rounding.
        better_n[which_n] = (part.weight_Ns[:, -width:] > 0).any(1)
        wide.weight_Ns[which_n] = part.weight_Ns
    return wide.trimmed(), residual_n, better_n


def _chunks(num: int, slots: int, budget: int) -> Iterator[slice]:
    """Slices of tokens whose matrices of slots x slots, six at a time, fit into `budget` bytes."""
    size = max(1, budget // (48 * slots * slots))
    return (slice(first, first + size) for first in range(0, num, size))


def _program(x_nD: Tensor, support: Support, lam: float) -> tuple[Tensor, Tensor]:
    """(A, b) of the small programs. On the simplex c_j may be seen from x, which keeps A's entries small."""
    away_nsD = x_nD[:, None] - support.rows_NsD.double()
    gram_nss = torch.bmm(away_nsD, away_nsD.transpose(1, 2))
    diagonal_ns = gram_nss.diagonal(dim1=1, dim2=2)
    diagonal_ns += (FLOOR * diagonal_ns.amax(1, keepdim=True)).clamp_min(lam)
    linear_ns = torch.zeros_like(support.weight_Ns)
    linear_ns[:, 0] = lam
    return gram_nss, linear_ns


def _reweigh(x_nD: Tensor, support: Support, lam: float) -> Tensor:
    gram_nss, linear_ns = _program(x_nD, support, lam)
    return active_set.minimise(gram_nss, linear_ns, support.weight_Ns, support.ids_Ns >= 0)


def combine(x_ND: Tensor, codebook: Codebook, lam: float) -> tuple[Tensor, Entries, Solution]:
    """C P of the tokens of this rank, with gradients to x and the rows; the columns of P, sharded; how it was found."""
    with clock.span("codes"), full_precision(x_ND):
        solution = solve(x_ND.detach(), codebook, lam)
        entries, slot_E = _entries(solution.support, codebook.layout, codebook.axis)
        plan = _Problem(codebook.layout, codebook.axis, codebook.budget, lam)
        z_ND = _Combine.apply(x_ND.to(codebook.rows.dtype), codebook.rows, solution.support, entries, slot_E, plan)
        return z_ND, entries, solution


def _entries(support: Support, layout: Rows, axis: Axis) -> tuple[Entries, Tensor]:
    """The entries on this rank's rows, and their slots in the supports of their tokens."""
    ids_Bs, weight_Bs = ops.gather(support.ids_Ns, axis), ops.gather(support.weight_Ns, axis)
    mine_Bs, local_Bs = layout.find(ids_Bs)
    token_E, slot_E = torch.nonzero(mine_Bs & (weight_Bs > 0), as_tuple=True)
    return Entries(token_E, local_Bs[token_E, slot_E], weight_Bs[token_E, slot_E]), slot_E


@dataclass(frozen=True)
class _Problem:
    layout: Rows
    axis: Axis
    budget: int
    lam: float


class _Combine(torch.autograd.Function):
    """C P forward; backward the implicit gradient, from the rows of the supports that the tokens' rank has kept."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, rows_kD: Tensor, support: Support, entries: Entries, slot_E: Tensor, plan: _Problem
    ) -> Tensor:
        ctx.save_for_backward(x_ND)
        ctx.support, ctx.entries, ctx.slot_E, ctx.plan, ctx.shape = support, entries, slot_E, plan, rows_kD.shape
        return torch.einsum("ns,nsd->nd", support.weight_Ns, support.rows_NsD.double()).to(x_ND.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order("a convex combination of codes")
        (x_ND,) = ctx.saved_tensors
        with clock.span("codes"), full_precision(x_ND):
            plan, entries, low = ctx.plan, ctx.entries, x_ND.dtype
            part_Ns, h_ND, r_ND = _implicit(x_ND.double(), ctx.support, grads[0].double(), plan)
            part_E = ops.gather(part_Ns, plan.axis)[entries.token_E, ctx.slot_E]
            r_BD, rest_BD = ops.gather(torch.cat([r_ND, grads[0] - h_ND], 1).to(low), plan.axis).chunk(2, 1)
            rows_kD = entries.spread(part_E, r_BD, ctx.shape[0], plan.budget)
            rows_kD += entries.spread(entries.weight_E, rest_BD, ctx.shape[0], plan.budget)
            return h_ND.to(low), rows_kD, None, None, None, None


def _implicit(x_ND: Tensor, support: Support, g_ND: Tensor, plan: _Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(v_Ns, h_ND, r_ND) of the module's formulas, float64; local."""
    part_Ns, h_ND, r_ND = torch.zeros_like(support.weight_Ns), torch.zeros_like(x_ND), torch.zeros_like(x_ND)
    for some in _chunks(len(x_ND), support.ids_Ns.shape[1], plan.budget):
        here, rows_nsD = support.at(some), support.rows_NsD[some].double()
        gram_nss, _ = _program(x_ND[some], here, plan.lam)
        slope_ns = torch.einsum("nsd,nd->ns", rows_nsD, g_ND[some])
        part_Ns[some] = active_set.differentiate(gram_nss, here.weight_Ns > 0, slope_ns)
        h_ND[some] = torch.einsum("ns,nsd->nd", part_Ns[some], rows_nsD)
        r_ND[some] = x_ND[some] - torch.einsum("ns,nsd->nd", here.weight_Ns, rows_nsD)
    return part_Ns, h_ND, r_ND
