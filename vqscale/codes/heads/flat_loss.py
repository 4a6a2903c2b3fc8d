"""`Head.losses` and `Head.weighted` as a function with a backward pass of its own.

The blockwise passes over a rank's rows are in passes.py; here ranks are gathered and merged. Without weights the
gradient of every token's loss arrives in the backward pass, which makes the logits again. With weights a sum is what is
minimised, whose gradient per token is known but for one factor: gradients are made in the forward pass, some tokens at
a time (the ranks merge their normalisers between the two passes over them), and the backward pass multiplies by that.
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
    at_once: int = 0
    """tokens of which gradients are made at once, with weights; the same on all ranks"""


@dataclass
class _Tokens:
    """B tokens of the code group: what a rank knows of their losses, filled in by passes over its rows."""

    x_BD: Tensor  # in the type of the rows
    counts_B: Tensor
    at: passes.Targets
    shared: Shared | None
    lse_B: Tensor  # over all ranks, as the target's logit
    target_B: Tensor
    top_B: Tensor  # of this rank
    best_B: Tensor | None
    meant_BD: Tensor | None  # what targets that are shared mean, of the rows here

    @classmethod
    def of(cls, h_BD: Tensor, rows_kD: Tensor, targets_B: Tensor, plan: LossTerms) -> _Tokens:
        counts_B = targets_B != plan.ignore
        # Checked after the gather: what one rank sees all see, and nothing more is sent.
        check_ids(torch.where(counts_B, targets_B, 0), 0, plan.layout.num_codes, "targets", Axis(plan.axis.name))
        ids_B = torch.where(counts_B, targets_B, -1)
        shared = None if plan.neighbours is None else Shared.among(plan.neighbours, ids_B)
        meant_BD = None if shared is None else shared.row(rows_kD)
        x_BD = h_BD.to(rows_kD.dtype)
        lse_B, target_B, top_B = (x_BD.new_empty(len(x_BD)) for _ in range(3))
        best_B = torch.empty_like(targets_B) if plan.right else None
        at = passes.Targets(*plan.layout.find(ids_B))
        return cls(x_BD, counts_B, at, shared, lse_B, target_B, top_B, best_B, meant_BD)

    def pass_over(self, rows_kD: Tensor, tokens: slice, plan: LossTerms, kept: passes.Kept | None = None) -> None:
        """The first pass for these tokens, and the merge of the ranks."""
        x_bD, at = self.x_BD[tokens], self.at.some(tokens)
        found = passes.logsumexp_forward(x_bD, rows_kD, at, plan.products, plan.budget, plan.right, kept)
        top_b = ops.max_over(found.top_B, plan.axis)
        sums = torch.stack([found.sum_B * torch.exp(found.top_B - top_b), found.target_B])
        sum_b, self.target_B[tokens] = ops.sum_over(sums, plan.axis)
        self.lse_B[tokens], self.top_B[tokens] = top_b + sum_b.log(), found.top_B
        if self.best_B is not None and found.best_B is not None:
            self.best_B[tokens] = found.best_B

    def losses(self, rows_kD: Tensor, plan: LossTerms) -> tuple[Tensor, Tensor, Tensor]:
        """The first fields of Losses, of the tokens of this rank."""
        wanted_B, axis = self.target_B, plan.axis
        if self.meant_BD is not None:
            wanted_B = ops.sum_over((self.x_BD * self.meant_BD).sum(1), axis)
        loss_B = self.lse_B - (1.0 - plan.smoothing) * wanted_B + plan.z_loss * self.lse_B.square()
        if plan.smoothing:
            # The mean logit of a token is its product with the mean row.
            mean_D = ops.sum_over(rows_kD.sum(0), axis) / plan.layout.num_codes
            loss_B -= plan.smoothing * (self.x_BD @ mean_D)
        parts = (loss_B, self.lse_B - self.target_B, self.lse_B.square())
        whole_N, entropy_N, square_N = (own(torch.where(self.counts_B, part_B, 0.0), axis).clone() for part_B in parts)
        return whole_N, entropy_N, square_N

    def right(self, targets_B: Tensor, plan: LossTerms) -> Tensor | None:
        if self.best_B is None:
            return None
        ids_B, _ = merge_best(self.top_B, self.best_B, plan.layout, plan.axis)
        return own((ids_B == targets_B) & self.counts_B, plan.axis)


class FlatLoss(torch.autograd.Function):
    """(the weighted sum, or None without weights; the fields of Losses). The first of them has the gradient.

    Saved without weights are the gathered tokens in the type they came in, the rows, and a few numbers per token; with
    weights both gradients in the type of the rows, which are given away once.
    """

    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, rows_kD: Tensor, targets_N: Tensor, weight_N: Tensor | None, plan: LossTerms
    ) -> tuple[Any, ...]:
        h_BD, targets_B = ops.gather(h_ND, plan.axis), ops.gather(targets_N, plan.axis)
        found = _Tokens.of(h_BD, rows_kD, targets_B, plan)
        ctx.plan, ctx.shared, ctx.made, ctx.weighted = plan, found.shared, None, weight_N is not None
        ctx.type_of_h = h_ND.dtype
        if weight_N is not None and any(ctx.needs_input_grad[:2]):
            g_B = ops.gather(weight_N.to(found.x_BD.dtype), plan.axis) * found.counts_B
            dx_BD, drows_kD = _gradients_at_once(found, rows_kD, g_B, ctx.needs_input_grad, plan)
            ctx.made = None if dx_BD is None else ops.scatter_sum(dx_BD, plan.axis), drows_kD
        else:
            found.pass_over(rows_kD, slice(0, len(h_BD)), plan)
        if weight_N is None:
            ctx.save_for_backward(h_BD, rows_kD, found.lse_B, found.counts_B, found.at.mine_B, found.at.local_B)
        whole_N, *others = found.losses(rows_kD, plan)
        total = None if weight_N is None else (whole_N * weight_N.to(whole_N.dtype)).sum()
        right_N = found.right(targets_B, plan)
        fixed = [*others, *(() if right_N is None else (right_N,)), *(() if weight_N is None else (whole_N,))]
        ctx.mark_non_differentiable(*fixed)
        return total, whole_N, *others, right_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        refuse_second_order("Head.loss")
        # A backward pass runs under the autocast of whoever calls it.
        with clock.span("codes"), full_precision(grads[0] if ctx.weighted else grads[1]):
            made = _scaled(ctx, grads[0]) if ctx.weighted else _made_again(ctx, grads[1])
            return *made, None, None, None


def _gradients_at_once(
    found: _Tokens, rows_kD: Tensor, g_B: Tensor, wanted: tuple[bool, ...], plan: LossTerms
) -> tuple[Tensor | None, Tensor | None]:
    """The passes over the rows for all tokens, and with them the gradients of x (this rank's share) and of the rows,
    of sum_n g_n loss_n."""
    dx_BD = torch.zeros_like(found.x_BD) if wanted[0] else None
    drows_kD = torch.zeros_like(rows_kD) if wanted[1] else None
    kept = passes.Kept(min(plan.at_once, len(g_B)), rows_kD, plan.products)
    for first in range(0, len(g_B), plan.at_once):
        tokens = slice(first, min(first + plan.at_once, len(g_B)))
        kept.begin()
        found.pass_over(rows_kD, tokens, plan, kept)
        up = _logit_gradient(g_B[tokens], found.lse_B[tokens], found.shared, plan)
        sums = passes.Sums(found.x_BD[tokens], up, None if dx_BD is None else dx_BD[tokens], drows_kD)
        at = found.at.some(tokens)
        passes.kept_backward(found.x_BD[tokens], rows_kD, at, kept, sums, plan.products)
    if found.shared is not None:
        _add_shared(found.shared, found.meant_BD, found.x_BD, g_B, dx_BD, drows_kD, plan)
    return dx_BD, drows_kD


def _made_again(ctx: Any, g_N: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of h and of the rows, with the logits made again."""
    h_BD, rows_kD, lse_B, counts_B, mine_B, local_B = ctx.saved_tensors
    plan, g_B = ctx.plan, ops.gather(g_N, ctx.plan.axis) * counts_B
    up, at = _logit_gradient(g_B, lse_B, ctx.shared, plan), passes.Targets(mine_B, local_B)
    x_BD, wanted = h_BD.to(rows_kD.dtype), ctx.needs_input_grad[:2]
    dx_BD, drows_kD = passes.logsumexp_backward(x_BD, rows_kD, at, up, wanted, plan.products, plan.budget)
    if ctx.shared is not None:
        meant_BD = None if dx_BD is None else ctx.shared.row(rows_kD)
        _add_shared(ctx.shared, meant_BD, x_BD, g_B, dx_BD, drows_kD, plan)
    return None if dx_BD is None else ops.scatter_sum(dx_BD, plan.axis).to(h_BD.dtype), drows_kD


def _scaled(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the forward pass times what arrives, which is the same on all ranks; given away."""
    if ctx.made is None:
        raise RuntimeError(
            "the gradients of Head.weighted are made in its forward pass and given away in a backward pass, but there "
            "is a second one: take Head.losses, which makes them again, or leave retain_graph out"
        )
    (dh_ND, drows_kD), ctx.made = ctx.made, None
    _check_same(g, ctx.plan.axis)
    if g.device.type != "cpu" or float(g) != 1.0:  # it is 1 in every step without accumulation
        for part in (dh_ND, drows_kD):
            if part is not None:
                part.mul_(g.to(part.dtype))
    # Rounded after the factor: a scaled loss keeps numbers in the range of float16 that are below it without.
    return None if dh_ND is None else dh_ND.to(ctx.type_of_h), drows_kD


def _check_same(g: Tensor, axis: Axis) -> None:
    """ValueError on all ranks where the gradients that arrive differ; on a GPU the check fails inside the device."""
    if axis.size == 1:
        return
    g_M = ops.gather(g.reshape(1), axis)
    if g.device.type != "cpu":
        torch._assert_async((g_M == g).all() | ~g_M.isfinite().all(), "gradients of weighted losses differ on ranks")
    elif (g_M != g_M[0]).any() and g_M.isfinite().all():
        raise ValueError(
            f"the gradients that arrive at weighted losses are {g_M.tolist()}, from the ranks of a code group, and the "
            "gradient of the rows is made for one: put what differs into the weights of the tokens"
        )


def _logit_gradient(g_B: Tensor, lse_B: Tensor, shared: Shared | None, plan: LossTerms) -> passes.LogitGradient:
    return passes.LogitGradient(
        g_B=g_B,
        lse_B=lse_B,
        p_weight_B=1.0 + 2.0 * plan.z_loss * lse_B if plan.z_loss else None,
        target_weight=1.0 - plan.smoothing if shared is None else 0.0,
        uniform_weight=plan.smoothing / plan.layout.num_codes,
    )


def _add_shared(
    shared: Shared,
    meant_BD: Tensor | None,
    x_BD: Tensor,
    g_B: Tensor,
    dx_BD: Tensor | None,
    drows_kD: Tensor | None,
    plan: LossTerms,
) -> None:
    """Add what targets that are shared with neighbours give to the gradients."""
    g_B1 = g_B[:, None] * (1.0 - plan.smoothing)
    if dx_BD is not None and meant_BD is not None:
        dx_BD -= g_B1 * meant_BD
    if drows_kD is not None:
        shared.add_(drows_kD, -g_B1 * x_BD)
