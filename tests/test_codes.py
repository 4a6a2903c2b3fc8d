"""Codebook without softmax: nearest, lookup, replace and the blocks of the scan, against the dense definition."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from similarities import NAMES, added
from whole import CODES, GRIDS, close, engine_gradient, integers, mine, normal, put, table

from vqscale.codes import dense, scan
from vqscale.codes.codebook import Codebook
from vqscale.codes.rows import Rows, draw
from vqscale.parallel.mesh import Mesh

# (K, bytes for blocks, tokens of a block): K smaller than four ranks, K not divisible, many blocks of rows and tokens
SHAPES = [(1, 2**26, 2048), (3, 2**26, 2048), (13, 2**26, 7), (517, 1, 2048), (517, 200_000, 5)]
TOKENS, DIM = 24, 6


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 2048, 5000])
@pytest.mark.parametrize("num_rows", [0, 1, 64, 1000])
@pytest.mark.parametrize("budget", [1, 2**20, 2**30])
def test_blocks_cover_everything_once_in_order_and_within_budget(num_tokens, num_rows, budget):
    seen = torch.zeros(num_tokens, num_rows, dtype=torch.int32)
    before = (0, -1)
    for tokens, rows in scan.blocks(num_tokens, num_rows, 4, budget):
        seen[tokens, rows] += 1
        assert (tokens.start, rows.start) > before
        before = (tokens.start, rows.start)
        num_t, num_r = tokens.stop - tokens.start, rows.stop - rows.start
        assert num_t >= 1
        assert num_r >= 1
        assert num_r <= 64 or num_t * num_r * 4 * scan.BUFFERS <= budget
    assert torch.equal(seen, torch.ones_like(seen))


@added()
def _search(data, codes):
    """nearest, lookup with its gradient, for every similarity and shape; only this rank's results."""
    mesh, out = Mesh(data, codes), {}
    for similarity, (num_codes, budget, token_block) in product(NAMES, SHAPES):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scan, "TOKEN_BLOCK", token_block)
            codebook = Codebook(num_codes, DIM, mesh=mesh, similarity=similarity)
            codebook.budget = budget
            put(codebook, normal(num_codes, DIM, seed=num_codes))
            x = mine(normal(TOKENS, DIM, seed=2), mesh)
            ids, score = codebook.nearest(x)
            z = codebook.lookup(ids)
            (z * mine(normal(TOKENS, DIM, seed=3), mesh)).sum(1).mean().backward()
            out[similarity, num_codes, token_block] = (ids, score, z.detach(), codebook.rows.grad)
    return out


@added()
@pytest.mark.parametrize("grid", GRIDS)
def test_nearest_and_lookup_are_the_dense_ones(ranks, grid):
    results = ranks(grid[0] * grid[1], _search, *grid, timeout_s=240.0)
    x, weight = normal(TOKENS, DIM, seed=2), normal(TOKENS, DIM, seed=3)
    for similarity in NAMES:
        for num_codes, _, token_block in SHAPES:
            rows = normal(num_codes, DIM, seed=num_codes).requires_grad_()
            expected_ids, expected_score = dense.nearest(x, rows.detach(), similarity)
            expected_z = rows[expected_ids]
            (expected_z * weight).sum(1).mean().backward()
            got = [result[similarity, num_codes, token_block] for result in results]
            ids = torch.cat([part[0] for part in got])
            assert ids.dtype == torch.int64
            assert torch.equal(ids, expected_ids)
            close(torch.cat([part[1] for part in got]), expected_score)
            assert torch.equal(torch.cat([part[2] for part in got]), expected_z)
            close(engine_gradient([part[3] for part in got], grid[1]), rows.grad)


