"""Points of the simplex over K codes, held as the few entries that are not zero, each by the rank that owns its row.

    best_of_residues  the highest u . c of each token in every class of ids modulo RESIDUES: 16 candidates for one pass
    project           the nearest point of the simplex to onehot + C u, exact: p_j = ([j = nearest] + u . c_j - theta)_+
    Entries           such points: products with the rows, both ways, and what they say about tokens and codes

Scores of tokens x rows exist in blocks of the codebook's memory budget only. What is sent are numbers per token: 24
bytes per candidate, 16 per round of the search for theta; K is in none of them. Nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.codes import scan
from vqscale.codes.codebook import Codebook
from vqscale.codes.merge import own
from vqscale.codes.rows import Rows
from vqscale.parallel import ops
from vqscale.parallel.mesh import Axis

RESIDUES = 16
ROUNDS = 100  # a bound that only rounding can reach: Newton's method ends by itself
TIE = 1e-9  # weights that differ by less are equal: the lowest id has the largest


@dataclass
class Entries:
    """The positive weights, of all B tokens of the code group, on rows of this rank: E of them."""

    token_E: Tensor
    row_E: Tensor  # local
    weight_E: Tensor  # float64

    def __len__(self) -> int:
        return len(self.token_E)

    def parts(self, dim: int, budget: int) -> Iterator[slice]:
        """Slices whose vectors of `dim` float64 fit, three at a time, into `budget` bytes."""
        size = max(1, budget // (24 * dim))
        return (slice(first, first + size) for first in range(0, len(self), size))

    def mixed(self, weight_E: Tensor, rows_kD: Tensor, num_tokens: int, budget: int) -> Tensor:
        """sum_j weight_nj c_j over the rows of this rank, B x D in float64."""
        out_BD = torch.zeros(num_tokens, rows_kD.shape[1], dtype=torch.float64, device=rows_kD.device)
        for part in self.parts(rows_kD.shape[1], budget):
            vectors = rows_kD[self.row_E[part]].double() * weight_E[part, None]
            out_BD.index_add_(0, self.token_E[part], vectors)
        return out_BD

    def spread(self, weight_E: Tensor, values_BD: Tensor, num_rows: int, budget: int) -> Tensor:
        """sum_n weight_nj value_n, k x D in the values' precision."""
        out_kD = values_BD.new_zeros(num_rows, values_BD.shape[1])
        for part in self.parts(values_BD.shape[1], budget):
            vectors = values_BD[self.token_E[part]] * weight_E[part, None].to(out_kD.dtype)
            out_kD.index_add_(0, self.row_E[part], vectors)
        return out_kD

    def products(self, values_BD: Tensor, rows_kD: Tensor, budget: int) -> Tensor:
        """value_n . c_j of every entry, in float64."""
        out_E = torch.zeros_like(self.weight_E)
        for part in self.parts(rows_kD.shape[1], budget):
            rows = rows_kD[self.row_E[part]].double()
            out_E[part] = (values_BD[self.token_E[part]].double() * rows).sum(1)
        return out_E

    def per_token(self, value_E: Tensor, num_tokens: int) -> Tensor:
        """Sums over the entries of each token on this rank."""
        return value_E.new_zeros(num_tokens).index_add_(0, self.token_E, value_E)


@dataclass
class Shape:
    """What points of the simplex look like: of this rank's tokens, and of its rows over the tokens of the group."""

    ids_N: Tensor  # the largest weight, the lowest id among equals
    largest_N: Tensor
    count_N: Tensor  # codes with a positive weight
    stored_N: Tensor  # codes with a weight of at least `least`, and the one with the largest
    columns_k: Tensor  # sum of the weights of each row


