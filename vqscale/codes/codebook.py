"""Codebook: K rows of D numbers, split over the ranks of the code axis; tokens come and go as data-parallel tensors.

The communication of every operation is the same: tokens of the M ranks of the code group are gathered (N x D per
rank), each rank scores all of them against its own rows in blocks, a few numbers per token are merged, and N x D
results go back to their owners. Bytes per step are proportional to tokens x D and do not know K. With one process
nothing is sent.

    nearest   gather x                      merge best score, lowest id            ids, scores        no gradient
    lookup    gather ids                    reduce-scatter rows                    z                  to the rows
    mix       gather x                      merge softmax, reduce-scatter means    ids, mean rows,    to x and the rows
                                                                                   entropies, ...

Logits are (x . key + bias) / T with keys and bias made from the rows: `dot` (c, 0), `euclid` (c, -|c|^2 / 2: the arg
max is the nearest code), `cosine` (c / |c|, and x / |x|). The similarity decides the logits; the value of a code is
always its row.
Arithmetic is float32 (or float64 if x and rows are) whatever the autocast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqscale.codes import scan
from vqscale.codes.config import Similarity, TableConfig
from vqscale.codes.rows import Init, Rows, Table, draw
from vqscale.parallel import ops
from vqscale.parallel.clock import clock
from vqscale.parallel.mesh import Axis, Mesh

SCAN_MIB = 64


@dataclass
class Mixture:
    """What `mix` returns for the tokens of this rank; `columns_k` is for its rows, over the tokens of the group."""

    ids_N: Tensor
    score_N: Tensor  # the best logit
    lse_N: Tensor  # log of the sum of exp over all K logits
    mean_ND: Tensor  # softmax(l) times the rows, the rows as values detached
    entropy_N: Tensor | None  # of softmax at the entropy temperature
    columns_k: Tensor | None  # sum over the tokens of the code group of the same softmax

    @property
    def saturation_N(self) -> Tensor:
        """The largest probability of each token."""
        return torch.exp(self.score_N - self.lse_N).detach()


class Codebook(Table):
    """num_codes rows of `dim`, this rank's slice in `.rows` (k x D). `mesh` None is one process."""

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        mesh: Mesh | None = None,
        similarity: Similarity = "dot",
        init: Init = "normal",
        init_scale: float = 1.0,
        seed: int = 0,
        learned: bool = True,
        scan_mib: int = SCAN_MIB,
    ) -> None:
        mesh = mesh or Mesh()
        super().__init__(Rows(num_codes, mesh.codes.size, mesh.codes.rank))
        self.num_codes, self.dim, self.axis = num_codes, dim, mesh.codes
        self.similarity: Similarity = similarity
        self.budget = scan_mib * 2**20
        meta = torch.empty(0).is_meta  # inside `with torch.device("meta")`: shapes only
        rows = torch.empty(self.layout.count, dim) if meta else draw(self.layout, dim, init, init_scale, seed)
        self.rows = nn.Parameter(rows if meta else rows.to(mesh.device), requires_grad=learned)

    @classmethod
    def from_config(
        cls, config: TableConfig, similarity: Similarity, mesh: Mesh, *, seed: int, learned: bool = True
    ) -> Codebook:
        """The codebook of a quantizer's settings. With init: data the first rows are normal until data comes."""
        return cls(
            config.num_codes,
            config.dim,
            mesh=mesh,
            similarity=similarity,
            init="normal" if config.init == "data" else config.init,
            init_scale=config.init_scale,
            seed=seed,
            learned=learned,
            scan_mib=config.scan_mib,
        )

    def keys(self) -> scan.Keys:
        """Keys and bias of this rank's rows, with gradients to the rows; no copy for `dot`."""
        if self.similarity == "dot":
            return scan.Keys(self.rows)
        if self.similarity == "euclid":
            return scan.Keys(self.rows, -0.5 * self.rows.square().sum(1))
        return scan.Keys(F.normalize(self.rows, dim=1))

    def queries(self, x_ND: Tensor) -> Tensor:
        """x in the precision of the rows, on the unit sphere for `cosine`."""
        x_ND = x_ND.to(self.rows.dtype)
        return F.normalize(x_ND, dim=1) if self.similarity == "cosine" else x_ND

    @torch.no_grad()
    def nearest(self, x_ND: Tensor, keys: scan.Keys | None = None) -> tuple[Tensor, Tensor]:
        """(ids_N int64, score_N): the code with the highest similarity, the lowest id among equals. No gradient.

        `keys` replaces those of the similarity, for codes that are not the rows themselves.
        """
        with clock.span("codes"), full_precision(x_ND):
            x_BD = ops.gather(self.queries(x_ND), self.axis)
            score_B, row_B = scan.best(x_BD, keys or self.keys(), self.budget)
            return _merge_best(score_B, row_B, self.layout, self.axis)

    def lookup(self, ids_N: Tensor) -> Tensor:
        """The rows of ids, z_ND, from whichever ranks own them; the gradient goes to the rows."""
        with clock.span("codes"):
            return look_up(self.rows, ids_N, self.layout, self.axis)

    def mix(self, x_ND: Tensor, temperature: float = 1.0, entropy_temperature: float | None = None) -> Mixture:
        """Softmax of the logits at `temperature` over all K rows: best id, mean row, log-normaliser.

        With an `entropy_temperature`, also the entropy of each token and the column sums of the softmax at that
        temperature. Gradients go to x and, through the logits, to the rows; as values the rows are detached.
        """
        with clock.span("codes"), full_precision(x_ND):
            keys = self.keys()
            sharper = None if entropy_temperature is None else temperature / entropy_temperature
            plan = _Plan(self.layout, self.axis, temperature, sharper, self.budget)
            out = _Mix.apply(self.queries(x_ND), keys.keys_kD, keys.bias_k, self.rows.detach(), plan)
            return Mixture(*out, *([None, None] if sharper is None else []))

    @torch.no_grad()
    def replace(self, ids_P: Tensor, values_PD: Tensor) -> Tensor:
        """Set rows `ids_P` (the same on every rank; -1 is nobody) to values; returns the local rows that changed."""
        mine, local = self.layout.find(ids_P)
        self.rows[local[mine]] = values_PD[mine].to(self.rows.dtype)
        return local[mine]

    def extra_repr(self) -> str:
        here = f"rows {self.layout.start}..{self.layout.stop}"
        return f"{self.num_codes} x {self.dim}, {self.similarity}, {here} on rank {self.axis.rank} of {self.axis.size}"