def _ties(codes):
    mesh = Mesh(1, codes)
    out = {}
    for similarity in ("dot", "euclid"):
        for budget in (1, 2**26):
            codebook = put(Codebook(300, 4, mesh=mesh, similarity=similarity), integers(300, 4, seed=5))
            codebook.budget = budget
            x = mine(integers(40, 4, seed=6), mesh)
            mixture = codebook.mix(x, entropy_temperature=0.5)
            out[similarity, budget] = (codebook.nearest(x)[0], mixture.ids_N)
    same = put(Codebook(300, 4, mesh=mesh, similarity="cosine"), torch.ones(300, 4))
    same.budget = 1
    out["all equal"] = (same.nearest(torch.ones(2, 4))[0], same.mix(torch.ones(2, 4)).ids_N)
    return out


@pytest.mark.parametrize("codes", CODES)
def test_ties_go_to_the_lowest_id_across_blocks_and_ranks(ranks, codes):
    # 300 rows of 625 possible ones, so that many rows are there twice and many scores are equal
    results = ranks(codes, _ties, codes)
    rows, x = integers(300, 4, seed=5), integers(40, 4, seed=6)
    ties = 0
    for (similarity, budget), _ in list(results[0].items())[:-1]:
        score = dense.logits(x, rows, similarity)
        best = score == score.amax(1, keepdim=True)
        ties += int((best.sum(1) > 1).sum())
        lowest = torch.tensor([int(torch.nonzero(line)[0]) for line in best])
        for which in (0, 1):
            assert torch.equal(torch.cat([result[similarity, budget][which] for result in results]), lowest)
    assert ties > 40
    for result in results:
        assert [ids.tolist() for ids in result["all equal"]] == [[0, 0], [0, 0]]


@added()
def _broken(data, codes, similarity):
    """Scores and ids with rows that are not numbers, of a search and of a mixture; and of one that has none."""
    mesh = Mesh(data, codes)
    out = []
    for bad in (None, torch.nan, torch.inf):
        rows = normal(3000, 6, seed=1).float()
        if bad is not None:
            rows[2017, 2] = bad
        codebook = put(Codebook(3000, 6, mesh=mesh, similarity=similarity), rows)
        codebook.budget = 1
        x = mine(normal(8, 6, seed=2).float(), mesh)
        ids, score = codebook.nearest(x)
        mixed = codebook.mix(x, 0.5, 0.05)
        out.append((ids, score, mixed.lse_N.detach(), mixed.entropy_N.detach(), mixed.mean_ND.detach()))
    return out


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("similarity", NAMES)
@added()
def test_a_row_that_is_not_a_number_is_reported(ranks, grid, similarity):
    """It must not take the codes that share its block or its rank out of the search without a word."""
    sound, *broken = zip(*ranks(grid[0] * grid[1], _broken, *grid, similarity), strict=True)
    x, rows = normal(8, 6, seed=2).float(), normal(3000, 6, seed=1).float()
    assert torch.equal(torch.cat([part[0] for part in sound]), dense.nearest(x, rows, similarity)[0])
    assert all(number.isfinite().all() for part in sound for number in part)
    for which, name in enumerate(("nan", "inf")):
        for part in broken[which]:
            ids, score, *rest = part
            assert 0 <= int(ids.min()) <= int(ids.max()) < 3000
            if name == "nan":
                assert score.isnan().all()
                assert all(number.isnan().all() for number in rest)
            # An infinite row is infinitely bad for some tokens, which then have another; it is the best of nobody.
            elif score.isfinite().any():
                assert 2017 not in ids[score.isfinite()].tolist()


def _first_rows(codes):
    mesh = Mesh(1, codes)
    return [Codebook(num, 3, mesh=mesh, init=init, init_scale=0.5, seed=9).rows.detach() for num, init in FIRST]


FIRST = [(3, "normal"), (13, "uniform"), (2500, "normal")]


@pytest.mark.parametrize("codes", CODES)
def test_a_codebook_begins_the_same_on_any_number_of_ranks(ranks, codes):
    results = ranks(codes, _first_rows, codes)
    for case, (num_codes, init) in enumerate(FIRST):
        assert torch.equal(torch.cat([result[case] for result in results]), draw(Rows(num_codes), 3, init, 0.5, seed=9))


