"""The backward pass of the kernels in several blocks: their size, and that nothing depends on it but rounding.

A block is written by one kernel and read by two products. Answers are those of Codebook.mix, by dense.py and by the
blocks of torch; small budgets make many blocks of small cases.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from whole import CODES, integers, normal

pytest.importorskip("triton")

from fused import DEVICE, answers, check, held, kernels_serve, near, small_tiles

from vqscale.codes import dense, products, scan
from vqscale.codes.codebook import Codebook
from vqscale.codes.gpu import operators, tiles

MIB = 2**20
ALL = "mean lse entropy columns"
MANY = 1  # bytes: the smallest blocks, 128 tokens x 128 codes


@pytest.fixture(autouse=True)
def _several_programs():
    with small_tiles():
        yield


@pytest.mark.parametrize(
    ("tokens", "cache", "budget", "block"),
    [
        (4096, 50 * MIB, 64 * MIB, (4096, 4224)),  # H200: 33 MiB of bfloat16
        (4096, 40 * MIB, 64 * MIB, (4096, 3328)),  # A100
        (4096, 126 * MIB, 64 * MIB, (4096, 8192)),  # B200: the budget is less than the cache
        (65536, 50 * MIB, 64 * MIB, (4096, 4224)),
        (512, 50 * MIB, 64 * MIB, (512, 34048)),
        (4096, 50 * MIB, MIB, (768, 640)),
        (100, 50 * MIB, 64 * MIB, (100, 174720)),
        (4096, 50 * MIB, MANY, (128, 128)),
        (1, 50 * MIB, MANY, (1, 128)),
    ],
)
def test_a_block_follows_the_cache_of_the_device_and_the_budget(tokens, cache, budget, block):
    assert tiles.wave(tokens, 2, cache, budget) == block


def test_blocks_are_within_the_cache_and_the_budget_and_cover_all():
    for num in (1, 127, 300, 4096, 5000, 33000):
        for rows in (1, 100, 5000, 2**18):
            for budget in (MIB // 8, 3 * MIB, 64 * MIB):
                size = tiles.wave(num, 4, 50 * MIB, budget)
                blocks = list(scan.cut(num, rows, *size))
                most = max((t.stop - t.start) * (r.stop - r.start) for t, r in blocks)
                assert 4 * most <= min(budget, 2 * 50 * MIB // 3)
                assert sum((t.stop - t.start) * (r.stop - r.start) for t, r in blocks) == num * rows


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("similarity", ["dot", "euclid"])
def test_many_blocks_say_what_one_says_and_a_second_run_says_it_to_the_bit(similarity, kind):
    given = (1, (200, 270, 12), 0.6, similarity, ALL, kind, (0.7, 0.2))
    many, again, one = answers(*given, MANY), answers(*given, MANY), answers(*given)
    for name, value in many.items():
        assert torch.equal(again[name], value), name
        near(one[name], value, 1e-5 if kind == "fp32" else 1e-2)
    assert kind != "fp32" or not torch.equal(one["dx"], many["dx"]), "there was one block: nothing was added up"


def test_many_blocks_are_the_dense_one(ranks):
    check(ranks, (140, 300, 9), "euclid", ALL, "fp32", 3e-5, budget=MANY)


@pytest.mark.parametrize("codes", CODES[1:])
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_ranks_without_rows(ranks, codes, kind):
    """One code on two ranks, three on four."""
    check(ranks, (8, codes - 1, 5), "euclid", ALL, kind, 3e-5 if kind == "fp32" else 2e-2, codes=codes)


@pytest.mark.parametrize("seed", range(6))
def test_random_cases(ranks, seed):
    generator = torch.Generator().manual_seed(seed)
    num, codes, dim = (int(torch.randint(1, most, (), generator=generator)) for most in (60, 200, 40))
    temperatures = ((1.0, 0.05), (0.1, 1.0), (0.7, 0.01))[seed % 3]
    similarity = ("dot", "euclid", "cosine")[seed // 2]
    check(ranks, (num, codes, dim), similarity, ALL, "fp32", 2e-4, temperatures, budget=MANY)


def _gradients(served, x, rows, weight, temperatures=(1.0, 0.1)):
    """(mean rows, gradients of x and of the rows) by the kernels or by the blocks of torch."""
    codebook = Codebook(*rows.shape)
    codebook.rows.data, codebook.budget = rows.clone().to(DEVICE), MANY
    x = x.clone().to(DEVICE).requires_grad_()

    def run():
        out = codebook.mix(x, *temperatures)
        ((out.mean_ND * weight.to(DEVICE)).sum() + out.entropy_N.sum() + out.lse_N.sum()).backward()
        return out.mean_ND.detach(), x.grad, codebook.rows.grad

    if not served:
        return run()
    with kernels_serve("fp32"):
        return run()


def test_ties_share_their_gradient():
    some = integers(50, 6, seed=1)
    rows, x, weight = torch.cat([some, some, some.flip(0)]), integers(20, 6, seed=2), normal(20, 6, seed=3).float()
    exact_x, exact_rows = x.double().requires_grad_(), rows.double().requires_grad_()
    out = dense.mix(exact_x, exact_rows, "dot", 1.0, 0.1)
    ((out.mean_ND * weight).sum() + out.entropy_N.sum() + out.lse_N.sum()).backward()
    mean, dx, drows = _gradients(True, x, rows, weight)
    for got, expected in ((mean, out.mean_ND), (dx, exact_x.grad), (drows, exact_rows.grad)):
        near(got, expected, 3e-5)


@pytest.mark.parametrize("scale", [1e3, 1e6, 1e12])
def test_logits_beyond_all_bounds_give_finite_gradients(scale):
    """The softmax is a choice: but for the rows that tokens choose, gradients are zero on both sides."""
    x, rows, weight = (
        scale * normal(30, 8, seed=1).float(),
        normal(90, 8, seed=2).float(),
        normal(30, 8, seed=3).float(),
    )
    for got, expected in zip(_gradients(True, x, rows, weight), _gradients(False, x, rows, weight), strict=True):
        assert torch.isfinite(got).all()
        near(got, expected, 1e-4)


def test_what_is_not_a_number_is_where_the_blocks_of_torch_have_it():
    x, rows, weight = normal(30, 8, seed=1).float(), normal(140, 8, seed=2).float(), normal(30, 8, seed=3).float()
    bad_x, bad_rows = x.clone(), rows.clone()
    bad_x[4, 2] = bad_rows[77, 3] = torch.nan
    for tokens, codes in ((bad_x, rows), (x, bad_rows)):
        both = zip(_gradients(True, tokens, codes, weight), _gradients(False, tokens, codes, weight), strict=True)
        for got, expected in both:
            assert torch.equal(got.isnan(), expected.isnan())
            assert got.isnan().any()


def test_of_two_products_a_block_one_is_for_tokens_and_one_for_rows(monkeypatch):
    """Per block one kernel and two products; nothing else is tokens x codes."""
    launched, added = [], []
    whole = operators.Gradients.add_block
    kernel = operators.kernels_backward.logit_gradient_kernel

    class Counted:
        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    def counted(self, du_br, *others):
        added.append(tuple(du_br.shape))
        return whole(self, du_br, *others)

    monkeypatch.setattr(operators.Gradients, "add_block", counted)
    monkeypatch.setattr(operators.kernels_backward, "logit_gradient_kernel", Counted())
    answers(1, (200, 270, 12), 0.6, "dot", ALL, "fp32", (0.7, 0.2), MANY)
    assert len(launched) == len(added) == 2 * 3
    assert added == [(128, 128), (128, 128), (128, 14), (72, 128), (72, 128), (72, 14)]


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_logits_mean_rows_and_gradients_move_by_no_more_than_is_said(kind):
    """The bounds in the docstring of gpu/passes.py, of numbers that bfloat16 and float8 do not hold."""
    u, temperature = 2.0**-8, 0.7
    x, rows, g = (normal(num, 24, seed=num).float().to(DEVICE) for num in (50, 200, 49))
    g = torch.cat([g, 100 * g[:1]])
    codebook = Codebook(*rows.shape)
    codebook.rows.data = rows.clone()
    leaf = x.clone().requires_grad_()
    with kernels_serve(kind):
        out = codebook.mix(leaf, temperature)
        (out.mean_ND * g).sum().backward()
    low = held(x, kind).double() @ held(rows, kind).double().t() / temperature
    x, c, g = x.double(), rows.double(), g.double()
    longest, norm_N = c.norm(dim=1).max(), x.norm(dim=1)
    off_N = 2 * u * norm_N * longest
    if kind == "fp8":
        tiny = 2.0**-17 * x.shape[1] ** 0.5
        off_N = 2.0**-3 * norm_N * longest + tiny * (x.abs().max() * longest + norm_N * c.abs().max())
    error = (out.lse_N - torch.logsumexp(x @ c.t() / temperature, 1)).abs()
    assert (error <= 2.05 * off_N / temperature).all()
    assert error.max() > 2e-3 * (off_N / temperature).max(), "nothing was rounded"
    p = low.softmax(1)
    assert ((out.mean_ND - p @ c).norm(dim=1) <= 2.1 * u * longest).all()
    du = p * (g @ c.t() - (g * (p @ c)).sum(1, keepdim=True)) / temperature
    # A product of bfloat16 on a CPU rounds its sums once more.
    once = 2.1 + (DEVICE == "cpu")
    slope = 4.1 * g.norm(dim=1) * longest / temperature
    bound_x = u * (once * du.abs() @ c.norm(dim=1) + slope * longest)
    assert ((leaf.grad - du @ c).norm(dim=1) <= bound_x).all()
    bound_rows = u * (once * du.abs() + p * slope[:, None]).t() @ x.norm(dim=1)
    assert ((codebook.rows.grad - du.t() @ x).norm(dim=1) <= bound_rows).all()


def test_float8_of_many_rows_needs_no_copy_of_all_of_them(monkeypatch):
    made = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.append(out)
            return out

    x = normal(50, 8, seed=1).float()
    whole, unit = products.float8(x)
    monkeypatch.setattr(products, "ROWS_AT_ONCE", 16)
    with Made():
        low, same = products.float8(x)
    assert torch.equal(low.float(), whole.float())
    assert torch.equal(same, unit)
    known = {x.untyped_storage().data_ptr(), low.untyped_storage().data_ptr()}
    new = [out for out in made if torch.is_tensor(out) and out.untyped_storage().data_ptr() not in known]
    assert max(out.numel() * out.element_size() for out in new) == 16 * 8 * 4


def test_tokens_that_are_not_finite_leave_the_unit_of_the_others():
    x = normal(6, 5, seed=1).float()
    for scale in (1e-33, 1.0, 1e37):
        largest = scale * x.abs().max() / products.float8(scale * x)[1]
        assert 128 <= largest < 256
    low, unit = products.float8(x)
    bad = torch.cat([x, torch.full((1, 5), torch.inf), torch.full((1, 5), torch.nan)])
    worse, same = products.float8(bad)
    assert torch.equal(same, unit)
    assert torch.equal(worse[:6].float(), low.float())
    assert not worse[6:].float().isfinite().any()
    for x in (torch.zeros(2, 3), torch.full((2, 3), 1e-44), torch.full((2, 3), 3e38)):
        low, unit = products.float8(x)
        assert (low.float() * unit).isfinite().all()
        assert ((low.float() * unit - x).abs() <= 2.0**-4 * x + 2.0**-10 * unit).all()
