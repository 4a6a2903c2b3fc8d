"""Rows: slices of K over M ranks, their first values, and tables set aside from a module."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from vqscale.codes.rows import DRAW_BLOCK, Rows, Table, draw, set_aside
from vqscale.seed import derive

SIZES = [(1, 1), (1, 4), (3, 4), (13, 4), (13, 5), (4096, 4), (2**18 + 1, 64), (7, 7)]


@pytest.mark.parametrize(("num_codes", "size"), SIZES)
def test_slices_are_contiguous_and_balanced_to_one_row(num_codes, size):
    slices = [Rows(num_codes, size, rank) for rank in range(size)]
    assert slices[0].start == 0
    assert slices[-1].stop == num_codes
    for here, following in pairwise(slices):
        assert here.stop == following.start
    counts = [rows.count for rows in slices]
    assert sum(counts) == num_codes
    assert max(counts) - min(counts) <= 1
    assert (min(counts) == 0) == (num_codes < size)


@pytest.mark.parametrize(("num_codes", "size"), SIZES)
def test_every_id_is_found_once_and_at_its_place(num_codes, size):
    ids = torch.arange(num_codes) if num_codes < 5000 else torch.tensor([0, 1, num_codes // 2, num_codes - 1])
    owners = torch.zeros(len(ids), dtype=torch.int64)
    for rank in range(size):
        rows = Rows(num_codes, size, rank)
        mine, local = rows.find(ids)
        owners += mine
        assert torch.equal(local[mine] + rows.start, ids[mine])
        assert torch.equal(local[~mine], torch.zeros_like(local[~mine]))
        assert local.dtype == torch.int64
    assert torch.equal(owners, torch.ones_like(owners))


def test_nobody_owns_minus_one_and_ids_are_exact_where_floats_are_not():
    big = 2**40
    for rank in range(4):
        mine, local = Rows(big, 4, rank).find(torch.tensor([-1, 2**24 + 1, 2**39 + 1, big - 1]))
        assert mine.tolist() == [False, rank == 0, rank == 2, rank == 3]
        assert local.tolist() == [0, (2**24 + 1) * (rank == 0), rank == 2, (big // 4 - 1) * (rank == 3)]


def test_a_table_without_codes_is_refused():
    with pytest.raises(ValueError, match=r"num_codes is 0: .* change num_codes"):
        Rows(0)


@pytest.mark.parametrize("init", ["normal", "uniform"])
@pytest.mark.parametrize("num_codes", [3, 13, 2 * DRAW_BLOCK, 3 * DRAW_BLOCK + 5])
def test_first_values_do_not_depend_on_the_number_of_ranks(num_codes, init):
    whole = draw(Rows(num_codes), 3, init, 0.5, seed=7)
    assert whole.shape == (num_codes, 3)
    for size in (2, 4, 5):
        parts = [draw(Rows(num_codes, size, rank), 3, init, 0.5, seed=7) for rank in range(size)]
        assert torch.equal(torch.cat(parts), whole)


def test_first_values_are_keyed_by_seed_and_block():
    whole = draw(Rows(2 * DRAW_BLOCK), 2, "normal", 2.0, seed=3)
    for block in range(2):
        generator = torch.Generator().manual_seed(derive(3, "rows", block))
        expected = torch.randn(DRAW_BLOCK, 2, generator=generator) * 2.0
        torch.testing.assert_close(whole[block * DRAW_BLOCK :][:DRAW_BLOCK], expected)
    assert not torch.equal(whole[:DRAW_BLOCK], whole[DRAW_BLOCK:])
    assert not torch.equal(whole, draw(Rows(2 * DRAW_BLOCK), 2, "normal", 2.0, seed=4))
    # a larger table begins with the smaller one
    assert torch.equal(draw(Rows(5 * DRAW_BLOCK), 2, "normal", 2.0, seed=3)[: 2 * DRAW_BLOCK], whole)


def test_first_values_have_their_scale():
    normal = draw(Rows(20 * DRAW_BLOCK), 4, "normal", 0.3, seed=0)
    assert abs(float(normal.mean())) < 0.01
    assert abs(float(normal.std()) - 0.3) < 0.01
    uniform = draw(Rows(20 * DRAW_BLOCK), 4, "uniform", 0.3, seed=0)
    assert float(uniform.abs().max()) <= 0.3
    assert abs(float(uniform.std()) - 0.3 / 3**0.5) < 0.01


def test_a_rank_draws_its_rows_alone():
    # 2^40 rows would not fit anywhere: this returns only because nobody draws the rows of others.
    rows = Rows(2**40, 2**32, 2**31 + 5)
    assert draw(rows, 2, "normal", 1.0, seed=0).shape == (256, 2)


class _Leaf(Table):
    def __init__(self, num_codes):
        super().__init__(Rows(num_codes))
        self.rows = nn.Parameter(torch.ones(num_codes, 2))
        self.register_buffer("counts_k", torch.zeros(num_codes))


class _Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.codebook = _Leaf(3)
        self.linear = nn.Linear(2, 2)


class _Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.quantizer = _Inner()
        self.table = _Leaf(5)

    def forward(self):
        return self.quantizer.linear(self.quantizer.codebook.rows).sum() + self.table.rows.sum()


def test_tables_set_aside_are_out_of_reach_but_in_use():
    module = _Outer()
    codebook, table = module.quantizer.codebook, module.table
    tables = set_aside(module)
    assert set(tables) == {"quantizer.codebook", "table"}
    assert tables["quantizer.codebook"] is codebook is module.quantizer.codebook
    assert tables["table"] is table is module.table
    assert set(module.state_dict()) == {"quantizer.linear.weight", "quantizer.linear.bias"}
    assert [name for name, _ in module.named_parameters()] == ["quantizer.linear.weight", "quantizer.linear.bias"]
    assert list(module.buffers()) == []
    assert not any(isinstance(part, Table) for part in module.modules())
    module().backward()
    assert codebook.rows.grad is not None
    assert torch.equal(table.rows.grad, torch.ones(5, 2))
    assert set_aside(module) == {}


def test_a_module_without_tables_is_left_as_it_is():
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    names = list(module.state_dict())
    assert set_aside(module) == {}
    assert list(module.state_dict()) == names