def _replace(data, codes):
    mesh = Mesh(data, codes)
    codebook = put(Codebook(13, 2, mesh=mesh), integers(13, 2, seed=1))
    changed = codebook.replace(torch.tensor([12, -1, 0, 7, 3]), 100 + torch.arange(10.0).view(5, 2))
    nothing = codebook.replace(torch.tensor([-1, -1]), torch.full((2, 2), 9.0))
    return codebook.rows.detach(), changed + codebook.layout.start, nothing


@pytest.mark.parametrize("grid", GRIDS)
def test_replace_sets_exactly_these_rows_and_tells_which(ranks, grid):
    results = ranks(grid[0] * grid[1], _replace, *grid)
    expected = integers(13, 2, seed=1)
    expected[torch.tensor([12, 0, 7, 3])] = 100 + torch.tensor([[0.0, 1], [4, 5], [6, 7], [8, 9]])
    assert torch.equal(table([result[0] for result in results], grid[1]), expected)
    for replica in range(grid[0]):
        group = results[replica * grid[1] : (replica + 1) * grid[1]]
        assert sorted(torch.cat([result[1] for result in group]).tolist()) == [0, 3, 7, 12]
        assert all(len(result[2]) == 0 for result in group)


def _half(codes, backward_too):
    """Half precision tokens, with and without autocast, beside the same numbers in float32."""
    mesh = Mesh(1, codes)
    out = []
    for kind in (torch.bfloat16, torch.float16):
        for autocast in (False, True):
            answers = []
            for x in (mine(normal(16, 8, seed=1), mesh).to(kind), mine(normal(16, 8, seed=1), mesh).to(kind).float()):
                lower = autocast and x.dtype == kind
                codebook = put(Codebook(200, 8, mesh=mesh, similarity="euclid"), normal(200, 8, seed=2).float())
                x.requires_grad_()
                with torch.autocast("cpu", torch.bfloat16, enabled=lower):
                    ids, score = codebook.nearest(x)
                    mixture = codebook.mix(x, 0.5, 0.1)
                    z = codebook.lookup(ids)
                    parts = (mixture.mean_ND, mixture.lse_N, mixture.entropy_N, mixture.columns_k.square(), z.square())
                    total = sum(part.sum() for part in parts)
                with torch.autocast("cpu", torch.bfloat16, enabled=lower and backward_too):
                    total.backward()
                values = (ids, score, mixture.ids_N, mixture.mean_ND, mixture.lse_N, mixture.entropy_N)
                answers.append(([v.detach() for v in (*values, mixture.columns_k, z)], x.grad, codebook.rows.grad))
            out.append(((kind, autocast), answers))
    return out


@pytest.mark.parametrize("backward_too", [False, True])
@pytest.mark.parametrize("codes", CODES)
def test_half_precision_and_autocast_do_not_lower_the_precision(ranks, codes, backward_too):
    for result in ranks(codes, _half, codes, backward_too):
        for (kind, autocast), ((got, got_x, got_rows), (values, grad_x, grad_rows)) in result:
            for value, expected in zip(got, values, strict=True):
                assert value.dtype == expected.dtype
                assert torch.equal(value, expected), (kind, autocast)
            assert got_x.dtype == kind
            assert torch.equal(got_x, grad_x.to(kind)), (kind, autocast)
            assert got_rows.dtype == torch.float32
            assert torch.equal(got_rows, grad_rows), (kind, autocast)


def test_a_codebook_on_the_meta_device_has_shapes_only():
    with torch.device("meta"):
        codebook = Codebook(2**40, 256)
    assert codebook.rows.is_meta
    assert codebook.rows.shape == (2**40, 256)


def test_rows_that_are_not_learned_have_no_gradient():
    codebook = Codebook(5, 2, learned=False)
    assert not codebook.rows.requires_grad
    x = torch.ones(3, 2, requires_grad=True)
    codebook.mix(x).mean_ND.sum().backward()
    assert x.grad is not None
    assert codebook.rows.grad is None