def look_up(rows_kD: Tensor, ids_N: Tensor, layout: Rows, axis: Axis) -> Tensor:
    """Rows of a sharded table by id: each rank gives what it owns, zeros elsewhere, and the sum goes to the askers."""
    z_ND: Tensor = _LookUp.apply(rows_kD, ids_N, layout, axis)
    return z_ND


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_kD: Tensor, ids_N: Tensor, layout: Rows, axis: Axis) -> Tensor:
        mine_B, local_B = layout.find(ops.gather(ids_N, axis))
        ctx.save_for_backward(mine_B, local_B)
        ctx.axis, ctx.shape = axis, rows_kD.shape
        if layout.count == 0:
            part_BD = rows_kD.new_zeros(len(local_B), rows_kD.shape[1])
        else:
            part_BD = rows_kD[local_B] * mine_B[:, None]
        return ops.scatter_sum(part_BD, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        with clock.span("codes"):
            mine_B, local_B = ctx.saved_tensors
            g_BD = ops.gather(grads[0], ctx.axis)
            out_kD = g_BD.new_zeros(ctx.shape)
            if len(out_kD):
                out_kD.index_add_(0, local_B, g_BD * mine_B[:, None])
            return out_kD, None, None, None


def full_precision(x: Tensor) -> torch.autocast:
    """A context in which products keep the precision of their operands, whatever the caller's autocast."""
    return torch.autocast(x.device.type, enabled=False)


def _merge_best(score_B: Tensor, row_B: Tensor, layout: Rows, axis: Axis) -> tuple[Tensor, Tensor]:
    """This rank's tokens' best id and score over all ranks; the lowest id among equal scores."""
    top_B = ops.max_over(score_B, axis)
    here_B = (score_B >= top_B) if layout.count else torch.zeros_like(score_B, dtype=torch.bool)
    ids_B = ops.min_over(torch.where(here_B, row_B + layout.start, layout.num_codes), axis)
    # Scores that are not a number compare with nothing: such a token takes id 0 and its loss tells.
    return _own(ids_B, axis).clamp(max=layout.num_codes - 1), _own(top_B, axis)


def _own(x_B: Tensor, axis: Axis) -> Tensor:
    """This rank's part of a tensor over the tokens of the code group."""
    num = len(x_B) // axis.size
    return x_B[axis.rank * num : (axis.rank + 1) * num]


def _merge_softmax(part: scan.Softmax, top_B: Tensor, axis: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """(log-normaliser, entropy, this rank's factor exp(top_r - lse)) over all ranks, for all B tokens."""
    fall_B = part.top_B - top_B
    shrink_B = torch.exp(fall_B)
    both_2B = torch.stack([part.sum_B * shrink_B, shrink_B * (part.excess_B + fall_B * part.sum_B)])
    sum_B, excess_B = ops.sum_over(both_2B, axis)
    log_B = sum_B.log()
    return top_B + log_B, log_B - excess_B / sum_B, shrink_B / sum_B


@dataclass(frozen=True)
class _Plan:
    layout: Rows
    axis: Axis
    temperature: float
    sharper: float | None
    budget: int


class _Mix(torch.autograd.Function):
    """`Codebook.mix` with its own backward pass, because autograd would keep tokens x K.

    Saved are the gathered tokens, the rows, and a few numbers per token; logits are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, keys_kD: Tensor, bias_k: Tensor | None, values_kD: Tensor, plan: _Plan
    ) -> tuple[Tensor, ...]:
        axis, keys = plan.axis, scan.Keys(keys_kD, bias_k)
        x_BD = ops.gather(x_ND, axis)
        mixed = scan.mix(x_BD, keys, values_kD, plan.temperature, plan.sharper, plan.budget)
        ids_N, score_N = _merge_best(mixed.score_B, mixed.row_B, plan.layout, axis)
        top_B = ops.max_over(mixed.soft.top_B, axis)
        lse_B, _, share_B = _merge_softmax(mixed.soft, top_B, axis)
        mean_ND = ops.scatter_sum(mixed.sum_BD * share_B[:, None], axis)
        outputs = [ids_N, score_N, _own(lse_B, axis).clone(), mean_ND]
        sharp_lse_B = entropy_B = None
        if mixed.sharp is not None and plan.sharper is not None:
            sharp_lse_B, entropy_B, _ = _merge_softmax(mixed.sharp, top_B * plan.sharper, axis)
            scale = plan.sharper / plan.temperature
            columns_k = scan.column_sums(x_BD, keys, scale, sharp_lse_B, plan.budget)
            outputs += [_own(entropy_B, axis).clone(), columns_k]
        ctx.mark_non_differentiable(ids_N, score_N)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        ctx.save_for_backward(x_BD, keys_kD, bias_k, values_kD, mean_ND, lse_B, sharp_lse_B, entropy_B)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # A backward pass runs under the autocast of whoever calls it.
        with clock.span("codes"), full_precision(ctx.saved_tensors[0]):
            return _unmix(ctx, *grads[2:])


def _unmix(
    ctx: Any,
    g_lse_N: Tensor | None,
    g_mean_ND: Tensor | None,
    g_entropy_N: Tensor | None = None,
    g_columns_k: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """The backward pass of `_Mix`. Which gradients are absent is the same on all ranks: the losses are."""
    x_BD, keys_kD, bias_k, values_kD, mean_ND, lse_B, sharp_lse_B, entropy_B = ctx.saved_tensors
    plan, keys = ctx.plan, scan.Keys(keys_kD, bias_k)
    axis = plan.axis
    shift_N = None
    if g_mean_ND is not None:
        shift_N = (g_mean_ND * mean_ND).sum(1)
    if g_lse_N is not None:
        shift_N = -g_lse_N if shift_N is None else shift_N - g_lse_N
    columns_mean_B = None
    if g_columns_k is not None:
        scale = plan.sharper / plan.temperature
        part_B = scan.row_means(x_BD, keys, scale, sharp_lse_B, g_columns_k, plan.budget)
        columns_mean_B = ops.sum_over(part_B, axis)
    up = scan.Upstream(
        mean_BD=None if g_mean_ND is None else ops.gather(g_mean_ND, axis),
        shift_B=None if shift_N is None else ops.gather(shift_N, axis),
        lse_B=lse_B,
        entropy_B=None if g_entropy_N is None else ops.gather(g_entropy_N, axis),
        entropy_value_B=entropy_B,
        columns_k=g_columns_k,
        columns_mean_B=columns_mean_B,
        sharp_lse_B=sharp_lse_B,
    )
    out = scan.unmix(x_BD, keys, values_kD, up, plan.temperature, plan.sharper or 1.0, plan.budget)
    return ops.scatter_sum(out.x_BD, axis), out.keys_kD, out.bias_k, None, None
