"""The blockwise passes of `Head.losses` over this rank's rows. Local arithmetic; flat_loss.py merges the ranks.

Logits are kept in bits, l_nj = h_n . row_j / ln 2, so that probabilities are powers of two, which a CPU makes faster
than exponentials. Between blocks stands the state of an online log-sum-exp. Products of 2 B k D operations, with B
tokens of the whole code group, k rows of this rank:

    logsumexp_forward     1   logits
    logsumexp_backward    3   logits again, gradient of h, gradient of the rows
    kept_backward         2   gradient of h, gradient of the rows

The last is for a loss whose gradient per token is known before it arrives (a weighted mean, and nothing else wants the
logits): some hundred tokens at a time, the first pass keeps the exponentials of all rows of this rank (`Kept`), the
ranks merge their normalisers, and the gradients are made at once. What is kept is relative to the best logit of a token
when it was made, a factor per token and block away from probabilities, and rounded where products are: a target with
most of the probability is the best, and its exponential is one, so that what is left of it is not lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vqscale.codes import scan
from vqscale.codes.config import Products
from vqscale.codes.products import LOW, add_product, operand, product
from vqscale.codes.scan import BITS, exp2_


@dataclass
class Targets:
    """Where the targets of B tokens are: rows of this rank (`mine`) and their local numbers, 0 where they are not."""

    mine_B: Tensor
    local_B: Tensor

    def some(self, tokens: slice) -> Targets:
        return Targets(self.mine_B[tokens], self.local_B[tokens])

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


# Whose exponentials are kept at once: with fewer, the gradient of the rows is read and written often.
LEAST_TOKENS = 512


def tokens_at_once(num_tokens: int, num_rows: int, dim: int, item_bytes: int, budget: int) -> int:
    """Of how many tokens the exponentials of all rows are kept at once; 0 where too few would fit.

    They may take the budget, or if that is too little for LEAST_TOKENS as much as the gradient of the rows in float32
    and its sum with another do.
    """
    least, each = min(num_tokens, LEAST_TOKENS), max(1, num_rows * item_bytes)
    if least * each > max(budget, 2 * 4 * num_rows * dim):
        return 0
    return max(least, min(num_tokens, scan.TOKEN_BLOCK, budget // each))


def kept_type(rows_kD: Tensor, products: Products) -> torch.dtype:
    """Of exponentials that are kept, which are an operand of products."""
    return LOW if products == "bf16" else rows_kD.dtype


class Kept:
    """2^(l - top) of some tokens with all rows of this rank, in the type of the products, block after block of rows."""

    def __init__(self, num_tokens: int, rows_kD: Tensor, products: Products) -> None:
        self.dtype = kept_type(rows_kD, products)
        self._flat = rows_kD.new_empty(num_tokens * len(rows_kD), dtype=self.dtype)
        self._tops: list[tuple[slice, Tensor]] = []

    def memory(self, num_tokens: int, rows: slice) -> scan.Buffer:
        return scan.Buffer(self._flat[num_tokens * rows.start : num_tokens * rows.stop])

    def begin(self) -> None:
        """Other tokens come, no more than the first ones."""
        self._tops.clear()

    def add(self, rows: slice, top_b: Tensor) -> None:
        """The block of these rows is in its memory, relative to this top."""
        self._tops.append((rows, top_b))

    def blocks(self, like: Tensor, lse_b: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(rows, probabilities in the type of `like`); what was kept is lost."""
        wide, num = scan.Buffer(), len(lse_b)
        for rows, top_b in self._tops:
            p_br = self.memory(num, rows).view(like, num, rows.stop - rows.start)
            if p_br.dtype != like.dtype:
                p_br = wide.view(like, *p_br.shape).copy_(p_br)
            p_br.mul_(torch.exp2(top_b - lse_b)[:, None])
            yield rows, p_br.clamp_min_(2.0 ** scan.LOWEST_BITS[p_br.dtype])  # as exp2_ says


