"""Counts, sums, usage and the exponential window, against plain one-process arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from whole import CODES, FOUR, GRIDS, close, mine, normal, table

from vqscale.codes import dense, tally
from vqscale.codes.rows import Rows
from vqscale.parallel.mesh import Mesh

SIZES = [1, 3, 13, 200]


def _ids(num_codes, num_tokens=40):
    return torch.randint(num_codes, (num_tokens,), generator=torch.Generator().manual_seed(num_codes))


def _count(data, codes):
    mesh = Mesh(data, codes)
    out = {}
    for num_codes in SIZES:
        layout = Rows(num_codes, codes, mesh.codes.rank)
        ids, x = mine(_ids(num_codes), mesh), mine(normal(40, 3, seed=1), mesh)
        counts = tally.counts(ids, layout, mesh)
        out[num_codes] = (counts, tally.sums(ids, x, layout, mesh), tally.usage(counts, mesh.codes, num_codes))
    return out


@pytest.mark.parametrize("grid", [*GRIDS, pytest.param((4, 1), marks=FOUR)])
def test_counts_and_sums_are_over_all_tokens_of_all_ranks(ranks, grid):
    results = ranks(grid[0] * grid[1], _count, *grid)
    for num_codes in SIZES:
        ids, got = _ids(num_codes), [result[num_codes] for result in results]
        counts = table([part[0] for part in got], grid[1])
        assert counts.dtype == torch.int64
        assert torch.equal(counts, dense.counts(ids, num_codes))
        close(table([part[1] for part in got], grid[1]), dense.sums(ids, normal(40, 3, seed=1), num_codes))
        share = counts[counts > 0] / 40
        for _, _, usage in got:
            assert float(usage["usage"]) == len(share) / num_codes
            assert float(usage["dead"]) == num_codes - len(share)
            assert math.isclose(
                float(usage["perplexity"]), float(torch.exp(-(share * share.log()).sum())), rel_tol=1e-6
            )


def _known(codes):
    axis = Mesh(1, codes).codes
    layout = Rows(8, codes, axis.rank)

    def usage(counts, least=0.0):
        stats = tally.usage(torch.tensor(counts)[layout.start : layout.stop], axis, 8, least)
        return [float(stats[key]) for key in ("usage", "perplexity", "dead")]

    return [
        usage([5, 5, 5, 5, 5, 5, 5, 5]),
        usage([7, 0, 0, 0, 0, 0, 0, 0]),
        usage([0, 0, 3, 0, 0, 3, 0, 0]),
        usage([0, 0, 0, 0, 0, 0, 0, 0]),
        usage([0.5, 0.5, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1], least=0.2),
        usage([0] * 7 + [2**40 + 1]),
    ]


@pytest.mark.parametrize("codes", CODES)
def test_usage_and_perplexity_where_they_are_known(ranks, codes):
    for even, one, two, none, least, big in ranks(codes, _known, codes):
        assert even == pytest.approx([1, 8, 0])
        assert one == pytest.approx([1 / 8, 1, 7])
        assert two == pytest.approx([2 / 8, 2, 6])
        assert none == pytest.approx([0, 1, 8])
        assert least[0] == 2 / 8
        assert least[2] == 6
        assert big == pytest.approx([1 / 8, 1, 7])


def _hits(steps, num_codes):
    hits = torch.randint(0, 4, (steps, num_codes), generator=torch.Generator().manual_seed(3))
    hits[:, ::5] = 0
    return hits


def _window(codes, decay):
    mesh = Mesh(1, codes)
    window = tally.Window(13, mesh, decay)
    here = slice(window.layout.start, window.layout.stop)
    for step, hits in enumerate(_hits(30, 13)):
        if step == 20:  # rows 2 and 7 are renewed
            renewed = torch.tensor([row - here.start for row in (2, 7) if here.start <= row < here.stop])
            window.restart(renewed.to(torch.int64))
        window.add(hits[here], 1)
    return window.counts_k, window.age_k, window.rate(), window.usage()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("codes", CODES)
def test_the_window_is_the_weighted_sum_that_it_says(ranks, codes, decay):
    results = ranks(codes, _window, codes, decay)
    counts, age, rate = (torch.cat([result[which] for result in results]) for which in range(3))
    hits = _hits(30, 13).double()
    for row in range(13):
        seen = hits[20 if row in (2, 7) else 0 :, row]
        weights = torch.tensor([decay ** (len(seen) - 1 - step) for step in range(len(seen))], dtype=torch.float64)
        assert float(age[row]) == len(seen)
        assert float(counts[row]) == pytest.approx(float((1 - decay) * (weights * seen).sum()), rel=1e-5)
        assert float(rate[row]) == pytest.approx(float((weights * seen).sum() / weights.sum()), rel=1e-5)
    share = counts[counts > 0].double() / counts.double().sum()
    for result in results:
        assert float(result[3]["perplexity"]) == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-5)


def test_a_code_is_used_while_its_last_hit_is_within_the_window():
    window = tally.Window(3, Mesh(), 0.9)  # looks back 10 steps
    never, once = torch.tensor([5, 0, 0]), torch.tensor([5, 0, 1])
    window.add(once, 1)
    assert float(window.usage()["dead"]) == 1
    for _ in range(10):
        window.add(never, 1)
        assert float(window.usage()["dead"]) == 1
    window.add(never, 1)
    assert float(window.usage()["dead"]) == 2
    assert float(window.usage()["usage"]) == pytest.approx(1 / 3)


def test_the_window_follows_the_codes_and_the_tokens_of_a_step():
    """With no decay given a code at its fair share has 5 hits in the window: 5 K / tokens steps, 10 to 10,000."""
    for num_codes, tokens, steps in ((1000, 100, 50), (1000, 10**6, 10), (10**6, 1, 10_000)):
        window = tally.Window(num_codes, Mesh())
        window.add(torch.ones(num_codes, dtype=torch.int64), tokens)
        assert 1 / (1 - window.decay) == pytest.approx(steps)
    window = tally.Window(100, Mesh())  # 20 steps
    once, never = torch.ones(100, dtype=torch.int64), torch.zeros(100, dtype=torch.int64)
    never[7] = once[7] = 3
    window.add(once, 25)
    for _ in range(20):
        window.add(never, 25)
        assert float(window.usage()["dead"]) == 0
    window.add(never, 25)
    assert float(window.usage()["dead"]) == 99


def test_a_row_that_nobody_has_counted_has_rate_zero():
    window = tally.Window(2, Mesh(), 0.99)
    assert window.rate().tolist() == [0, 0]
    window.add(torch.tensor([4, 0]), 4)
    assert window.rate().tolist() == pytest.approx([4, 0], rel=1e-5)


def test_the_window_is_in_a_checkpoint():
    for decay in (0.9, None):
        window, again = (tally.Window(100, Mesh(), decay) for _ in range(2))
        for step in range(60):
            window.add(torch.arange(100) == step, 6)
        again.load_state_dict(window.state_dict())
        assert torch.equal(again.rate(), window.rate())
        assert again.usage() == window.usage()
