"""Drawing ids from logits whose K columns are split over the ranks; the logits are never gathered.

The Gumbel maximum: argmax_j (l_j + G_nj) is a draw from softmax(l), so each rank finds its own maximum and the ranks
compare one number per token. G_nj is a function of the token's key and the global id (noise.py): a sample does not
depend on the ranks, the batch or the blocks, except where two perturbed logits are within the rounding of a product.

The order of operations is temperature, top-k, top-p, each on what the one before left. A restricted set is a `Cut`:
every id above a value, and so many of those equal to it, the lowest ids first. The value is found exactly: from the
candidates of all ranks where they are few, else by bisection on the bits of floating-point numbers, with one number
per token and step between the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vqscale.codes import head_scan, noise, scan
from vqscale.codes.rows import Rows
from vqscale.parallel import ops
from vqscale.parallel.mesh import Axis

CANDIDATES = 1024  # a top-k up to here exchanges candidates, above it counts
CPU_NOISE = 2**16  # random numbers made at once: what the caches of one core hold
BUFFERS = 4  # tensors of the size of a chunk of logits that are alive at once


@dataclass(frozen=True)
class Rule:
    """How to draw: logits / temperature, then the `top_k` highest, then the fewest that hold the mass `top_p`.

    Temperature 0 takes the highest logit, the lowest id among equals. top_k 0 and top_p 1 leave all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature is {self.temperature}, an argument of sample: use 0 (the highest logit) or more"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}, an argument of sample: use 0 (all codes) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, an argument of sample: use a share above 0, at most 1 (all)")

    @property
    def scale(self) -> float:
        return 1.0 / self.temperature if self.temperature else 1.0

    def restricts(self, num_codes: int) -> bool:
        return self.temperature > 0 and (0 < self.top_k < num_codes or self.top_p < 1)


@dataclass
class Shard:
    """The rows that this rank gives to a draw, and whom it compares with."""

    rows_kD: Tensor
    layout: Rows
    axis: Axis
    budget: int


@torch.no_grad()
def draw(x_BD: Tensor, keys_B: Tensor, shard: Shard, rule: Rule) -> Tensor:
    """One id for each of the B tokens of the code group, the same on every rank. Collective.

    Without top-k and top-p the logits are made in blocks and forgotten. With them, the logits of some tokens at a time
    stay until their set is known: tokens x k numbers and as much again, within the budget (or one token's).
    """
    score_B = x_BD.new_full((len(x_BD),), scan.LOWEST)
    row_B = torch.zeros(len(x_BD), dtype=torch.int64, device=x_BD.device)
    if rule.restricts(shard.layout.num_codes):
        for tokens in _chunks(len(x_BD), x_BD.element_size(), shard):
            l_tk = head_scan.product(x_BD[tokens], shard.rows_kD.t(), "fp32", rule.scale)
            apply_(l_tk, restrict(l_tk, rule, shard), shard.axis)
            _race(l_tk, keys_B[tokens], shard.layout.start, True, score_B[tokens], row_B[tokens])
    else:
        budget = head_scan.block_budget(x_BD, shard.budget)
        for tokens, rows in scan.blocks(len(x_BD), len(shard.rows_kD), x_BD.element_size(), budget):
            l_br = head_scan.product(x_BD[tokens], shard.rows_kD[rows].t(), "fp32", rule.scale)
            first = shard.layout.start + rows.start
            _race(l_br, keys_B[tokens], first, rule.temperature > 0, score_B[tokens], row_B[tokens])
    return _merge(score_B, row_B, shard)


