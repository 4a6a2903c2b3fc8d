"""Points of the simplex over split codes, and the small programs on it: against sorting, enumeration and autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from whole import CODES, close, integers, normal, put

from vqscale.codes import scan
from vqscale.codes.codebook import Codebook
from vqscale.codes.convex import active_set, dense, simplex
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh

TOKENS, DIM = 24, 5
# K, bytes for blocks: one code, fewer than ranks, fewer than residue classes, not divisible, many blocks
SIZES = [(1, 2**26), (3, 2**26), (13, 2**26), (517, 1), (1000, 200_000)]
SCALES = [1e-4, 0.1, 1.0, 30.0]
KINDS = [torch.float32, torch.float64]


def _case(num_codes, scale, dtype=torch.float64):
    """(rows, u of all tokens, nearest codes)."""
    nearest = torch.randint(num_codes, (TOKENS,), generator=torch.Generator().manual_seed(2))
    return normal(num_codes, DIM, seed=1).to(dtype), scale * normal(TOKENS, DIM, seed=3), nearest


def _projected(codes, dtype):
    mesh, out = Mesh(1, codes), {}
    for num_codes, budget in SIZES:
        for scale in SCALES:
            rows, u, nearest = _case(num_codes, scale, dtype)
            codebook = put(Codebook(num_codes, DIM, mesh=mesh), rows)
            codebook.budget = budget
            entries = simplex.project(u, nearest, (u * rows[nearest].double()).sum(1), codebook)
            part = torch.zeros(TOKENS, codebook.layout.count, dtype=torch.float64)
            part[entries.token_E, entries.row_E] = entries.weight_E
            assert int((part > 0).sum()) == len(entries)
            out[num_codes, scale] = (part, vars(simplex.describe(entries, TOKENS // codes, codebook, 0.01)))
    return out


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("codes", CODES)
def test_project_is_the_one_by_sorting(ranks, codes, dtype):
    results = ranks(codes, _projected, codes, dtype)
    for num_codes, _ in SIZES:
        for scale in SCALES:
            rows, u, nearest = _case(num_codes, scale, dtype)
            score = u @ rows.double().t() + torch.nn.functional.one_hot(nearest, num_codes)
            expected = dense.project(score)
            got = [result[num_codes, scale] for result in results]
            p = torch.cat([part for part, _ in got], dim=1)
            # the search is in the rows' precision, the weights on what it found are float64
            close(p, expected, 1e-12 if dtype == torch.float64 else 1e-7)
            close(p.sum(1), torch.ones(TOKENS, dtype=torch.float64), 1e-12)
            shape = {name: torch.cat([part[name] for _, part in got]) for name in got[0][1]}
            assert torch.equal(shape["ids_N"], p.argmax(1))
            close(shape["largest_N"], p.amax(1))
            assert torch.equal(shape["count_N"], (p > 0).sum(1).double())
            assert torch.equal(shape["stored_N"], (p >= 0.01).sum(1).clamp_min(1).double())
            close(shape["columns_k"], p.sum(0))


def test_a_projection_of_a_point_of_the_simplex_is_the_point():
    _, _, nearest = _case(13, 1.0)
    nothing = torch.zeros(TOKENS, DIM).double()
    entries = simplex.project(nothing, nearest, nothing[:, 0], Codebook(13, DIM))
    assert torch.equal(entries.weight_E, torch.ones(TOKENS, dtype=torch.float64))
    assert torch.equal(entries.row_E[entries.token_E.argsort()], nearest)


def _residues(codes):
    mesh, out = Mesh(1, codes), {}
    for num_codes, budget in SIZES:
        for make in (normal, integers):
            codebook = put(Codebook(num_codes, DIM, mesh=mesh), make(num_codes, DIM, seed=1).double())
            codebook.budget = budget
            out[num_codes, make.__name__] = simplex.best_of_residues(
                make(TOKENS, DIM, seed=3).double(), codebook, _without(num_codes)
            )
    return out


def _without(num_codes):
    """Codes that do not take part, with places that hold none."""
    ids = torch.randint(num_codes, (TOKENS, 6), generator=torch.Generator().manual_seed(4))
    return torch.where(ids % 3 == 0, -1, ids)


@pytest.mark.parametrize("codes", CODES)
def test_the_best_of_every_residue_class_whatever_the_split(ranks, codes):
    results = ranks(codes, _residues, codes)
    for num_codes, _ in SIZES:
        for make in (normal, integers):
            score = make(TOKENS, DIM, seed=3).double() @ make(num_codes, DIM, seed=1).double().t()
            for token, ids in enumerate(_without(num_codes)):
                score[token, ids[ids >= 0]] = scan.LOWEST
            for result in results:
                value, ids = result[num_codes, make.__name__]
                for residue in range(simplex.RESIDUES):
                    of = torch.arange(num_codes)[residue :: simplex.RESIDUES]
                    best = score[:, of].amax(1) if len(of) else score.new_full((TOKENS,), scan.LOWEST)
                    close(value[:, residue], best, 1e-12)
                    none = best == scan.LOWEST
                    assert (ids[none, residue] == num_codes).all()
                    there = ids[~none, residue]
                    assert (there % simplex.RESIDUES == residue).all()
                    close(score[~none].gather(1, there[:, None])[:, 0], best[~none], 1e-12)


def _bytes(codes):
    mesh, out = Mesh(1, codes), {}
    for num_codes in (2**8, 2**12, 2**16):
        codebook = Codebook(num_codes, DIM, mesh=mesh)
        with ops.count_bytes() as sent:
            simplex.best_of_residues(torch.zeros(TOKENS, DIM), codebook, torch.zeros(TOKENS, 1, dtype=torch.int64))
        out[num_codes] = dict(sent)
    return out


@pytest.mark.dist
def test_candidates_cost_24_bytes_whatever_K(ranks):
    for sent in ranks(2, _bytes, 2):
        # a score in float32 and an id, all-reduced by two ranks: what is there, once
        assert set(map(str, sent.values())) == {str({"codes": TOKENS * simplex.RESIDUES * 12})}


def _programs(num, size, dim, lam, seed=1):
    away = normal(num, size, dim, seed=seed)
    gram = away @ away.mT + lam * torch.eye(size, dtype=torch.float64)
    linear = torch.zeros(num, size, dtype=torch.float64)
    linear[:, 0] = lam
    start = torch.zeros_like(linear)
    start[:, 0] = 1
    return gram, linear, start, torch.ones_like(start, dtype=torch.bool)


def _objective(p, gram, linear):
    return 0.5 * torch.einsum("ns,nst,nt->n", p, gram, p) - (p * linear).sum(1)


@pytest.mark.parametrize("lam", [1e-3, 0.1, 10.0])
def test_minimise_is_the_best_of_all_supports(lam):
    gram, linear, start, allowed = _programs(30, 5, 3, lam)
    best = torch.full((30,), torch.inf, dtype=torch.float64)
    for inside in itertools.product([False, True], repeat=5):
        if any(inside):
            mask = torch.tensor(inside).expand(30, 5)
            p = active_set.on_support(gram, linear, mask)
            value = torch.where((p >= -1e-12).all(1), _objective(p, gram, linear), torch.inf)
            best = torch.minimum(best, value)
    p = active_set.minimise(gram, linear, start, allowed)
    close(_objective(p, gram, linear), best, 1e-12)
    assert (p >= 0).all()
    close(p.sum(1), torch.ones(30, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize(
    ("size", "dim", "lam"), [(1, 3, 0.1), (12, 3, 1e-2), (40, 16, 0.1), (40, 5, 1e-6), (60, 2, 1e-9)]
)
def test_minimise_ends_at_the_optimum_from_anywhere(size, dim, lam):
    gram, linear, start, allowed = _programs(50, size, dim, lam)
    p = active_set.minimise(gram, linear, start, allowed)
    slope = torch.einsum("nst,nt->ns", gram, p) - linear
    level = (p * slope).sum(1, keepdim=True)
    assert float((level - slope).max()) < 1e-13
    assert float(torch.where(p > 0, (slope - level).abs(), 0).max()) < 1e-13
    other = torch.softmax(normal(50, size, seed=2), 1)
    close(active_set.minimise(gram, linear, other, allowed), p, 1e-11 / lam**0.5)


def test_minimise_keeps_out_what_is_not_allowed_and_leaves_what_is_no_number():
    gram, linear, start, allowed = _programs(6, 8, 3, 0.1)
    allowed[:, 4:] = False
    p = active_set.minimise(gram, linear, start, allowed)
    assert (p[:, 4:] == 0).all()
    few = active_set.minimise(gram[:, :4, :4], linear[:, :4], start[:, :4], allowed[:, :4])
    close(p[:, :4], few, 1e-12)
    gram[2] = torch.nan
    broken = active_set.minimise(gram, linear, start, allowed)
    assert torch.equal(broken[2], start[2])
    assert torch.equal(broken[[0, 1, 3, 4, 5]], p[[0, 1, 3, 4, 5]])


def test_equal_codes_share_a_weight_equally():
    gram, linear, start, allowed = _programs(4, 3, 2, 0.1)
    twice = torch.tensor([0, 1, 1, 1, 2])
    shared = gram[:, twice][:, :, twice] - 0.1 * torch.ones(5, 5).double() * (twice[:, None] == twice[None])
    shared = shared + 0.1 * torch.eye(5, dtype=torch.float64)
    p = active_set.minimise(
        shared, linear[:, twice] * torch.tensor([1.0, 0, 0, 0, 0]), start[:, twice], allowed[:, twice]
    )
    close(p[:, 1], p[:, 2], 1e-13)
    close(p[:, 1], p[:, 3], 1e-13)


def test_differentiate_is_what_autograd_says_of_the_bordered_system():
    gram, linear, start, allowed = _programs(5, 7, 4, 0.1)
    p = active_set.minimise(gram, linear, start, allowed)
    assert int((p > 0).sum(1).min()) > 1
    slope = normal(5, 7, seed=9)
    for token in range(5):
        inside = p[token] > 0
        size = int(inside.sum())
        system = torch.ones(size + 1, size + 1, dtype=torch.float64)
        system[:size, :size] = gram[token][inside][:, inside]
        system[size, size] = 0
        free = linear[token][inside].requires_grad_()
        solved = torch.linalg.solve(system, torch.cat([free, torch.ones(1, dtype=torch.float64)]))
        close(solved[:size].detach(), p[token][inside], 1e-12)
        (expected,) = torch.autograd.grad((solved[:size] * slope[token][inside]).sum(), free)
        got = active_set.differentiate(gram, p > 0, slope)[token]
        close(got[inside], expected, 1e-12)
        assert (got[~inside] == 0).all()
