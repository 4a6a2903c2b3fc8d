"""Upkeep: first rows from data, revival of exactly the dead; the same choices on every grid of ranks."""

from __future__ import annotations

import pytest
import torch
from whole import CODES, GRIDS, mine, normal, put, table

from vqscale.codes.codebook import Codebook
from vqscale.codes.config import UpkeepConfig
from vqscale.codes.revival import Upkeep, choose, dead_ids
from vqscale.parallel.mesh import Mesh

K, DIM, TOKENS = 13, 3, 8


def _batch(step):
    return normal(TOKENS, DIM, seed=100 + step).float()


def _choose(data, codes):
    mesh = Mesh(data, codes)
    return [choose(mine(_batch(0), mesh), num, mesh, seed) for num, seed in ((TOKENS, 1), (3, 1), (3, 2), (1, 3))]


@pytest.mark.parametrize("grid", GRIDS)
def test_candidates_are_tokens_of_the_global_batch_without_replacement(ranks, grid):
    results = ranks(grid[0] * grid[1], _choose, *grid)
    alone = _choose(1, 1)
    for result in results:
        for got, expected in zip(result, alone, strict=True):
            assert torch.equal(got, expected)
    batch = {tuple(token.tolist()) for token in _batch(0)}
    for chosen in alone:
        assert len({tuple(token.tolist()) for token in chosen}) == len(chosen)
        assert {tuple(token.tolist()) for token in chosen} <= batch
    assert not torch.equal(alone[1], alone[2])


def _dead_ids(codes):
    mesh = Mesh(1, codes)
    codebook = Codebook(K, DIM, mesh=mesh)
    out = []
    for dead, num, first in DEAD:
        dead_K = torch.zeros(K, dtype=torch.bool)
        dead_K[list(dead)] = True
        here = dead_K[codebook.layout.start : codebook.layout.stop]
        out.append(dead_ids(here, num, first, codebook).tolist())
    return out


DEAD = [((), 3, 0), ((1, 4, 12), 5, 0), ((1, 4, 12), 2, 4), ((1, 4, 12), 3, 5), (range(K), K, 7), (range(K), 4, 11)]


@pytest.mark.parametrize("codes", CODES)
def test_the_dead_are_named_in_turn_on_every_rank(ranks, codes):
    expected = [[-1, -1, -1], [1, 4, 12, -1, -1], [4, 12], [12, 1, 4], [*range(7, K), *range(7)], [11, 12, 0, 1]]
    assert ranks(codes, _dead_ids, codes) == [expected] * codes


def _warm_up(data, codes, warmup_steps, num_codes):
    """Rows, whether the warm-up is on, and what changed, before each of warmup_steps + 1 updates."""
    mesh = Mesh(data, codes)
    codebook = Codebook(num_codes, DIM, mesh=mesh)
    config = UpkeepConfig(init="data", warmup_steps=warmup_steps, revive_every=0)
    upkeep = Upkeep(codebook, config, mesh, seed=5)
    out = [(codebook.rows.detach().clone(), upkeep.warming)]
    upkeep.begin()
    for step in range(warmup_steps + 1):
        warming = upkeep.warming
        x = mine(_batch(step), mesh)
        upkeep.observe(x, codebook.nearest(x)[0])
        changed = upkeep.update() + codebook.layout.start
        out.append((codebook.rows.detach().clone(), warming, changed))
    return out


