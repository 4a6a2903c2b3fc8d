"""Convex combinations of codes, relaxed: solve |x - C P|^2 + lam |P - onehot|^2 without constraints, then project.

The unconstrained minimum is P = onehot + C u with u = (G + lam I)^-1 (x - c_nearest) and G = C^T C, which is D x D: one
all-reduce of D^2 numbers. Its exact projection to the simplex (simplex.py) is another linear score with a threshold.
Sent are vectors of D numbers and a few single ones per token, and D^2 numbers.

Backward, with S the support, g the gradient of z = C^T P, v_j = c_j . g - mean_S(c . g) on S, and onehot constant:

    a = (G + lam I)^-1 C_S^T v,    dG = -sum_n a u^T
    dx = a,                        dc_j = v_j u + p_j g - [j = nearest] a + c_j (dG + dG^T)

so all rows get a gradient, through G. The objective is never below the exact one; that it is below the one of onehot
holds for tokens near the codes, not for every token far outside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqscale.codes.codebook import Codebook
from vqscale.codes.convex import simplex
from vqscale.codes.convex.simplex import Entries
from vqscale.codes.merge import full_precision, refuse_second_order
from vqscale.codes.rows import Rows
from vqscale.parallel import ops
from vqscale.parallel.clock import clock
from vqscale.parallel.mesh import Axis


@dataclass(frozen=True)
class _Relaxation:
    layout: Rows
    axis: Axis
    budget: int
    factor_DD: Tensor  # Cholesky factor of G + lam I, float64
    nearest_B: Tensor
    u_BD: Tensor  # float64
    entries: Entries


def combine(x_ND: Tensor, codebook: Codebook, lam: float) -> tuple[Tensor, Entries]:
    """C P of the tokens of this rank, with gradients to x and the rows, and the columns of P, sharded."""
    with clock.span("codes"), full_precision(x_ND):
        plan = _solve(x_ND.detach(), codebook, lam)
        return _Combine.apply(x_ND.to(codebook.rows.dtype), codebook.rows, plan), plan.entries


@torch.no_grad()
def _solve(x_ND: Tensor, codebook: Codebook, lam: float) -> _Relaxation:
    axis = codebook.axis
    nearest_N, _ = codebook.nearest(x_ND)
    nearest_ND = codebook.lookup(nearest_N)
    gram_DD = gram(codebook)
    gram_DD.diagonal().add_(lam)
    factor_DD = torch.linalg.cholesky_ex(gram_DD)[0]
    # A token that is not a number is its nearest code.
    finite_N1 = torch.isfinite(x_ND).all(1, keepdim=True)
    rest_ND = torch.where(finite_N1, x_ND.to(nearest_ND.dtype) - nearest_ND, 0.0).double()
    u_ND = torch.cholesky_solve(rest_ND.t(), factor_DD).t()
    score_N1 = (u_ND * nearest_ND).sum(1, keepdim=True)
    both_BD1, nearest_B = ops.gather(torch.cat([u_ND, score_N1], dim=1), axis), ops.gather(nearest_N, axis)
    u_BD, score_B = both_BD1[:, :-1].contiguous(), both_BD1[:, -1]
    entries = simplex.project(u_BD, nearest_B, score_B, codebook)
    return _Relaxation(codebook.layout, axis, codebook.budget, factor_DD, nearest_B, u_BD, entries)


@torch.no_grad()
def gram(codebook: Codebook) -> Tensor:
    """C^T C of all K rows, D x D in float64: one all-reduce."""
    rows_kD, dim = codebook.rows.detach(), codebook.dim
    out_DD = torch.zeros(dim, dim, dtype=torch.float64, device=rows_kD.device)
    for part in rows_kD.split(max(1, codebook.budget // (16 * dim))):
        out_DD += part.double().t() @ part.double()
    return ops.sum_over(out_DD, codebook.axis)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, rows_kD: Tensor, plan: _Relaxation) -> Tensor:
        ctx.save_for_backward(rows_kD)
        ctx.plan, entries = plan, plan.entries
        z_BD = entries.mixed(entries.weight_E, rows_kD, len(plan.nearest_B), plan.budget)
        return ops.scatter_sum(z_BD, plan.axis).to(x_ND.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order("a convex combination of codes")
        (rows_kD,) = ctx.saved_tensors
        with clock.span("codes"), full_precision(rows_kD):
            plan, entries, low = ctx.plan, ctx.plan.entries, rows_kD.dtype
            num, budget, axis = len(plan.nearest_B), plan.budget, plan.axis
            g_BD = ops.gather(grads[0], axis)
            slope_E = entries.products(g_BD, rows_kD, budget)
            sums_2B = torch.stack([entries.per_token(part, num) for part in (slope_E, torch.ones_like(slope_E))])
            sum_B, count_B = ops.sum_over(sums_2B, axis)
            slope_E = slope_E - (sum_B / count_B.clamp_min(1.0))[entries.token_E]
            back_ND = ops.scatter_sum(entries.mixed(slope_E, rows_kD, num, budget), axis)
            a_ND = torch.cholesky_solve(back_ND.t(), plan.factor_DD).t()
            a_BD = ops.gather(a_ND.contiguous(), axis)
            out_kD = entries.spread(slope_E, plan.u_BD.to(low), len(rows_kD), budget)
            out_kD += entries.spread(entries.weight_E, g_BD, len(rows_kD), budget)
            plan.layout.add_(out_kD, plan.nearest_B, -a_BD.to(low))
            gram_DD = a_BD.t() @ plan.u_BD
            out_kD.addmm_(rows_kD, -(gram_DD + gram_DD.t()).to(low))
            return a_ND.to(low), out_kD, None