def logsumexp_forward(
    x_BD: Tensor,
    rows_kD: Tensor,
    targets: Targets,
    products: Products,
    budget: int,
    best: bool = False,
    kept: Kept | None = None,
) -> LogSumExp:
    """The log-sum-exp over this rank's rows and the logits of the targets that it owns. With `kept`, of one block of
    tokens."""
    num = len(x_BD)
    top_B, sum_B, target_B = x_BD.new_full((num,), scan.LOWEST), x_BD.new_zeros(num), x_BD.new_zeros(num)
    best_B = torch.zeros(num, dtype=torch.int64, device=x_BD.device) if best else None
    buffer = scan.Buffer()
    for tokens, rows in scan.blocks_of(x_BD, len(rows_kD), budget):
        memory = None if kept is None else kept.memory(num, rows)
        into = buffer if memory is None or products == "bf16" else memory
        l_br = product(x_BD[tokens], rows_kD[rows].t(), products, BITS, into)
        here_b, column_b = targets.columns(tokens, rows)
        target_B[tokens] += l_br.gather(1, column_b[:, None])[:, 0] * here_b
        if best_B is None:
            top_b = torch.maximum(top_B[tokens], l_br.amax(1))
        else:
            value_b, row_b = l_br.max(1)
            best_B[tokens] = torch.where(value_b > top_B[tokens], row_b + rows.start, best_B[tokens])
            top_b = torch.maximum(top_B[tokens], value_b)
        sum_B[tokens] *= torch.exp2(top_B[tokens] - top_b)
        u_br = exp2_(l_br.sub_(top_b[:, None]))
        sum_B[tokens] += u_br.sum(1)
        top_B[tokens] = top_b
        if kept is not None:
            operand(u_br, products, memory)
            kept.add(rows, top_b)
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


class Sums:
    """The gradients of x and of the rows, each where it is wanted, while blocks are added to them.

    The factor g_n goes into what is small: tokens, not blocks.
    """

    def __init__(self, x_BD: Tensor, up: LogitGradient, dx_BD: Tensor | None, drows_kD: Tensor | None) -> None:
        self.up, self.dx_BD, self.drows_kD = up, dx_BD, drows_kD
        self._gx_BD = x_BD * up.g_B[:, None] if drows_kD is not None else None
        self._low = scan.Buffer()

    def add_block(
        self, p_br: Tensor, rows_kD: Tensor, at: Targets, tokens: slice, rows: slice, products: Products
    ) -> None:
        """Add what a block of probabilities gives; it is changed."""
        if self.up.p_weight_B is not None:
            p_br *= self.up.p_weight_B[tokens, None]
        if self.up.uniform_weight:
            p_br -= self.up.uniform_weight
        here_b, column_b = at.columns(tokens, rows)
        p_br.scatter_add_(1, column_b[:, None], (here_b.to(p_br.dtype) * -self.up.target_weight)[:, None])
        dl_br = operand(p_br, products, self._low)
        if self.dx_BD is not None:
            add_product(self.dx_BD[tokens], dl_br, rows_kD[rows], products)
        if self.drows_kD is not None and self._gx_BD is not None:
            add_product(self.drows_kD[rows], dl_br.t(), self._gx_BD[tokens], products)

    def close(self) -> None:
        if self.dx_BD is not None:
            self.dx_BD.mul_(self.up.g_B[:, None])


def logsumexp_backward(
    x_BD: Tensor,
    rows_kD: Tensor,
    targets: Targets,
    up: LogitGradient,
    wanted: tuple[bool, bool],
    products: Products,
    budget: int,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x (this rank's share over its rows) and of the rows (over all B tokens), each where it is wanted."""
    dx_BD = torch.zeros_like(x_BD) if wanted[0] else None
    drows_kD = torch.zeros_like(rows_kD) if wanted[1] else None
    sums, lse_B, buffer = Sums(x_BD, up, dx_BD, drows_kD), up.lse_B * BITS, scan.Buffer()
    for tokens, rows in scan.blocks_of(x_BD, len(rows_kD), budget):
        l_br = product(x_BD[tokens], rows_kD[rows].t(), products, BITS, buffer)
        p_br = exp2_(l_br.sub_(lse_B[tokens, None]))
        sums.add_block(p_br, rows_kD, targets, tokens, rows, products)
    sums.close()
    return dx_BD, drows_kD


def kept_backward(x_BD: Tensor, rows_kD: Tensor, at: Targets, kept: Kept, sums: Sums, products: Products) -> None:
    """Add to the sums what is kept of these tokens."""
    whole = slice(0, len(x_BD))
    for rows, p_br in kept.blocks(x_BD, sums.up.lse_B * BITS):
        sums.add_block(p_br, rows_kD, at, whole, rows, products)
    sums.close()
