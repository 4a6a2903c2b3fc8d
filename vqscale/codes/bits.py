"""Codes that are D bits, K = 2^D: their ids, and the entropies of an id whose bits are independent, without 2^D of it.

A token has a log-odds l_i for each bit, p_i = sigmoid(l_i), and the probability of a code is a product over its bits.

* The entropy of a token is the sum of D scalar entropies. Exact.
* The mean of products over tokens is no product, and its entropy has no form without the 2^D outcomes. So the bits are
  taken in groups of g: the sum over groups of the entropy of the group's mean probability, the mean over all tokens of
  all ranks. Exact for D <= g; otherwise an upper bound, which is met where the groups are independent.

The 2^g means of a group are no tokens x 2^g either: with the group cut into halves a and b, mean = P_a^T P_b / N, a
product of two matrices of tokens x 2^(g/2). The rows of that product are split over the code axis.

Suffixes here: g bits of a group, n the 2^g values of them, r values of its high bits on this rank, l of its low bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.codes import tally
from vqscale.codes.merge import full_precision
from vqscale.codes.rows import Rows
from vqscale.parallel import ops
from vqscale.parallel.clock import clock
from vqscale.parallel.mesh import Mesh

BLOCK = 2**22  # numbers in the largest temporary of a pass over tokens


def to_ids(bits_ND: Tensor) -> Tensor:
    """Ids of rows of bits, the first bit the most significant: int64, exact for up to 62 bits."""
    return (bits_ND.to(torch.int64) << _places(bits_ND.shape[1], bits_ND.device)).sum(1)


def to_bits(ids_N: Tensor, num_bits: int) -> Tensor:
    """The inverse of `to_ids`, bool."""
    return (ids_N[:, None] >> _places(num_bits, ids_N.device)) & 1 == 1


def _places(num_bits: int, device: torch.device) -> Tensor:
    return torch.arange(num_bits - 1, -1, -1, device=device)


def entropy(logits_ND: Tensor) -> Tensor:
    """The entropy of each token's id, entropy_N, with gradient; nothing is sent."""
    up, down = F.logsigmoid(logits_ND), F.logsigmoid(-logits_ND)
    return -(up.exp() * up + down.exp() * down).sum(1)


def largest(logits_ND: Tensor) -> Tensor:
    """The probability of each token's likeliest id."""
    return F.logsigmoid(logits_ND.detach().abs()).sum(1).exp()


def entropy_of_mean(logits_ND: Tensor, group_bits: int, mesh: Mesh) -> Tensor:
    """Sum over groups of `group_bits` bits of the entropy of the mean probability over all tokens of all ranks.

    The same number on every rank, and differentiable. Every rank has as many tokens. Sent are N x D numbers on the code
    axis, and 2^group_bits / M of each group on the data axis.
    """
    with clock.span("codes"), full_precision(logits_ND):
        groups = _groups(logits_ND.shape[1], group_bits, mesh)
        columns_k = _Columns.apply(ops.gather(logits_ND, mesh.codes), groups)
        return tally.entropy_of_mean(columns_k, len(logits_ND), mesh)


@dataclass(frozen=True)
class _Group:
    """Neighbouring bits, cut into `high` bits, the 2^high values of which are split over the code axis, and `low`."""

    bits: slice
    high: int
    low: int
    rows: Rows

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.count, 2**self.low

    def blocks(self, num_tokens: int) -> Iterator[slice]:
        step = max(1, BLOCK >> self.high)
        return (slice(start, start + step) for start in range(0, num_tokens, step))

    def probabilities(self, logits_bg: Tensor) -> tuple[Tensor, Tensor]:
        """Of this rank's values of the high bits, and of all values of the low ones: P_br and Q_bl."""
        high_br = _probabilities(logits_bg[:, : self.high])[:, self.rows.start : self.rows.stop]
        return high_br, _probabilities(logits_bg[:, self.high :])

    def gradient(self, logits_bg: Tensor, grad_rl: Tensor) -> Tensor:
        """The gradient of the log-odds for that of sum_b P_br Q_bl.

        With S_b = grad o P_b Q_b, bit i gets the sum of S_b where the bit is one, minus p_i times the sum of all.
        """
        high_br, low_bl = self.probabilities(logits_bg)
        sum_br, sum_bl = (low_bl @ grad_rl.t()).mul_(high_br), (high_br @ grad_rl).mul_(low_bl)
        values_r = torch.arange(self.rows.start, self.rows.stop, device=logits_bg.device)
        values_l = torch.arange(2**self.low, device=logits_bg.device)
        ones_bg = torch.cat(
            [
                sum_br @ to_bits(values_r, self.high).to(sum_br.dtype),
                sum_bl @ to_bits(values_l, self.low).to(sum_bl.dtype),
            ],
            dim=1,
        )
        return ones_bg - torch.sigmoid(logits_bg) * sum_br.sum(1, keepdim=True)


def _groups(num_bits: int, group_bits: int, mesh: Mesh) -> list[_Group]:
    groups = []
    for start in range(0, num_bits, group_bits):
        size = min(group_bits, num_bits - start)
        high = size - size // 2
        rows = Rows(2**high, mesh.codes.size, mesh.codes.rank)
        groups.append(_Group(slice(start, start + size), high, size // 2, rows))
    return groups


def _probabilities(logits_bg: Tensor) -> Tensor:
    """The probability of each of the 2^g values of g bits, the first bit the most significant."""
    out_bn = logits_bg.new_ones(len(logits_bg), 1)
    up_bg, down_bg = torch.sigmoid(logits_bg), torch.sigmoid(-logits_bg)
    for bit in range(logits_bg.shape[1]):
        both = [out_bn * down_bg[:, bit, None], out_bn * up_bg[:, bit, None]]
        out_bn = torch.stack(both, dim=2).flatten(1)
    return out_bn


class _Columns(torch.autograd.Function):
    """Sums over B tokens of the probabilities of this rank's codes of each group, one group after the other.

    Saved are the log-odds alone; probabilities are computed again.
    """

    @staticmethod
    def forward(ctx: Any, logits_BD: Tensor, groups: list[_Group]) -> Tensor:
        ctx.groups = groups
        ctx.save_for_backward(logits_BD)
        parts = []
        for group in groups:
            out_rl = logits_BD.new_zeros(group.shape)
            for tokens in group.blocks(len(logits_BD)):
                high_br, low_bl = group.probabilities(logits_BD[tokens, group.bits])
                out_rl.addmm_(high_br.t(), low_bl)
            parts.append(out_rl.flatten())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (logits_BD,) = ctx.saved_tensors
        out_BD = torch.empty_like(logits_BD)
        sizes = [rows * low for rows, low in (group.shape for group in ctx.groups)]
        # A backward pass runs under the autocast of whoever calls it.
        with clock.span("codes"), full_precision(logits_BD):
            for group, grad_n in zip(ctx.groups, grads[0].split(sizes), strict=True):
                for tokens in group.blocks(len(logits_BD)):
                    part_bg = logits_BD[tokens, group.bits]
                    out_BD[tokens, group.bits] = group.gradient(part_bg, grad_n.view(group.shape))
        return out_BD, None
