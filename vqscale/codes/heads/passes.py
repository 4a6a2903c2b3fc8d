"""The two blockwise passes of `Head.loss` over this rank's rows. Local arithmetic; flat.py merges the ranks.

Logits are kept in bits, l_nj = h_n . row_j / ln 2, so that probabilities are powers of two, which a CPU makes faster
than exponentials. Between blocks stands the state of an online log-sum-exp. Nothing is kept from the first pass to the
second but three numbers per token: logits are made again. Products of 2 B k D operations, with B tokens of the whole
code group, k rows of this rank:

    logsumexp_forward     1   logits
    logsumexp_backward    3   logits again, gradient of h, gradient of the rows

Gradients made in the first pass would save one of the four. They need the gradient of every token's loss before it
arrives (so a mean over all tokens and nothing else), blocks that span all rows of a rank, and the ranks' sums for each
of them: not done.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vqscale.codes import scan
from vqscale.codes.config import Products
from vqscale.codes.products import add_product, operand, product
from vqscale.codes.scan import BITS, exp2_


@dataclass
class Targets:
    """Where the targets of B tokens are: rows of this rank (`mine`) and their local numbers, 0 where they are not."""

    mine_B: Tensor
    local_B: Tensor

    def columns(self, tokens: slice, rows: slice) -> tuple[Tensor, Tensor]:
        """(which of the tokens have their target among these rows, its column; 0 where not)."""
        local_b = self.local_B[tokens]
        here_b = self.mine_B[tokens] & (local_b >= rows.start) & (local_b < rows.stop)
        return here_b, torch.where(here_b, local_b - rows.start, 0)


@dataclass
class LogSumExp:
    """What one rank knows of B tokens after the first pass: sum_j exp(l_j) = exp(top) * sum, and the target logits.

    In nats. Without rows the top is about LOWEST; a target logit is 0 where another rank owns it.
    """

    top_B: Tensor
    sum_B: Tensor
    target_B: Tensor
    best_B: Tensor | None
    """the first of the rows with the top logit, where it is asked for"""


def logsumexp_forward(
    x_BD: Tensor, rows_kD: Tensor, targets: Targets, products: Products, budget: int, best: bool = False
) -> LogSumExp:
    """The log-sum-exp over this rank's rows and the logits of the targets that it owns."""
    num = len(x_BD)
    top_B, sum_B, target_B = x_BD.new_full((num,), scan.LOWEST), x_BD.new_zeros(num), x_BD.new_zeros(num)
    best_B = torch.zeros(num, dtype=torch.int64, device=x_BD.device) if best else None
    buffer = scan.Buffer()
    for tokens, rows in scan.blocks_of(x_BD, len(rows_kD), budget):
        l_br = product(x_BD[tokens], rows_kD[rows].t(), products, BITS, buffer)
        here_b, column_b = targets.columns(tokens, rows)
        target_B[tokens] += l_br.gather(1, column_b[:, None])[:, 0] * here_b
        if best_B is None:
            top_b = torch.maximum(top_B[tokens], l_br.amax(1))
        else:
            value_b, row_b = l_br.max(1)
            best_B[tokens] = torch.where(value_b > top_B[tokens], row_b + rows.start, best_B[tokens])
            top_b = torch.maximum(top_B[tokens], value_b)
        sum_B[tokens] *= torch.exp2(top_B[tokens] - top_b)
        sum_B[tokens] += exp2_(l_br.sub_(top_b[:, None])).sum(1)
        top_B[tokens] = top_b
    return LogSumExp(top_B / BITS, sum_B, target_B / BITS, best_B)


@dataclass
class LogitGradient:
    """The gradient of the logits, dl_nj = g_n (p_weight_n p_nj - target_weight [j is n's target] - uniform_weight)."""

    g_B: Tensor
    lse_B: Tensor
    """the log-sum-exp over all K rows, in nats"""
    p_weight_B: Tensor | None
    """None is 1"""
    target_weight: float
    uniform_weight: float


def logsumexp_backward(
    x_BD: Tensor,
    rows_kD: Tensor,
    targets: Targets,
    up: LogitGradient,
    wanted: tuple[bool, bool],
    products: Products,
    budget: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x (this rank's share over its rows) and of the rows (over all B tokens), each where it is wanted.

    The factor g_n goes into what is small: tokens, not blocks.
    """
    dx_BD = torch.zeros_like(x_BD) if wanted[0] else None
    drows_kD = torch.zeros_like(rows_kD) if wanted[1] else None
    gx_BD = x_BD * up.g_B[:, None] if wanted[1] else None
    lse_B = up.lse_B * BITS
    buffer, low = scan.Buffer(), scan.Buffer()
    for tokens, rows in scan.blocks_of(x_BD, len(rows_kD), budget):
        l_br = product(x_BD[tokens], rows_kD[rows].t(), products, BITS, buffer)
        u_br = exp2_(l_br.sub_(lse_B[tokens, None]))
        if up.p_weight_B is not None:
            u_br *= up.p_weight_B[tokens, None]
        if up.uniform_weight:
            u_br -= up.uniform_weight
        here_b, column_b = targets.columns(tokens, rows)
        u_br.scatter_add_(1, column_b[:, None], (here_b.to(u_br.dtype) * -up.target_weight)[:, None])
        u_br = operand(u_br, products, low)
        if dx_BD is not None:
            add_product(dx_BD[tokens], u_br, rows_kD[rows], products)
        if drows_kD is not None and gx_BD is not None:
            add_product(drows_kD[rows], u_br.t(), gx_BD[tokens], products)
    return dx_BD if dx_BD is None else dx_BD.mul_(up.g_B[:, None]), drows_kD
