"""Drawing ids from logits whose K columns are split over the ranks; the logits are never gathered.

The Gumbel maximum: argmax_j (l_j + G_nj) is a draw from softmax(l), so each rank finds its own maximum and the ranks
compare one number per token. G_nj is a function of the token's key and the global id (noise.py): a sample does not
depend on the ranks, the batch or the blocks, except where two perturbed logits are within the rounding of a product.

The order of operations is temperature, top-k, top-p, each on what the one before left; the set of ids that they leave
is found in restrict.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vqscale.codes import noise, scan
from vqscale.codes.heads import restrict
from vqscale.codes.merge import merge_best
from vqscale.codes.products import product
from vqscale.codes.rows import Rows
from vqscale.matmul import Matrix
from vqscale.parallel import ops
from vqscale.parallel.mesh import Axis

COLDEST = 1e-20
CPU_BLOCK = 2**16  # 64-bit numbers made at once: what the caches of one core hold
FEW_TOKENS = 64  # up to here packed rows serve,
PACKED_ROWS = 2**14  # in matrices of so many: their logits are no larger than a block
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
        if not (self.temperature == 0 or COLDEST <= self.temperature < float("inf")):
            raise ValueError(
                f"temperature is {self.temperature}, an argument of sample: use 0 (the highest logit), or {COLDEST} or "
                "more (logits over a smaller one leave float32)"
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
    packed: Sequence[Matrix] = ()  # the same rows, see `pack`

    def blocks(self, x_BD: Tensor) -> Iterator[tuple[slice, slice]]:
        """(tokens, rows) of a pass over logits that are forgotten."""
        if self._serves(x_BD):
            return scan.cut(len(x_BD), len(self.rows_kD), FEW_TOKENS, PACKED_ROWS)
        return scan.blocks_of(x_BD, len(self.rows_kD), self.budget)

    def logits(self, x_bD: Tensor, rows: slice, scale: float) -> Tensor:
        """scale x rows^T of a block, or of all rows."""
        if not self._serves(x_bD):
            return product(x_bD, self.rows_kD[rows].t(), "fp32", scale)
        parts = [part(x_bD) for part in self.packed[rows.start // PACKED_ROWS : -(-rows.stop // PACKED_ROWS)]]
        l_br = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return l_br if scale == 1 else l_br.mul_(scale)

    def _serves(self, x_BD: Tensor) -> bool:
        return bool(self.packed) and len(x_BD) <= FEW_TOKENS


def pack(rows_kD: Tensor) -> list[Matrix]:
    """The rows laid out for products with few tokens; a copy, on a CPU."""
    return [Matrix(part) for part in rows_kD.detach().split(PACKED_ROWS)] if len(rows_kD) else []


class Drawn(NamedTuple):
    """One id for each of B tokens and the logarithm of its probability; zeros where nobody asked for that."""

    ids_B: Tensor
    log_p_B: Tensor


@torch.no_grad()
def draw(x_BD: Tensor, keys_B: Tensor, shard: Shard, rule: Rule, scored: bool = False) -> Drawn:
    """One id for each of the B tokens of the code group, the same on every rank; `scored` with log p. Collective.

    log p is over all codes, at the rule's temperature (0 counts as 1), whatever top-k and top-p leave out.

    Without top-k and top-p the logits are made in blocks and forgotten. With them, the logits of some tokens at a time
    stay until their set is known: tokens x k numbers and as much again, within the budget (or one token's).

    FloatingPointError on all ranks of the code group where a token's logits are not finite; on a GPU the check waits
    for nobody and fails inside the device.
    """
    score_B = x_BD.new_full((len(x_BD),), scan.LOWEST)
    row_B = torch.zeros(len(x_BD), dtype=torch.int64, device=x_BD.device)
    sums = Normaliser(x_BD) if scored else None
    if rule.restricts(shard.layout.num_codes):
        for tokens in _chunks(len(x_BD), x_BD.element_size(), shard):
            l_tk = shard.logits(x_BD[tokens], slice(0, len(shard.rows_kD)), rule.scale)
            if sums is not None:
                sums.add(tokens, l_tk)
            kept = restrict.keep(l_tk, rule.top_k, rule.top_p, shard.layout.num_codes, shard.axis)
            restrict.mask_(l_tk, kept, shard.axis)
            _gumbel_max(l_tk, keys_B[tokens], 0, shard.layout.start, score_B[tokens], row_B[tokens])
    else:
        for tokens, rows in shard.blocks(x_BD):
            l_br = shard.logits(x_BD[tokens], rows, rule.scale)
            if sums is not None:
                sums.add(tokens, l_br)
            first_id = shard.layout.start if rule.temperature else None
            _gumbel_max(l_br, keys_B[tokens], rows.start, first_id, score_B[tokens], row_B[tokens])
    ids_B, top_B = merge_best(score_B, row_B, shard.layout, shard.axis)
    check_scores(top_B)
    if sums is None:
        return Drawn(ids_B, torch.zeros_like(score_B))
    log_p_B = logits_of(ids_B, x_BD, shard, rule.scale) - sums.merged(shard.axis)
    return Drawn(ids_B, log_p_B.clamp_(max=0.0))  # the two are rounded differently


class Normaliser:
    """The log-sum-exp of B tokens over the rows of this rank, block by block."""

    def __init__(self, x_BD: Tensor) -> None:
        self._top_B, self._sum_B = x_BD.new_full((len(x_BD),), scan.LOWEST), x_BD.new_zeros(len(x_BD))

    def add(self, tokens: slice, l_br: Tensor) -> None:
        """Take the logits of a block of rows in; they are left as they are."""
        if not l_br.shape[1]:
            return
        top_b = torch.maximum(self._top_B[tokens], l_br.amax(1))
        self._sum_B[tokens] *= torch.exp(self._top_B[tokens] - top_b)
        self._sum_B[tokens] += scan.exp2_((l_br - top_b[:, None]).mul_(scan.BITS)).sum(1)
        self._top_B[tokens] = top_b

    def merged(self, axis: Axis) -> Tensor:
        """Over the rows of all ranks. Collective."""
        top_B = ops.max_over(self._top_B, axis)
        return top_B + ops.sum_over(self._sum_B * torch.exp(self._top_B - top_B), axis).log()


def logits_of(ids_B: Tensor, x_BD: Tensor, shard: Shard, scale: float) -> Tensor:
    """The logit of one id of each token, from the rank that owns its row. Collective."""
    logit_B = torch.linalg.vecdot(x_BD, shard.layout.take(shard.rows_kD, ids_B))
    return ops.sum_over(logit_B, shard.axis) * scale


def guided(x_ND: Tensor, unguided_ND: Tensor | None, guidance: float | Tensor) -> Tensor:
    """u + s (x - u), of logits or of what they are linear in; s is a number or one per token, and 1 is x to the bit."""
    if unguided_ND is None:
        return x_ND
    scale = guidance[:, None] if isinstance(guidance, Tensor) else guidance
    return x_ND + (scale - 1.0) * (x_ND - unguided_ND.to(x_ND.dtype))


def check_guidance(guidance: float | Tensor, unguided_ND: Tensor | None) -> None:
    """ValueError for guidance that has nothing to lead away from."""
    if unguided_ND is None and not (isinstance(guidance, float | int) and guidance == 1):
        raise ValueError(
            f"guidance is {guidance}, an argument of sample, but there is nothing to guide away from: give "
            "unguided_ND, the vectors of the null class, or leave guidance at 1"
        )


def check_scores(top_B: Tensor) -> None:
    """FloatingPointError where the best perturbed logit of a token is not finite; the same on all ranks."""
    finite_B = (top_B > scan.LOWEST) & (top_B < float("inf"))
    if top_B.device.type != "cpu":
        torch._assert_async(finite_B.all(), "logits must be finite for an id to be drawn")
        return
    wrong = (~finite_B).nonzero()[:, 0].tolist()
    if wrong:
        named = ", ".join(map(str, wrong[:5])) + (" ..." if len(wrong) > 5 else "")
        raise FloatingPointError(
            f"logits must be finite for an id to be drawn, but those of {len(wrong)} of the {len(top_B)} tokens of the "
            f"code group are not (token {named}): the weights of the model, or the vectors it was given, are not "
            "finite or too large; load an earlier checkpoint, or train again with a lower optim.lr"
        )


def _chunks(num_tokens: int, item_bytes: int, shard: Shard) -> Iterator[slice]:
    """Tokens whose logits fit into the budget on the rank with the most rows: the same on every rank."""
    widest = shard.layout.most
    step = max(1, shard.budget // (BUFFERS * item_bytes * widest))
    for token in range(0, num_tokens, step):
        yield slice(token, min(token + step, num_tokens))


def _gumbel_max(
    l_br: Tensor, keys_b: Tensor, first_row: int, first_id: int | None, score_b: Tensor, row_b: Tensor
) -> None:
    """Update the best perturbed logit so far and its row, in place; a later row must be strictly better. A logit that
    is not a number makes the best none.

    `first_id` is the id of this rank's first row, from which the noise follows; None is no noise.
    """
    at_once = max(1, CPU_BLOCK // max(1, len(l_br))) if l_br.device.type == "cpu" else max(1, l_br.shape[1])
    for column in range(0, l_br.shape[1], at_once):
        part_bc, row = l_br[:, column : column + at_once], first_row + column
        if first_id is not None:
            first = first_id + row
            part_bc -= noise.negative_gumbel(keys_b, first, first + part_bc.shape[1], l_br.dtype)
        scan.update_best(part_bc, scan.line_peaks(part_bc), row, score_b, row_b)
