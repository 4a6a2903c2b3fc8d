"""EMA: its exact numbers, a plain loop as the definition, accumulation, and revival of rows that are averages."""

from __future__ import annotations

import pytest
import torch
from whole import GRIDS, close, mine, normal, put, table

from vqscale import quantizers
from vqscale.codes import dense
from vqscale.parallel.mesh import Mesh

K, DIM, TOKENS = 13, 3, 24
EPS = 1e-5


def ema(mesh=None, rows=None, **settings):
    """EMA whose rows are given whole; its averages begin at them, as build would make them."""
    rows = normal(K, DIM, seed=1) if rows is None else rows
    settings = {"num_codes": len(rows), "dim": rows.shape[1], "init": "normal", "revive_every": 0, **settings}
    quantizer = quantizers.build({"name": "ema", **settings}, mesh).to(rows.dtype)
    put(quantizer.codebook, rows)
    quantizer.averages.sums_kD.copy_(quantizer.codebook.rows)
    return quantizer


def test_the_exact_case():
    rows = torch.tensor([[0.0, 0.0], [10.0, 10.0]], dtype=torch.float64)
    quantizer = ema(rows=rows, decay=0.8, eps=EPS, commitment_weight=1.0)
    out = quantizer(torch.tensor([[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]], dtype=torch.float64))
    assert out.ids.tolist() == [0, 0, 1]
    assert set(out.losses) == {"commitment"}
    assert float(out.losses["commitment"]) == pytest.approx(7 / 6, rel=1e-12)
    quantizer.update()
    assert quantizer.averages.counts_k.tolist() == pytest.approx([1.2, 1.0])
    assert quantizer.averages.sums_kD.flatten().tolist() == pytest.approx([0.2, 0.4, 9.8, 9.8])
    expected = torch.tensor([[0.16667, 0.33333], [9.79999, 9.79999]], dtype=torch.float64)
    torch.testing.assert_close(quantizer.codebook.rows.detach(), expected, rtol=0, atol=6e-6)
    # to the last digit: N~ = (N + eps) / (2.2 + 2 eps) 2.2
    smooth = [(n + EPS) / (2.2 + 2 * EPS) * 2.2 for n in (1.2, 1.0)]
    assert float(quantizer.codebook.rows[0, 1]) == pytest.approx(0.4 / smooth[0], rel=1e-12)
    assert float(quantizer.codebook.rows[1, 0]) == pytest.approx(9.8 / smooth[1], rel=1e-12)


def _reference(steps, decay):
    """The published update as a loop over whole tensors."""
    rows = normal(K, DIM, seed=1)
    counts, sums = torch.ones(K, dtype=torch.float64), rows.clone()
    for step in range(steps):
        x = normal(TOKENS, DIM, seed=10 + step)
        ids = torch.cdist(x, rows).argmin(1)
        counts = decay * counts + (1 - decay) * dense.counts(ids, K).double()
        sums = decay * sums + (1 - decay) * dense.sums(ids, x, K)
        smooth = (counts + EPS) / (counts.sum() + K * EPS) * counts.sum()
        rows = sums / smooth[:, None]
    return rows, counts, sums


def _run(data, codes, steps, decay, pieces):
    mesh = Mesh(data, codes)
    quantizer = ema(mesh, decay=decay, eps=EPS)
    quantizer.begin()
    for step in range(steps):
        x = mine(normal(TOKENS, DIM, seed=10 + step), mesh)
        for piece in x.chunk(pieces):  # accumulation: several batches before the optimiser's step
            quantizer(piece)
        assert quantizer.update() == []
    averages = quantizer.averages
    window = quantizer.upkeep.window
    return quantizer.codebook.rows.detach(), averages.counts_k, averages.sums_kD, window.counts_k, window.age_k


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("grid", GRIDS)
def test_rows_are_the_moving_averages_of_all_tokens_of_all_ranks(ranks, grid, pieces):
    results = ranks(grid[0] * grid[1], _run, *grid, 5, 0.7, pieces)
    for which, expected in enumerate(_reference(5, 0.7)):
        close(table([result[which] for result in results], grid[1]), expected)
    window = table([result[3] for result in results], grid[1])
    assert torch.equal(window, _run(1, 1, 5, 0.7, 1)[3])
    assert all((result[4] == 5).all() for result in results)