@torch.no_grad()
def describe(entries: Entries, num_tokens: int, codebook: Codebook, least: float) -> Shape:
    """What the points of this rank's `num_tokens` tokens look like: all-reduces of four numbers per token."""
    layout, axis, num = codebook.layout, codebook.axis, num_tokens * codebook.axis.size
    weight_E, token_E = entries.weight_E, entries.token_E
    top_B = ops.max_over(weight_E.new_zeros(num).scatter_reduce(0, token_E, weight_E, "amax"), axis)
    ids_E = torch.where(weight_E >= top_B[token_E] - TIE, entries.row_E + layout.start, layout.num_codes)
    none_B = torch.full((num,), layout.num_codes, dtype=torch.int64, device=token_E.device)
    # A token of which nothing is known, because its codes are not numbers, takes the last id and its loss tells.
    ids_B = ops.min_over(none_B.scatter_reduce(0, token_E, ids_E, "amin"), axis).clamp(max=layout.num_codes - 1)
    parts = [entries.per_token((weight_E >= bar).double(), num) for bar in (0.0, least)]
    count_B, stored_B = ops.sum_over(torch.stack(parts), axis)
    columns_k = weight_E.new_zeros(layout.count).index_add_(0, entries.row_E, weight_E)
    ids_N, top_N, count_N, stored_N = (own(part_B, axis) for part_B in (ids_B, top_B, count_B, stored_B))
    return Shape(ids_N, top_N, count_N, stored_N.clamp_min(1.0), columns_k)


@torch.no_grad()
def longest(codebook: Codebook) -> Tensor:
    """The largest norm of a code, float64: one number is all-reduced."""
    squares_k = [part.double().square().sum(1) for part in codebook.rows.detach().split(2**16)]
    return ops.max_over(F.pad(torch.cat(squares_k), (0, 1)).amax(), codebook.axis).sqrt()


def best_of_residues(u_BD: Tensor, codebook: Codebook, without_Bs: Tensor) -> tuple[Tensor, Tensor]:
    """(scores, ids), B x RESIDUES on every rank: the highest u . c_j among the ids of each class modulo RESIDUES.

    The codes `without_Bs` (-1 is none) do not take part; a class without codes has a score of LOWEST and the id K. The
    classes are of global ids, so the candidates do not depend on how the rows are split.
    """
    layout, rows_kD = codebook.layout, codebook.rows.detach()
    score_Bq = u_BD.new_full((len(u_BD), RESIDUES), scan.LOWEST)
    ids_Bq = torch.full_like(score_Bq, layout.num_codes, dtype=torch.int64)
    for tokens, rows, score_br in _scores(u_BD, rows_kD, layout, without_Bs, codebook.budget):
        _update_best(score_br, layout.start + rows.start, score_Bq[tokens], ids_Bq[tokens])
    top_Bq = ops.max_over(score_Bq, codebook.axis)
    here_Bq = (score_Bq >= top_Bq) & (score_Bq > scan.LOWEST)
    return top_Bq, ops.min_over(torch.where(here_Bq, ids_Bq, layout.num_codes), codebook.axis)