@pytest.mark.parametrize(("warmup_steps", "num_codes"), [(1, 5), (1, TOKENS), (2, K), (4, K), (3, 3 * TOKENS)])
@pytest.mark.parametrize("grid", GRIDS)
def test_after_the_warm_up_all_rows_are_tokens_of_its_last_batches(ranks, grid, warmup_steps, num_codes):
    results = ranks(grid[0] * grid[1], _warm_up, *grid, warmup_steps, num_codes)
    alone = _warm_up(1, 1, warmup_steps, num_codes)
    for step in range(warmup_steps + 2):
        assert torch.equal(table([result[step][0] for result in results], grid[1]), alone[step][0])
    assert [entry[1] for entry in alone] == [False, *[True] * warmup_steps, False]
    rows = alone[warmup_steps][0]
    tokens = {tuple(token.tolist()): step for step in range(warmup_steps) for token in _batch(step)}
    drawn = [tokens[tuple(row.tolist())] for row in rows]  # a KeyError: a row that is no token
    needed = -(-num_codes // TOKENS)
    assert set(drawn) == set(range(warmup_steps - needed, warmup_steps))
    assert len({tuple(row.tolist()) for row in rows}) == num_codes
    # each row was drawn once, its number was given back by its owner in every replica, and nothing changed later
    for replica in range(grid[0]):
        group = results[replica * grid[1] : (replica + 1) * grid[1]]
        changed = torch.cat([entry[2] for result in group for entry in result[1:]])
        assert sorted(changed.tolist()) == list(range(num_codes))
    assert torch.equal(alone[-1][0], rows)


def _revive(data, codes, most, steps):
    """Codes 0, 3 and 8 are hit in every step, nobody else ever; rows, what changed and the ages, update by update."""
    mesh = Mesh(data, codes)
    codebook = put(Codebook(K, DIM, mesh=mesh), normal(K, DIM, seed=1).float())
    config = UpkeepConfig(init="normal", window_decay=0.5, revive_every=2, revive_after=4, revive_most=most)
    upkeep = Upkeep(codebook, config, mesh, seed=5)
    upkeep.begin()
    out = []
    for step in range(steps):
        ids = torch.tensor([0, 3, 8, 3, 0, 8, 3, 3])
        upkeep.observe(mine(_batch(step), mesh), mine(ids, mesh))
        changed = upkeep.update() + codebook.layout.start
        out.append((codebook.rows.detach().clone(), changed, upkeep.window.age_k.clone()))
    return out


@pytest.mark.parametrize("most", [2, 1024])
@pytest.mark.parametrize("grid", GRIDS)
def test_revival_renews_exactly_the_dead(ranks, grid, most):
    results = ranks(grid[0] * grid[1], _revive, *grid, most, 9)
    alone = _revive(1, 1, most, 9)
    dead = set(range(K)) - {0, 3, 8}
    before = normal(K, DIM, seed=1).float()
    revived = []
    for step in range(9):
        rows = table([result[step][0] for result in results], grid[1])
        assert torch.equal(rows, alone[step][0])
        age = table([result[step][2] for result in results], grid[1])
        changed = [torch.cat([r[step][1] for r in results[i : i + grid[1]]]) for i in range(0, len(results), grid[1])]
        for replica in changed:
            assert sorted(replica.tolist()) == sorted(alone[step][1].tolist())
        here = changed[0]
        assert set(here.tolist()) <= dead
        batch = {tuple(token.tolist()) for token in _batch(step)}
        assert {tuple(row.tolist()) for row in rows[here]} <= batch
        assert len({tuple(row.tolist()) for row in rows[here]}) == len(here)
        still = torch.ones(K, dtype=torch.bool)
        still[here] = False
        assert torch.equal(rows[still], before[still])
        assert torch.equal(age[here], torch.zeros(len(here)))
        revived.append(sorted(here.tolist()))
        before = rows
    # Every second step, not before a row is four steps old. 10 are dead and 8 tokens are there: 8 are renewed, then
    # the other 2 (the 8 are young), then the 8, which are dead again.
    assert [len(ids) for ids in revived] == ([0, 0, 0, 0, 2, 0, 2, 0, 2] if most == 2 else [0, 0, 0, 0, 8, 0, 2, 0, 8])
    assert not set(revived[4]) & set(revived[6]), "a row was called dead before it had its time"


def test_a_renewed_row_that_is_hit_stays():
    codebook = put(Codebook(K, DIM), normal(K, DIM, seed=1).float())
    config = UpkeepConfig(
        init="normal", window_decay=0.5, revive_every=1, revive_after=3, revive_most=2, revive_from="tokens"
    )
    upkeep = Upkeep(codebook, config, Mesh(), seed=5)
    upkeep.begin()
    ids, kept = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]), None
    for step in range(12):
        upkeep.observe(_batch(step), ids)
        changed = upkeep.update()
        if kept is None and len(changed):
            assert sorted(changed.tolist()) == [11, 12]
            kept, ids = codebook.rows.detach().clone(), torch.arange(K)
        elif kept is not None:
            assert len(changed) == 0
    assert kept is not None
    assert torch.equal(codebook.rows, kept)


def test_a_quarter_of_the_tokens_revives_what_was_unused_while_it_should_have_had_ten_hits():
    codebook = put(Codebook(60, DIM), normal(60, DIM, seed=1).float())
    upkeep = Upkeep(codebook, UpkeepConfig(init="normal", revive_patience=10.0), Mesh(), seed=5)
    upkeep.begin()
    for step in range(100):
        # 8 tokens of 60 codes: 7.5 steps a hit, and nobody is dead before 75 steps
        upkeep.observe(_batch(step), torch.arange(8) + 8 * (step % 5))
        changed = upkeep.update()
        assert len(changed) == (2 if 74 <= step < 84 else 0)
        assert set(changed.tolist()) <= set(range(40, 60))


def test_a_skipped_step_leaves_no_trace_and_accumulation_counts_once():
    def driven(*steps):
        upkeep = Upkeep(put(Codebook(4, 2), normal(4, 2, seed=1)), UpkeepConfig(init="normal"), Mesh(), seed=0)
        upkeep.begin()
        for step in steps:
            for ids in step[0]:
                upkeep.observe(torch.zeros(len(ids), 2), torch.tensor(ids))
            upkeep.update(stepped=step[1])
        return upkeep.window.counts_k, upkeep.window.age_k, upkeep.steps

    for got, expected in zip(
        driven(([[0, 1]], True), ([[2, 2], [3, 3]], False), ([[0, 3], [1, 1]], True)),
        driven(([[0, 1]], True), ([[0, 3, 1, 1]], True)),
        strict=True,
    ):
        assert torch.equal(got, expected)


def test_nobody_drives_nothing_happens():
    codebook = Codebook(K, DIM, seed=3)
    rows = codebook.rows.detach().clone()
    upkeep = Upkeep(codebook, UpkeepConfig(init="data", warmup_steps=1, revive_every=1, revive_after=0), Mesh(), seed=0)
    assert not upkeep.warming
    upkeep.observe(_batch(0), codebook.nearest(_batch(0))[0])
    assert len(upkeep.update()) == 0
    assert torch.equal(codebook.rows, rows)
    assert float(upkeep.window.age_k.sum()) == 0


def test_the_number_of_steps_stays_with_the_host_and_in_checkpoints():
    """A GPU is stood for by the device meta, whose numbers nobody can read: a wait for it would be an error."""
    upkeep = Upkeep(Codebook(K, DIM), UpkeepConfig(init="data", warmup_steps=2), Mesh(), seed=5)
    upkeep.begin()
    upkeep.to("meta")
    assert upkeep.steps.device.type == "cpu"
    assert upkeep.window.counts_k.device.type == "meta"
    assert (upkeep.warming, upkeep.landing) == (True, 0.0)
    assert "steps" in upkeep.state_dict()
    assert "steps" in dict(upkeep.named_buffers())