def test_the_commitment_alone_pulls_the_tokens_and_nothing_pulls_the_rows():
    quantizer, x = ema(commitment_weight=0.3), normal(TOKENS, DIM, seed=2).requires_grad_()
    out = quantizer(x)
    out.losses["commitment"].backward()
    c = normal(K, DIM, seed=1)[out.ids]
    close(x.grad, 0.3 * 2 / (TOKENS * DIM) * (x.detach() - c))
    assert not quantizer.codebook.rows.requires_grad
    assert quantizer.codebook.rows.grad is None


def test_a_skipped_step_and_an_evaluation_leave_no_trace():
    first, second = ema(), ema()
    good, bad = normal(TOKENS, DIM, seed=3), torch.full((TOKENS, DIM), torch.nan, dtype=torch.float64)
    first(good)
    first.update()
    second(bad)
    second.update(stepped=False)
    second.eval()(bad)
    second.train()(good)
    second.update()
    second.update()  # nothing was seen since: nothing moves
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def _revived(data, codes):
    mesh = Mesh(data, codes)
    quantizer = ema(mesh, revive_every=2, revive_after=2, revive_most=8, window_decay=0.5, decay=0.9)
    quantizer.begin()
    rows = normal(K, DIM, seed=1)
    before = after = None
    for step in range(4):
        x = rows[:8] + 0.01 * normal(8, DIM, seed=step)  # codes 8 to 12 are never hit
        if step == 3:
            before = quantizer.codebook.rows.detach().clone()
        quantizer(mine(x, mesh))
        quantizer.update()
        if step == 2:
            state = quantizer.averages.counts_k.clone(), quantizer.averages.sums_kD.clone()
    after = quantizer.codebook.rows.detach()
    return before, after, *state


@pytest.mark.parametrize("grid", GRIDS)
def test_a_revived_row_is_not_pulled_back_by_its_old_average(ranks, grid):
    results = ranks(grid[0] * grid[1], _revived, *grid)
    before, after, counts, sums = (table([result[which] for result in results], grid[1]) for which in range(4))
    tokens = normal(K, DIM, seed=1)[:8] + 0.01 * normal(8, DIM, seed=2)
    for row in range(8, K):
        assert (tokens == before[row]).all(1).any()
    assert counts[8:].tolist() == [1.0] * 5
    assert torch.equal(sums[8:], before[8:])
    # one step later, each lies where it was put: its tokens came from beside it
    assert float((after - before).norm(dim=1).max()) < 0.05


def _split_by_the_book(counts, sums, below):
    """UViM's loop over whole tables, without its noise."""
    while counts.min() < below and counts.max() / 2 >= below:
        least, most = int(counts.argmin()), int(counts.argmax())
        counts[[least, most]] = counts[most] / 2
        sums[[least, most]] = sums[most] / 2
    return counts, sums


def _split(data, codes, steps):
    mesh = Mesh(data, codes)
    quantizer = ema(mesh, decay=0.5, split_below=0.2, unit_norm=True, similarity="dot")
    quantizer.begin()
    before = None
    for step in range(steps):
        x = normal(1, DIM, seed=5) + 0.3 * normal(TOKENS, DIM, seed=20 + step)  # near one direction, so few codes win
        quantizer(mine(x, mesh))
        if step == steps - 1:
            averages, (new_k, new_kD) = quantizer.averages, quantizer._new
            before = averages.counts_k.lerp(new_k, 0.5), averages.sums_kD.lerp(new_kD, 0.5)
        quantizer.update()
    return *before, averages.counts_k, averages.sums_kD, quantizer.codebook.rows.detach()


@pytest.mark.parametrize("grid", GRIDS)
def test_rare_codes_are_split_off_from_the_most_used_as_uvim_does(ranks, grid):
    results = ranks(grid[0] * grid[1], _split, *grid, 4)  # after as many halvings 1 is below 0.1
    counts, sums, found_counts, found_sums, rows = (table([result[i] for result in results], grid[1]) for i in range(5))
    assert (counts < 0.1).sum() >= 3  # 0.2 (1 - decay)
    wanted_counts, wanted_sums = _split_by_the_book(counts.clone(), sums.clone(), 0.1)
    close(found_counts, wanted_counts)
    torch.testing.assert_close(found_sums, wanted_sums, rtol=1.01e-3, atol=1e-12)
    changed = (counts < 0.1).nonzero()[:, 0]
    assert not (found_sums[changed] == wanted_sums[changed]).any()  # two codes at one place would never part
    close(rows.norm(dim=1), torch.ones(K, dtype=torch.float64))
    close(rows, found_sums / found_sums.norm(dim=1, keepdim=True))


def test_a_code_is_either_split_off_or_revived():
    with pytest.raises(ValueError, match="either split off from another or revived"):
        ema(split_below=0.1, revive_every=1)