def _scores(
    u_BD: Tensor, rows_kD: Tensor, layout: Rows, without_Bs: Tensor, budget: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of u . c, with LOWEST at the codes that do not take part."""
    for tokens, rows in scan.blocks(len(u_BD), len(rows_kD), u_BD.element_size(), budget):
        score_br = torch.mm(u_BD[tokens], rows_kD[rows].t())
        column_bs = without_Bs[tokens] - (layout.start + rows.start)
        here_bs = (column_bs >= 0) & (column_bs < score_br.shape[1])
        most_bs = torch.where(here_bs, scan.LOWEST, torch.inf).to(score_br.dtype)  # what is not here lowers nothing
        score_br.scatter_reduce_(1, torch.where(here_bs, column_bs, 0), most_bs, "amin")
        yield tokens, rows, score_br


def _shifted(pairs_T2: Tensor, token: int, row: int) -> Tensor:
    """Pairs (token, row) of a block that begins there; plain numbers, of which a GPU needs no copy."""
    return torch.stack([pairs_T2[:, 0] + token, pairs_T2[:, 1] + row], dim=1)


def _update_best(score_br: Tensor, first_id: int, score_bq: Tensor, ids_bq: Tensor) -> None:
    """Update the best of every class so far, in place; column 0 of the block is the code `first_id`."""
    whole = score_br.shape[1] // RESIDUES * RESIDUES
    column_q = torch.arange(RESIDUES, device=score_br.device)
    for columns in (slice(0, whole), slice(whole, score_br.shape[1])):
        width = min(RESIDUES, columns.stop - columns.start)
        if not width:
            continue
        value_bq, line_bq = score_br[:, columns].unflatten(1, (-1, width)).max(dim=1)
        residue_q = (first_id + column_q[:width]) % RESIDUES
        better_bq = value_bq > score_bq[:, residue_q]
        ids = first_id + columns.start + line_bq * RESIDUES + column_q[:width]
        score_bq[:, residue_q] = torch.where(better_bq, value_bq, score_bq[:, residue_q])
        ids_bq[:, residue_q] = torch.where(better_bq, ids, ids_bq[:, residue_q])


def project(u_BD: Tensor, nearest_B: Tensor, nearest_score_B: Tensor, codebook: Codebook) -> Entries:
    """The exact projection of onehot(nearest_n) + C u_n to the simplex, for all B tokens.

    nearest_score_B is u . c_nearest. u_BD is float64. Two passes over the rows in their precision find the codes above
    a lower bound of theta, which are few; the search for theta and the weights are float64 and look at these alone.
    """
    layout, axis, rows_kD = codebook.layout, codebook.axis, codebook.rows.detach()
    low_BD, without_B1 = u_BD.to(rows_kD.dtype), nearest_B[:, None]
    theta_B = _lower_bound(best_of_residues(low_BD, codebook, without_B1)[0].double(), nearest_score_B)
    # The rounding of the scores that gave the bound, and of those that are compared with it.
    theta_B -= 4 * codebook.dim**0.5 * torch.finfo(low_BD.dtype).eps * longest(codebook) * u_BD.norm(dim=1)
    found = [
        _shifted(torch.nonzero(score_br > theta_B[tokens, None].to(score_br.dtype)), tokens.start, rows.start)
        for tokens, rows, score_br in _scores(low_BD, rows_kD, layout, without_B1, codebook.budget)
    ]
    token_E, row_E = torch.cat([torch.zeros_like(nearest_B[:0, None].expand(-1, 2)), *found]).unbind(1)
    entries = Entries(token_E, row_E, torch.zeros_like(token_E, dtype=torch.float64))
    score_E = entries.products(u_BD, rows_kD, codebook.budget)
    theta_B = _root(score_E, entries, nearest_score_B, theta_B, axis)
    mine_B, local_B = layout.find(nearest_B)
    weight_B = torch.where(mine_B, 1.0 + nearest_score_B - theta_B, 0.0)
    weight_E = torch.cat([score_E - theta_B[token_E], weight_B])
    some = torch.nonzero(weight_E > 0)[:, 0]
    token_E = torch.cat([token_E, torch.arange(len(local_B), device=token_E.device)])
    return Entries(token_E[some], torch.cat([row_E, local_B])[some], weight_E[some])


def _lower_bound(top_Bq: Tensor, nearest_score_B: Tensor) -> Tensor:
    """A theta that is not too large: (sum of s - 1) / size of any set of codes; here of the best ones found."""
    top_Bq = torch.sort(top_Bq, dim=1, descending=True).values
    size_q = torch.arange(1, top_Bq.shape[1] + 1, dtype=top_Bq.dtype, device=top_Bq.device)
    sums_Bq = torch.cumsum(top_Bq, 1)
    with_nearest_B = ((sums_Bq + nearest_score_B[:, None]) / (size_q + 1)).amax(1)
    return torch.stack([nearest_score_B, with_nearest_B, ((sums_Bq - 1.0) / size_q).amax(1)]).amax(0)


def _root(score_E: Tensor, entries: Entries, nearest_score_B: Tensor, theta_B: Tensor, axis: Axis) -> Tensor:
    """theta of sum_j (s_j - theta)_+ = 1 by Newton's method from below: it never passes the root, and is there as soon
    as the support stays. The nearest code, with s = 1 + nearest_score, is not among the entries."""
    before_B = torch.full_like(theta_B, -1.0)
    for _ in range(ROUNDS):
        above_E = (score_E > theta_B[entries.token_E]).double()
        parts = [entries.per_token(part, len(theta_B)) for part in (score_E * above_E, above_E)]
        sum_B, count_B = ops.sum_over(torch.stack(parts), axis)
        nearest_B = 1.0 + nearest_score_B > theta_B
        count_B = count_B + nearest_B
        if bool((count_B == before_B).all()):
            break
        # The one of the sum and that of the nearest code cancel: scores are as small as 1 / K and would drown in them.
        root_B = (sum_B + torch.where(nearest_B, nearest_score_B, -1.0)) / count_B.clamp_min(1.0)
        theta_B, before_B = torch.maximum(theta_B, root_B), count_B
    return theta_B