def _chunks(num_tokens: int, item_bytes: int, shard: Shard) -> Iterator[slice]:
    """Tokens whose logits fit into the budget on the rank with the most rows: the same on every rank."""
    widest = -(-shard.layout.num_codes // shard.axis.size)
    step = max(1, shard.budget // (BUFFERS * item_bytes * widest))
    for token in range(0, num_tokens, step):
        yield slice(token, min(token + step, num_tokens))


def _race(l_br: Tensor, keys_b: Tensor, first_id: int, noisy: bool, score_b: Tensor, id_b: Tensor) -> None:
    """Raise the best perturbed logit so far and its id, in place; a later id must be strictly better."""
    at_once = max(1, CPU_NOISE // max(1, len(l_br))) if l_br.device.type == "cpu" else max(1, l_br.shape[1])
    for column in range(0, l_br.shape[1], at_once):
        part_bc = l_br[:, column : column + at_once]
        first = first_id + column
        if noisy:
            part_bc += noise.gumbel(keys_b, first, first + part_bc.shape[1], l_br.dtype)
        value_b, place_b = part_bc.max(dim=1)
        better_b = value_b > score_b
        score_b.copy_(torch.where(better_b, value_b, score_b))
        id_b.copy_(torch.where(better_b, place_b + first, id_b))


def _merge(score_B: Tensor, id_B: Tensor, shard: Shard) -> Tensor:
    """The id with the highest score over all ranks, the lowest among equals."""
    # Logits that are not a number compare with nothing: such a token takes id 0.
    here_B = (score_B >= ops.max_over(score_B, shard.axis)) & (shard.layout.count > 0)
    return ops.min_over(torch.where(here_B, id_B, shard.layout.num_codes), shard.axis)


@dataclass
class Cut:
    """The ids of each token that remain: all with a logit above `value`, and `quota` of those equal to it."""

    value_t: Tensor
    quota_t: Tensor


def restrict(l_tk: Tensor, rule: Rule, shard: Shard) -> Cut:
    """The set that top-k and then top-p leave of logits already divided by the temperature. Collective."""
    cut = None
    if 0 < rule.top_k < shard.layout.num_codes:
        cut = _top_k(l_tk, rule.top_k, shard.axis)
    if rule.top_p < 1:
        cut = _top_p(l_tk, rule.top_p, cut, shard.axis)
    assert cut is not None
    return cut


def _top_k(l_tk: Tensor, num: int, axis: Axis) -> Cut:
    if num <= CANDIDATES:
        mine_tc = torch.topk(l_tk, min(num, l_tk.shape[1]), dim=1).values
        padded_tc = l_tk.new_full((len(l_tk), num), float("-inf"))
        padded_tc[:, : mine_tc.shape[1]] = mine_tc
        all_tc = ops.gather(padded_tc, axis).unflatten(0, (axis.size, -1)).transpose(0, 1).flatten(1)
        value_t = torch.topk(all_tc, num, dim=1).values[:, -1]
    else:
        value_t = _lowest(l_tk, lambda v_t: _count_above(l_tk, v_t, axis) < num, axis)
    return Cut(value_t, num - _count_above(l_tk, value_t, axis))


def _top_p(l_tk: Tensor, share: float, cut: Cut | None, axis: Axis) -> Cut:
    """Of the set `cut`, ids in the order of their logits (the lowest first among equals) while those before them hold
    less than `share` of its mass. Masses are summed in float64, so that the order of summing hardly shows."""
    top_t = ops.max_over(_amax(l_tk), axis)
    e_tk = torch.exp(l_tk - top_t[:, None])

    def mass_above(v_t: Tensor) -> Tensor:
        return ops.sum_over(torch.where(l_tk > v_t[:, None], e_tk, 0.0).sum(1, dtype=torch.float64), axis)

    if cut is None:
        total_t = mass_above(torch.full_like(top_t, float("-inf")))
    else:
        total_t = mass_above(cut.value_t) + cut.quota_t * torch.exp(cut.value_t - top_t).double()
    wanted_t = share * total_t
    value_t = _lowest(l_tk, lambda v_t: mass_above(v_t) < wanted_t, axis)
    each_t = torch.exp(value_t - top_t).double()
    quota_t = ((wanted_t - mass_above(value_t)) / each_t).ceil().clamp(1, 2**62).to(torch.int64)
    if cut is not None:
        quota_t = torch.where(value_t == cut.value_t, torch.minimum(quota_t, cut.quota_t), quota_t)
    return Cut(value_t, quota_t)


def apply_(l_tk: Tensor, cut: Cut, axis: Axis) -> None:
    """Set the logits of all ids outside the cut to scan.LOWEST, in place. Collective."""
    tie_tk = l_tk == cut.value_t[:, None]
    ties_t = tie_tk.sum(1)
    before_t = ops.gather(ties_t[None], axis)[: axis.rank].sum(0)
    quota_t = cut.quota_t - before_t
    # Whether ties must be counted is seen by this rank alone, and nothing in this branch talks.
    if bool((quota_t < ties_t).any()):
        tie_tk &= tie_tk.cumsum(1) <= quota_t[:, None]
    l_tk.masked_fill_(~tie_tk.logical_or_(l_tk > cut.value_t[:, None]), scan.LOWEST)


def _count_above(l_tk: Tensor, value_t: Tensor, axis: Axis) -> Tensor:
    return ops.sum_over((l_tk > value_t[:, None]).sum(1), axis)


def _amax(l_tk: Tensor) -> Tensor:
    return l_tk.amax(1) if l_tk.shape[1] else l_tk.new_full((len(l_tk),), scan.LOWEST)


def _amin(l_tk: Tensor) -> Tensor:
    return l_tk.amin(1) if l_tk.shape[1] else l_tk.new_full((len(l_tk),), -scan.LOWEST)


def _lowest(l_tk: Tensor, holds: Callable[[Tensor], Tensor], axis: Axis) -> Tensor:
    """The lowest value v_t at which `holds`, by bisection on the numbers in their order, exact in about 32 steps.

    `holds` is true from some logit on, and true at the highest; so the lowest such value is a logit. Collective:
    `holds` gives the same on every rank, and so every rank takes the same steps.
    """
    high_t = _ordered(ops.max_over(_amax(l_tk), axis))
    low_t = _ordered(ops.min_over(_amin(l_tk), axis)) - 1
    while bool((low_t + 1 < high_t).any()):
        middle_t = (low_t & high_t) + ((low_t ^ high_t) >> 1)  # the mean, rounded down; the sum could overflow
        holds_t = holds(_number(middle_t, l_tk.dtype))
        high_t = torch.where(holds_t, middle_t, high_t)
        low_t = torch.where(holds_t, low_t, middle_t)
    return _number(high_t, l_tk.dtype)


_BITS = {torch.float32: (torch.int32, 2**31), torch.float64: (torch.int64, 2**63)}


def _ordered(x: Tensor) -> Tensor:
    """Floating-point numbers as int64 in the same order; x and -x are negatives, both zeros are 0."""
    kind, half = _BITS[x.dtype]
    bits = x.contiguous().view(kind).to(torch.int64)
    return torch.where(bits >= 0, bits, -(bits & (half - 1)))


def _number(order: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_ordered`."""
    size = order.abs().to(_BITS[dtype][0]).view(dtype)
    return torch.where(order < 0, -size, size)
