"""Codebook: K rows of D numbers, split over the ranks of the code axis; tokens come and go as data-parallel tensors.

The communication of every operation is the same: tokens of the M ranks of the code group are gathered (N x D per
rank), each rank scores all of them against its own rows in blocks, a few numbers per token are merged, and N x D
results go back to their owners. Bytes per step are proportional to tokens x D and do not know K. With one process
nothing is sent.

    nearest   gather x                      merge best score, lowest id            ids, scores        no gradient
    lookup    gather ids                    reduce-scatter rows                    z                  to the rows
    mix       gather x                      merge best score, id and softmax;      ids, mean rows,    to x and the rows
                                            reduce-scatter mean and chosen rows    rows of ids,
                                                                                   entropies, ...

Logits are (query . key + bias) / T, with queries made from the tokens and keys and bias from the rows (similarity.py).
The similarity decides the logits; the value of a code is always its row.
Arithmetic is float32 (or float64 if the rows are) whatever the autocast. `nearest` is exact where the prefilter or the
kernels serve, `mix` takes the best of its own products: where two codes are within the rounding of a float32
product their ids may differ, as those of two machines may.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vqscale.codes import backend, products, scan
from vqscale.codes.config import TableConfig
from vqscale.codes.merge import full_precision, merge_best, own
from vqscale.codes.rows import Init, Rows, Table, draw
from vqscale.codes.search import prefilter
from vqscale.codes.search.bounds import Form
from vqscale.codes.similarity import DOT, by_name
from vqscale.codes.softmax import autograd
from vqscale.codes.softmax.autograd import Mixture
from vqscale.codes.softmax.forward import Wanted
from vqscale.parallel import ops
from vqscale.parallel.clock import clock
from vqscale.parallel.mesh import Axis, Mesh

SCAN_MIB = 64


class Codebook(Table):
    """num_codes rows of `dim`, this rank's slice in `.rows` (k x D). `mesh` None is one process."""

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        mesh: Mesh | None = None,
        similarity: str = "dot",
        init: Init = "normal",
        init_scale: float = 1.0,
        seed: int = 0,
        learned: bool = True,
        scan_mib: int = SCAN_MIB,
    ) -> None:
        mesh = mesh or Mesh()
        super().__init__(Rows(num_codes, mesh.codes.size, mesh.codes.rank))
        self.num_codes, self.dim, self.axis = num_codes, dim, mesh.codes
        self.similarity = by_name(similarity)
        self.budget = scan_mib * 2**20
        meta = torch.empty(0).is_meta  # inside `with torch.device("meta")`: shapes only
        rows = torch.empty(self.layout.count, dim) if meta else draw(self.layout, dim, init, init_scale, seed)
        self.rows = nn.Parameter(rows if meta else rows.to(mesh.device), requires_grad=learned)

    @classmethod
    def from_config(
        cls, config: TableConfig, similarity: str, mesh: Mesh, *, seed: int, learned: bool = True
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

    def keys(self, rows_kD: Tensor) -> scan.Keys:
        """Keys and bias of this rank's rows."""
        return scan.Keys(self.similarity.keys(rows_kD), self.similarity.bias(rows_kD))

    @torch.no_grad()
    def nearest(self, x_ND: Tensor, keys: scan.Keys | None = None) -> tuple[Tensor, Tensor]:
        """(ids_N int64, score_N): the code with the highest similarity, the lowest id among equals. No gradient.

        `keys` replaces those of the similarity, for codes that are not the rows themselves. Where the prefilter serves,
        the ids are those of float64 arithmetic on the given float32 numbers. A token that is not finite, or that met a
        row which is not, takes an id that exists, and its score is not a number.
        """
        with clock.span("codes"), full_precision(x_ND):
            rows_kD = backend.readable(self.rows)
            form = Form(rows_kD, self.similarity) if keys is None else Form(keys.keys_kD, DOT, keys.bias_k)
            x_BD = ops.gather(x_ND.to(rows_kD.dtype), self.axis)
            if prefilter.serves(x_BD, form):
                score_B, row_B = prefilter.best(x_BD, form, self.budget)
            else:
                q_BD = self.similarity.queries(x_BD) if keys is None else x_BD
                score_B, row_B = backend.pick(q_BD).best(q_BD, keys or self.keys(rows_kD), self.budget)
            # In float64, so that two ranks' best codes are told apart as two codes of one rank are.
            ids_B, top_B = merge_best(score_B.double(), row_B, self.layout, self.axis)
            score_N = own(top_B, self.axis).to(rows_kD.dtype)
            return own(ids_B, self.axis), score_N.masked_fill(~x_ND.isfinite().all(1), torch.nan)

    def lookup(self, ids_N: Tensor) -> Tensor:
        """The rows of ids, z_ND, from whichever ranks own them; the gradient goes to the rows."""
        with clock.span("codes"):
            return look_up(self.rows, ids_N, self.layout, self.axis)

    def mix(self, x_ND: Tensor, temperature: float = 1.0, entropy_temperature: float | None = None) -> Mixture:
        """Softmax of the logits at `temperature` over all K rows: best id, mean row, log-normaliser.

        With an `entropy_temperature`, also the entropy of each token and the column sums of the softmax at that
        temperature. Gradients go to x and, through the logits, to the rows; as values of the mean the rows are
        detached. `code_ND`, the rows of the best ids, has its gradient to the rows as `lookup` has. There are first
        derivatives only. Bytes sent and memory kept: softmax/autograd.py; products: softmax/forward.py, or
        gpu/passes.py where that serves.
        """
        with clock.span("codes"), full_precision(x_ND):
            rows_kD = backend.readable(self.rows)
            chosen = products.wanted(rows_kD.device.type, rows_kD.dtype)
            wanted = Wanted(self.num_codes, self.budget, temperature, entropy_temperature, chosen)
            request = autograd.Request(self.layout, self.axis, wanted, self.similarity)
            return autograd.mix(x_ND.to(rows_kD.dtype), rows_kD, request)

    @torch.no_grad()
    def replace(self, ids_P: Tensor, values_PD: Tensor) -> Tensor:
        """Set rows `ids_P` (the same on every rank; -1 is nobody) to values; returns the local rows that changed."""
        mine, local = self.layout.find(ids_P)
        self.rows[local[mine]] = values_PD[mine].to(self.rows.dtype)
        return local[mine]

    def extra_repr(self) -> str:
        here = f"rows {self.layout.start}..{self.layout.stop} on rank {self.axis.rank} of {self.axis.size}"
        return f"{self.num_codes} x {self.dim}, {type(self.similarity).__name__}, {here}"


def look_up(rows_kD: Tensor, ids_N: Tensor, layout: Rows, axis: Axis) -> Tensor:
    """Rows of a sharded table by id: each rank gives what it owns, zeros elsewhere, and the sum goes to the askers."""
    z_ND: Tensor = _LookUp.apply(rows_kD, ids_N, layout, axis)
    return z_ND


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_kD: Tensor, ids_N: Tensor, layout: Rows, axis: Axis) -> Tensor:
        ids_B = ops.gather(ids_N, axis)
        ctx.save_for_backward(ids_B)
        ctx.layout, ctx.axis, ctx.shape = layout, axis, rows_kD.shape
        return ops.scatter_sum(layout.take(rows_kD, ids_B), axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        with clock.span("codes"):
            (ids_B,) = ctx.saved_tensors
            g_BD = ops.gather(grads[0], ctx.axis)
            return ctx.layout.add_(g_BD.new_zeros(ctx.shape), ids_B, g_BD), None, None, None
