"""`Head.losses` as a function with a backward pass of its own.

The blockwise passes over a rank's rows are in passes.py; here ranks are gathered and merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqscale.codes.config import Products
from vqscale.codes.heads import passes
from vqscale.codes.heads.neighbours import Neighbours, Shared
from vqscale.codes.ids import check_ids
from vqscale.codes.merge import full_precision, merge_best, own, refuse_second_order
from vqscale.codes.rows import Rows
from vqscale.parallel import ops
from vqscale.parallel.clock import clock
from vqscale.parallel.mesh import Axis


@dataclass(frozen=True)
class LossTerms:
    layout: Rows
    axis: Axis
    smoothing: float
    z_loss: float
    ignore: int
    products: Products
    budget: int
    right: bool
    neighbours: Neighbours | None = None
    """with which a target is shared; None: it is alone"""


class FlatLoss(torch.autograd.Function):
    """`Head.loss` with its own backward pass, because autograd would keep tokens x K.

    Saved are the gathered tokens in the type they came in, the rows, and a few numbers per token.
    """

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, rows_kD: Tensor, targets_N: Tensor, plan: LossTerms) -> tuple[Any, ...]:
        axis, layout = plan.axis, plan.layout
        h_BD, targets_B = ops.gather(h_ND, axis), ops.gather(targets_N, axis)
        counts_B = targets_B != plan.ignore
        # Checked after the gather: what one rank sees all see, and nothing more is sent.
        check_ids(torch.where(counts_B, targets_B, 0), 0, layout.num_codes, "targets", Axis(axis.name))
        at = passes.Targets(*layout.find(torch.where(counts_B, targets_B, -1)))
        x_BD = h_BD.to(rows_kD.dtype)
        part = passes.logsumexp_forward(x_BD, rows_kD, at, plan.products, plan.budget, plan.right)
        top_B = ops.max_over(part.top_B, axis)
        shared = None
        if plan.neighbours is not None:
            shared = Shared.among(plan.neighbours, torch.where(counts_B, targets_B, -1))
        wanted = () if shared is None else ((x_BD * shared.row(rows_kD)).sum(1),)
        sums = torch.stack([part.sum_B * torch.exp(part.top_B - top_B), part.target_B, *wanted])
        sum_B, target_B, *wanted_B = ops.sum_over(sums, axis)
        lse_B = top_B + sum_B.log()
        loss_B = lse_B - (1.0 - plan.smoothing) * (wanted_B[0] if wanted_B else target_B) + plan.z_loss * lse_B.square()
        if plan.smoothing:
            # The mean logit of a token is its product with the mean row.
            mean_D = ops.sum_over(rows_kD.sum(0), axis) / layout.num_codes
            loss_B -= plan.smoothing * (x_BD @ mean_D)
        ctx.plan, ctx.shared = plan, shared
        ctx.save_for_backward(h_BD, rows_kD, lse_B, counts_B, at.mine_B, at.local_B)
        parts = (loss_B, lse_B - target_B, lse_B.square())
        whole_N, *others = (own(torch.where(counts_B, part_B, 0.0), axis).clone() for part_B in parts)
        right_N = None
        if part.best_B is not None:
            ids_B, _ = merge_best(part.top_B, part.best_B, layout, axis)
            right_N = own((ids_B == targets_B) & counts_B, axis)
        ctx.mark_non_differentiable(*others, *(() if right_N is None else (right_N,)))
        return whole_N, *others, right_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        refuse_second_order("Head.loss")
        # A backward pass runs under the autocast of whoever calls it.
        with clock.span("codes"), full_precision(grads[0]):
            h_BD, rows_kD, lse_B, counts_B, mine_B, local_B = ctx.saved_tensors
            plan, shared = ctx.plan, ctx.shared
            up = passes.LogitGradient(
                g_B=ops.gather(grads[0], plan.axis) * counts_B,
                lse_B=lse_B,
                p_weight_B=1.0 + 2.0 * plan.z_loss * lse_B if plan.z_loss else None,
                target_weight=1.0 - plan.smoothing if shared is None else 0.0,
                uniform_weight=plan.smoothing / plan.layout.num_codes,
            )
            at = passes.Targets(mine_B, local_B)
            x_BD, wanted = h_BD.to(rows_kD.dtype), ctx.needs_input_grad[:2]
            dx_BD, drows_kD = passes.logsumexp_backward(x_BD, rows_kD, at, up, wanted, plan.products, plan.budget)
            if shared is not None:
                g_B1 = up.g_B[:, None] * (1.0 - plan.smoothing)
                if dx_BD is not None:
                    dx_BD -= g_B1 * shared.row(rows_kD)
                if drows_kD is not None:
                    shared.add_(drows_kD, -g_B1 * x_BD)
            dh_ND = None if dx_BD is None else ops.scatter_sum(dx_BD, plan.axis).to(h_BD.dtype)
            return dh_ND, drows_kD, None, None
