"""The blockwise pass over this rank's rows. Local arithmetic: nothing here talks, nothing here is tokens x K.

Scores are s_nj = x_n . key_j + bias_j. They are made in blocks of tokens x rows whose size follows a memory budget, in
one buffer, and what is needed of them is kept per token. Here: the blocks, the scores and the highest of them; the
softmax over all rows and its backward pass are in softmax/forward.py and softmax/backward.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TOKEN_BLOCK = 2048
LOWEST = -1e30  # below every logit, and finite: the state of an online softmax that has seen nothing
BUFFERS = 4  # tensors of block size that are alive at once in the worst pass (backward, with two temperatures)
BITS = 1.0 / math.log(2.0)  # bits per nat
LOWEST_BITS = {torch.float32: -126.0, torch.float64: -1022.0}
CPU_BLOCK = 2**22  # bytes of one block that the second-level caches of a few cores hold; larger measured slower


@dataclass
class Keys:
    """What tokens are scored against: s = x . keys + bias. bias None is zero."""

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


def blocks(num_tokens: int, num_rows: int, item_bytes: int, budget: int) -> Iterator[tuple[slice, slice]]:
    """Slices of (tokens, rows), rows in order inside tokens; BUFFERS blocks of them fit into `budget` bytes."""
    tokens = max(1, min(num_tokens, TOKEN_BLOCK))
    return cut(num_tokens, num_rows, tokens, max(64, budget // (BUFFERS * item_bytes * tokens) // 64 * 64))


def cut(num_tokens: int, num_rows: int, tokens: int, rows: int) -> Iterator[tuple[slice, slice]]:
    """Slices of so many (tokens, rows), the last ones shorter; rows in order inside tokens."""
    for token in range(0, num_tokens, tokens):
        for row in range(0, num_rows, rows):
            yield slice(token, min(token + tokens, num_tokens)), slice(row, min(row + rows, num_rows))


def blocks_of(x_BD: Tensor, num_rows: int, budget: int) -> Iterator[tuple[slice, slice]]:
    """`blocks` for these tokens; on a CPU no larger than what its caches hold."""
    budget = min(budget, BUFFERS * CPU_BLOCK) if x_BD.device.type == "cpu" else budget
    return blocks(len(x_BD), num_rows, x_BD.element_size(), budget)


def exp2_(x: Tensor) -> Tensor:
    """2^x in place, never below the smallest normal number: arithmetic with smaller ones is slow on many CPUs.

    A sum over K codes grows by less than K * 2^-126 (float32), far below the rounding of its largest term.
    """
    return x.clamp_min_(LOWEST_BITS[x.dtype]).exp2_()


class Buffer:
    """Memory for a block that is used again for every block of a pass; `flat` is a part of other memory for it."""

    def __init__(self, flat: Tensor | None = None) -> None:
        self._flat = flat

    def view(self, like: Tensor, tokens: int, rows: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tokens x rows tensor, of one type in the buffer's life; what was in the buffer is lost."""
        if self._flat is None or self._flat.numel() < tokens * rows:
            self._flat = like.new_empty(tokens * rows, dtype=dtype)
        return self._flat[: tokens * rows].view(tokens, rows)


def scores(x_bD: Tensor, keys: Keys, rows: slice, buffer: Buffer) -> Tensor:
    """x . keys + bias for a block of rows, in the buffer."""
    keys_rD = keys.keys_kD[rows]
    out_br = buffer.view(x_bD, len(x_bD), len(keys_rD))
    torch.mm(x_bD, keys_rD.t(), out=out_br)
    return out_br if keys.bias_k is None else out_br.add_(keys.bias_k[rows])


def best(x_BD: Tensor, keys: Keys, budget: int) -> tuple[Tensor, Tensor]:
    """The highest score of each token over the rows of this rank and the lowest row that has it.

    Without rows the score is LOWEST and the row 0.
    """
    score_B = x_BD.new_full((len(x_BD),), LOWEST)
    row_B = torch.zeros(len(x_BD), dtype=torch.int64, device=x_BD.device)
    buffer = Buffer()
    for tokens, rows in blocks_of(x_BD, len(keys.keys_kD), budget):
        s_br = scores(x_BD[tokens], keys, rows, buffer)
        update_best(s_br, line_peaks(s_br), rows.start, score_B[tokens], row_B[tokens])
    return score_B, row_B


LINE = 64  # columns of a block whose maximum is taken first: the place of a maximum is asked of one line only


def line_peaks(s_br: Tensor) -> Tensor:
    """The maximum of every line of a block, b x ceil(r / LINE); the last line may be short."""
    rows = s_br.shape[1]
    whole = rows - rows % LINE
    parts = [s_br[:, :whole].unflatten(1, (-1, LINE)).amax(2)] if whole else []
    if whole < rows:
        parts.append(s_br[:, whole:].amax(1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def update_best(s_br: Tensor, peak_bL: Tensor, first_row: int, score_b: Tensor, row_b: Tensor) -> None:
    """Take a block into the best so far, in place; a later row must be strictly better, so ties go to the lowest. What
    is not a number is better than all numbers, and stays: it reaches the result.
    """
    value_b, line_b = peak_bL.max(dim=1)  # the first among equals
    last = s_br.shape[1] - 1
    column_bl = (line_b * LINE)[:, None] + torch.arange(LINE, device=s_br.device)
    # A short last line repeats its last column, which is never the first maximum twice.
    column_bl.clamp_(max=last)
    place_b = s_br.gather(1, column_bl).max(dim=1).indices
    better_b = (value_b > score_b).logical_or_(value_b.isnan())
    score_b.copy_(torch.where(better_b, value_b, score_b))
    row_b.copy_(torch.where(better_b, (line_b * LINE + place_b).clamp_(max=last) + first_row, row_b))
