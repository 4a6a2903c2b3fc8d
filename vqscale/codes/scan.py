"""The blockwise pass over this rank's rows. Local arithmetic: nothing here talks, nothing here is tokens x K.

Logits are l_nj = (x_n . key_j + bias_j) / T. What is done with them goes in blocks of tokens x rows whose size follows
a memory budget, with the state of an online softmax between blocks: the maximum, the sum of exponentials, the mean row.
The backward pass computes the logits again, block by block, as attention kernels do. Products of 2 B k D operations:

    best       1   logits
    mix        2   logits, mean row                            (+1 for the column sums of the probabilities)
    unmix      4   logits, values, gradients of x and keys  (+1 when the column sums have a gradient)

With B tokens of the whole code group, k rows of this rank, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TOKEN_BLOCK = 2048
LOWEST = -1e30  # below every logit, and finite: the state of an online softmax that has seen nothing
BUFFERS = 4  # tensors of block size that are alive at once in the worst pass (unmix)


def exp_(x: Tensor) -> Tensor:
    """exp in place, never below the smallest normal number: what underflows takes a CPU thirty times as long.

    A sum over K codes grows by less than K * 1e-37 (float32), far below the rounding of its largest term.
    """
    return x.clamp_min_(-87.0 if x.dtype == torch.float32 else -708.0).exp_()


@dataclass
class Keys:
    """What tokens are scored against: l = (x . keys + bias) / T. bias None is zero."""

    keys_kD: Tensor
    bias_k: Tensor | None = None


def quadratic(rows_kD: Tensor, form_DD: Tensor, budget: int) -> Tensor:
    """c^T form c for every row of this rank, k numbers, without a second k x D tensor."""
    out_k = rows_kD.new_empty(len(rows_kD))
    step = max(64, budget // (2 * rows_kD.element_size() * rows_kD.shape[1]))
    for first in range(0, len(rows_kD), step):
        block = rows_kD[first : first + step]
        out_k[first : first + step] = ((block @ form_DD) * block).sum(1)
    return out_k


@dataclass
class Softmax:
    """The state of an online softmax, per token, relative to the highest logit so far."""

    top_B: Tensor
    sum_B: Tensor  # sum_j exp(l_j - top)
    excess_B: Tensor  # sum_j exp(l_j - top) (l_j - top): with the sum it gives the entropy

    @staticmethod
    def empty(x_BD: Tensor) -> Softmax:
        num = len(x_BD)
        return Softmax(x_BD.new_full((num,), LOWEST), x_BD.new_zeros(num), x_BD.new_zeros(num))

    def raise_top(self, tokens: slice, top_b: Tensor) -> Tensor:
        """Make the state of `tokens` relative to a higher top; returns the factor that it was multiplied with."""
        fall_b = self.top_B[tokens] - top_b
        shrink_b = torch.exp(fall_b)
        self.excess_B[tokens] = shrink_b * (self.excess_B[tokens] + fall_b * self.sum_B[tokens])
        self.sum_B[tokens] *= shrink_b
        self.top_B[tokens] = top_b
        return shrink_b


def blocks(num_tokens: int, num_rows: int, item_bytes: int, budget: int) -> Iterator[tuple[slice, slice]]:
    """Slices of (tokens, rows), rows in order inside tokens; BUFFERS blocks of them fit into `budget` bytes."""
    tokens = max(1, min(num_tokens, TOKEN_BLOCK))
    rows = max(64, budget // (BUFFERS * item_bytes * tokens))
    for token in range(0, num_tokens, tokens):
        for row in range(0, num_rows, rows):
            yield slice(token, min(token + tokens, num_tokens)), slice(row, min(row + rows, num_rows))


def logits(x_BD: Tensor, keys: Keys, rows: slice, scale: float) -> Tensor:
    """scale * (x . keys + bias) for a block of rows."""
    out = torch.mm(x_BD, keys.keys_kD[rows].t())
    if keys.bias_k is not None:
        out += keys.bias_k[rows]
    return out if scale == 1.0 else out.mul_(scale)


def best(x_BD: Tensor, keys: Keys, budget: int) -> tuple[Tensor, Tensor]:
    """The highest score of each token over the rows of this rank and the lowest row that has it.

    Without rows the score is LOWEST and the row 0.
    """
    score_B = x_BD.new_full((len(x_BD),), LOWEST)
    row_B = torch.zeros(len(x_BD), dtype=torch.int64, device=x_BD.device)
    for tokens, rows in blocks(len(x_BD), len(keys.keys_kD), x_BD.element_size(), budget):
        _raise_best(logits(x_BD[tokens], keys, rows, 1.0), rows.start, score_B[tokens], row_B[tokens])
    return score_B, row_B


def _raise_best(score_br: Tensor, first_row: int, score_b: Tensor, row_b: Tensor) -> None:
    """Raise the best so far, in place; a later row must be strictly better, so ties go to the lowest."""
    value, row = score_br.max(dim=1)
    better = value > score_b
    score_b.copy_(torch.where(better, value, score_b))
    row_b.copy_(torch.where(better, row + first_row, row_b))


@dataclass
class Mixed:
    """What one rank knows after the forward pass, for all B tokens of the code group."""

    score_B: Tensor  # the best logit at temperature T
    row_B: Tensor
    soft: Softmax  # at T
    sum_BD: Tensor  # sum_j exp(l_j - top) value_j, to be divided by the merged sum
    sharp: Softmax | None  # at T / sharper


def mix(x_BD: Tensor, keys: Keys, values_kD: Tensor, temperature: float, sharper: float | None, budget: int) -> Mixed:
    """One pass: best row, softmax state and mean row at `temperature`, entropy state at temperature / `sharper`."""
    num = len(x_BD)
    out = Mixed(
        score_B=x_BD.new_full((num,), LOWEST),
        row_B=torch.zeros(num, dtype=torch.int64, device=x_BD.device),
        soft=Softmax.empty(x_BD),
        sum_BD=x_BD.new_zeros((num, values_kD.shape[1])),
        sharp=None if sharper is None else Softmax.empty(x_BD),
    )
    for tokens, rows in blocks(num, len(keys.keys_kD), x_BD.element_size(), budget):
        l_br = logits(x_BD[tokens], keys, rows, 1.0 / temperature)
        _raise_best(l_br, rows.start, out.score_B[tokens], out.row_B[tokens])
        # The best so far is the maximum so far: both softmaxes are kept relative to it.
        l_br -= out.score_B[tokens, None]
        shrink_b = out.soft.raise_top(tokens, out.score_B[tokens])
        if out.sharp is not None and sharper is not None:
            out.sharp.raise_top(tokens, out.score_B[tokens] * sharper)
            below_br = l_br * sharper
            q_br = exp_(below_br.clone())
            out.sharp.sum_B[tokens] += q_br.sum(1)
            out.sharp.excess_B[tokens] += q_br.mul_(below_br).sum(1)
        p_br = exp_(l_br)
        out.soft.sum_B[tokens] += p_br.sum(1)
        out.sum_BD[tokens] = torch.addmm(out.sum_BD[tokens] * shrink_b[:, None], p_br, values_kD[rows])
    return out


def column_sums(x_BD: Tensor, keys: Keys, scale: float, lse_B: Tensor, budget: int) -> Tensor:
    """sum_n exp(scale * (x_n . key_j + bias_j) - lse_n) for the rows of this rank: k numbers."""
    out_k = x_BD.new_zeros(len(keys.keys_kD))
    for tokens, rows in blocks(len(x_BD), len(out_k), x_BD.element_size(), budget):
        q_br = exp_(logits(x_BD[tokens], keys, rows, scale).sub_(lse_B[tokens, None]))
        out_k[rows] += q_br.sum(0)
    return out_k


def row_means(x_BD: Tensor, keys: Keys, scale: float, lse_B: Tensor, weight_k: Tensor, budget: int) -> Tensor:
    """sum_j q_nj weight_j over the rows of this rank, with q as in `column_sums`: B numbers."""
    out_B = x_BD.new_zeros(len(x_BD))
    for tokens, rows in blocks(len(x_BD), len(weight_k), x_BD.element_size(), budget):
        q_br = exp_(logits(x_BD[tokens], keys, rows, scale).sub_(lse_B[tokens, None]))
        out_B[tokens] += q_br @ weight_k[rows]
    return out_B


@dataclass
class Upstream:
    """Gradients that arrive at `unmix`, for all B tokens; every field may be absent."""

    mean_BD: Tensor | None  # of the mean row
    shift_B: Tensor | None  # g_mean . mean - g_lse: what the softmax's centring subtracts
    lse_B: Tensor  # log-normaliser at T
    entropy_B: Tensor | None  # gradient of the entropies
    entropy_value_B: Tensor | None
    columns_k: Tensor | None  # gradient of the column sums
    columns_mean_B: Tensor | None  # sum_j q_nj columns_j over all K
    sharp_lse_B: Tensor


@dataclass
class Gradients:
    x_BD: Tensor
    keys_kD: Tensor
    bias_k: Tensor | None


def unmix(
    x_BD: Tensor, keys: Keys, values_kD: Tensor, up: Upstream, temperature: float, sharper: float, budget: int
) -> Gradients:
    """The backward pass of `mix` and `column_sums`: all gradients sum into one block of logits before two products.

    dl = p o (g_mean . value - shift) + sharper * q o (columns - columns_mean - g_H (log q + H)); then
    dx = dl keys / T, dkeys = dl^T x / T, dbias = sum_n dl / T. x's gradient is this rank's share over its rows.
    """
    scale = 1.0 / temperature
    out = Gradients(
        torch.zeros_like(x_BD),
        torch.zeros_like(keys.keys_kD),
        None if keys.bias_k is None else torch.zeros_like(keys.bias_k),
    )
    for tokens, rows in blocks(len(x_BD), len(keys.keys_kD), x_BD.element_size(), budget):
        l_br = logits(x_BD[tokens], keys, rows, scale)
        dl_br = _logit_gradient(l_br, values_kD[rows], up, tokens, rows, sharper)
        dl_br *= scale
        out.x_BD[tokens].addmm_(dl_br, keys.keys_kD[rows])
        out.keys_kD[rows].addmm_(dl_br.t(), x_BD[tokens])
        if out.bias_k is not None:
            out.bias_k[rows] += dl_br.sum(0)
    return out


def _logit_gradient(
    l_br: Tensor, values_rD: Tensor, up: Upstream, tokens: slice, rows: slice, sharper: float
) -> Tensor:
    dq_br = None
    if up.entropy_B is not None or up.columns_k is not None:
        logq_br = l_br * sharper - up.sharp_lse_B[tokens, None]
        q_br = exp_(logq_br.clone())
        if up.entropy_B is not None:
            assert up.entropy_value_B is not None
            dq_br = logq_br.add_(up.entropy_value_B[tokens, None]).mul_(-up.entropy_B[tokens, None])
        if up.columns_k is not None:
            assert up.columns_mean_B is not None
            centred_br = up.columns_k[rows] - up.columns_mean_B[tokens, None]
            dq_br = centred_br if dq_br is None else dq_br.add_(centred_br)
        assert dq_br is not None
        dq_br.mul_(q_br).mul_(sharper)
    if up.shift_B is None:
        return dq_br if dq_br is not None else torch.zeros_like(l_br)
    p_br = exp_(l_br.sub_(up.lse_B[tokens, None]))
    if up.mean_BD is None:
        dl_br = p_br.mul_(-up.shift_B[tokens, None])
    else:
        dl_br = torch.mm(up.mean_BD[tokens], values_rD.t()).sub_(up.shift_B[tokens, None]).mul_(p_br)
    return dl_br if dq_br is None else dl_br.add_(dq_br)
