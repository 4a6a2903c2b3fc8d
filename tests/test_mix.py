"""Codebook.mix, the blockwise softmax over split rows, and the entropy of the mean: values and gradients.

The loss of a rank is a mean over its tokens plus a number that is the same on all ranks, so the gradient of the mean of
all losses is x.grad / world, and what an engine makes of the rows' gradients; the dense form has it from autograd.
"""

from __future__ import annotations

import math
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from similarities import NAMES, added
from whole import CODES, FOUR, GRIDS, close, engine_gradient, mine, normal, put

from vqscale.codes import dense, scan, tally
from vqscale.codes.codebook import Codebook
from vqscale.parallel.mesh import Mesh

TOKENS, DIM = 24, 6
# K, bytes for blocks, tokens of a block, temperature, entropy temperature
CASES = {
    "one code": (1, 2**26, 2048, 1.0, 1.0),
    "fewer codes than ranks": (3, 2**26, 2048, 0.5, 0.1),
    "not divisible": (13, 2**26, 7, 2.0, 0.3),
    "many blocks of rows": (517, 1, 2048, 0.7, 0.05),
    "many blocks of both": (300, 200_000, 5, 1.0, 1.0),
    "few pairs in every block": (1500, 1, 2048, 0.05, 0.02),
    "few pairs in some blocks": (900, 1, 7, 0.2, 0.02),
}
# Which outputs the loss uses: each alone, then all at once; the backward pass has a branch for every one. A rank takes
# its branch by that and not by how many others there are: four on the code axis are compared for all at once.
USED = ["mean", "lse", "code", "entropy", "spread", "columns", "mean lse code entropy spread columns"]


def _used(grid):
    return USED[-1:] if grid == (1, 4) else USED


def _loss(used, mean_ND, lse_N, code_ND, entropy_N, spread, columns, weights):
    weight_ND, weight_N, other_N = weights
    parts = {
        "mean": lambda: (mean_ND * weight_ND).sum(1).mean(),
        "lse": lambda: (lse_N * weight_N).mean(),
        "code": lambda: (code_ND.square() * weight_ND).sum(1).mean(),
        "entropy": lambda: (entropy_N * other_N).mean(),
        "spread": lambda: 3.0 * spread,
        "columns": lambda: columns,
    }
    return sum(parts[name]() for name in used.split())


def _weights(cut):
    return cut(normal(TOKENS, DIM, seed=11)), cut(normal(TOKENS, seed=12)), cut(normal(TOKENS, seed=13))


@added()
def _mix(data, codes):
    mesh = Mesh(data, codes)
    weights = _weights(lambda x: mine(x, mesh))
    out = {}
    for (case, (num_codes, budget, token_block, temperature, entropy_temperature)), similarity in product(
        CASES.items(), NAMES
    ):
        weight_K = normal(num_codes, seed=14)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scan, "TOKEN_BLOCK", token_block)
            codebook = put(Codebook(num_codes, DIM, mesh=mesh, similarity=similarity), normal(num_codes, DIM, seed=21))
            codebook.budget = budget
            grads = {}
            for used in _used((data, codes)):
                x = mine(normal(TOKENS, DIM, seed=22), mesh).requires_grad_()
                codebook.rows.grad = None
                mixed = codebook.mix(x, temperature, entropy_temperature)
                spread = tally.entropy_of_mean(mixed.columns_k, len(x), mesh)
                # sum_k weight_k columns_k: one term per rank, which adds up over the world to the term of all tokens
                columns = (mixed.columns_k * weight_K[codebook.layout.start : codebook.layout.stop]).sum()
                parts = (mixed.mean_ND, mixed.lse_N, mixed.code_ND, mixed.entropy_N, spread, columns)
                _loss(used, *parts, weights).backward()
                grads[used] = [torch.zeros_like(t) if t.grad is None else t.grad for t in (x, codebook.rows)]
            values = (mixed.ids_N, mixed.score_N, mixed.mean_ND, mixed.lse_N, mixed.entropy_N, mixed.saturation_N)
            plain = codebook.mix(x, temperature)
            assert plain.entropy_N is plain.columns_k is None
            assert torch.equal(plain.mean_ND, mixed.mean_ND)
            out[case, similarity] = ([v.detach() for v in values], mixed.columns_k.detach(), spread.detach(), grads)
    return out


@pytest.mark.parametrize("grid", [(1, 1), *(pytest.param(grid, marks=FOUR) for grid in [(1, 2), (1, 4), (2, 2)])])
@added()
def test_mix_is_the_dense_one_in_values_and_gradients(ranks, grid):
    world = grid[0] * grid[1]
    results = ranks(world, _mix, *grid, timeout_s=240.0)
    for case, (num_codes, _, _, temperature, entropy_temperature) in CASES.items():
        for similarity in NAMES:
            got = [result[case, similarity] for result in results]
            rows = normal(num_codes, DIM, seed=21).requires_grad_()
            x = normal(TOKENS, DIM, seed=22).requires_grad_()
            mixed = dense.mix(x, rows, similarity, temperature, entropy_temperature)
            ids, score = dense.nearest(x, rows, similarity)
            score = score / temperature
            values = (ids, score, mixed.mean_ND, mixed.lse_N, mixed.entropy_N, torch.exp(score - mixed.lse_N))
            for which, value in enumerate(values):
                close(torch.cat([part[0][which] for part in got]), value.detach())
            columns = engine_gradient([part[1] for part in got], grid[1]) * world
            close(columns, mixed.columns_K.detach())
            mean_K = mixed.columns_K / TOKENS
            spread = -(mean_K * mean_K.log()).sum()
            for part in got:
                close(part[2], spread.detach())
            total = (mixed.columns_K * normal(num_codes, seed=14)).sum() / world
            for used in _used(grid):
                parts = (mixed.mean_ND, mixed.lse_N, rows[ids], mixed.entropy_N, spread, total)
                loss = _loss(used, *parts, _weights(lambda w: w))
                grad_x, grad_rows = torch.autograd.grad(loss, (x, rows), retain_graph=True, allow_unused=True)
                grad_x, grad_rows = (
                    torch.zeros_like(leaf) if grad is None else grad for leaf, grad in ((x, grad_x), (rows, grad_rows))
                )
                grads = [part[3][used] for part in got]
                close(torch.cat([grad[0] for grad in grads]) / world, grad_x)
                close(engine_gradient([grad[1] for grad in grads], grid[1]), grad_rows)


def _spread(data, codes):
    """The global entropy of the mean, and the one that this rank would see of its own tokens alone."""
    mesh = Mesh(data, codes)
    codebook = put(Codebook(50, DIM, mesh=mesh), normal(50, DIM, seed=1))
    x = mine(3 * normal(TOKENS, DIM, seed=2), mesh)
    mixed = codebook.mix(x, entropy_temperature=0.01)
    return tally.entropy_of_mean(mixed.columns_k, len(x), mesh).detach(), mixed.entropy_N.detach().mean()


@pytest.mark.parametrize("grid", [*GRIDS, pytest.param((4, 1), marks=FOUR)])
def test_the_average_entropy_is_global_on_both_axes(ranks, grid):
    world = grid[0] * grid[1]
    rows, x = normal(50, DIM, seed=1), 3 * normal(TOKENS, DIM, seed=2)

    def spread(x):
        mean_K = torch.softmax(x @ rows.t() / 0.01, 1).mean(0)
        return -torch.xlogy(mean_K, mean_K).sum()

    results = ranks(world, _spread, *grid)
    for got, _ in results:
        close(got, spread(x))
    if world > 1:
        alone = torch.stack([spread(part) for part in x.chunk(world)]).mean()
        assert float(alone) < float(spread(x)) - 0.1, "this batch would not show a per-rank entropy"
        token = torch.stack([entropy for _, entropy in results]).mean()
        assert 0 <= float(token) <= float(spread(x)) <= math.log(50)


def _uniform(codes):
    mesh = Mesh(1, codes)
    codebook = put(Codebook(2**16, 4, mesh=mesh), torch.zeros(2**16, 4))
    mixed = codebook.mix(torch.ones(8, 4), 1.0, 0.01)
    return tally.entropy_of_mean(mixed.columns_k, 8, mesh).detach(), mixed.entropy_N.detach(), mixed.lse_N.detach()


@pytest.mark.parametrize("codes", CODES)
def test_uniform_probabilities_have_the_entropy_log_K_without_an_epsilon(ranks, codes):
    # the released code's 1e-5 inside the logarithm would give 10.59 here
    for numbers in ranks(codes, _uniform, codes):
        for number in numbers:
            assert number.dtype == torch.float32
            torch.testing.assert_close(number, torch.full_like(number, math.log(2**16)), rtol=1e-6, atol=0.0)


def _single(codes):
    """float32 at the size and temperature of a real run: logits of some tens, times 100 for the entropies."""
    mesh = Mesh(1, codes)
    codebook = put(Codebook(4096, 64, mesh=mesh), normal(4096, 64, seed=3).float())
    x = mine(normal(64, 64, seed=4).float(), mesh)
    mixed = codebook.mix(x, 1.0, 0.01)
    spread = tally.entropy_of_mean(mixed.columns_k, len(x), mesh)
    return mixed.mean_ND.detach(), mixed.lse_N.detach(), mixed.entropy_N.detach(), spread.detach()


@pytest.mark.parametrize("codes", CODES)
def test_float32_is_near_the_truth_at_temperature_one_hundredth(ranks, codes):
    results = ranks(codes, _single, codes)
    truth = dense.mix(normal(64, 64, seed=4), normal(4096, 64, seed=3), "dot", 1.0, 0.01)
    mean_K = truth.columns_K / 64
    close(torch.cat([r[0] for r in results]).double(), truth.mean_ND, 1e-4)
    close(torch.cat([r[1] for r in results]).double(), truth.lse_N, 1e-5)
    close(torch.cat([r[2] for r in results]).double(), truth.entropy_N, 1e-3)
    close(results[0][3].double(), -torch.xlogy(mean_K, mean_K).sum(), 1e-3)


def test_a_code_that_nobody_wants_counts_and_pulls_nothing():
    columns = torch.tensor([4.0, 4.0, 0.0, 0.0], requires_grad=True)
    spread = tally.entropy_of_mean(columns, 8, Mesh())
    close(spread.detach(), torch.tensor(math.log(2)), 1e-6)
    spread.backward()
    assert torch.isfinite(columns.grad).all()
    assert columns.grad[2:].tolist() == [0.0, 0.0]


def test_huge_logits_overflow_nothing():
    rows = torch.tensor([[1e18, 0.0], [0.0, 1e18], [-1e18, 0.0]])
    x = torch.tensor([[1e3, 0.0], [0.0, -1e3]], requires_grad=True)
    codebook = put(Codebook(3, 2), rows)
    mixed = codebook.mix(x, 1.0, 0.01)
    assert mixed.ids_N.tolist() == [0, 0]
    # token 0 takes row 0 alone; token 1 shares rows 0 and 2
    close(mixed.entropy_N.detach(), torch.tensor([0.0, math.log(2)]), 1e-6)
    (mixed.entropy_N.sum() + tally.entropy_of_mean(mixed.columns_k, 2, Mesh())).backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(codebook.rows.grad).all()


def test_x_is_what_a_finite_difference_says():
    codebook = put(Codebook(70, 3, similarity="euclid"), normal(70, 3, seed=1))
    codebook.budget = 1

    def outputs(x):
        mixed = codebook.mix(x, 0.5, 0.3)
        return mixed.mean_ND, mixed.lse_N, mixed.entropy_N, mixed.columns_k

    assert torch.autograd.gradcheck(outputs, normal(5, 3, seed=2).requires_grad_(), rtol=1e-6)


def test_every_invariant_of_the_derivation_names_a_test_that_exists():
    tests = Path(__file__).parent
    text = (tests.parent / "vqscale" / "codes" / "softmax" / "README.md").read_text()
    there = {
        name for path in tests.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 20
    assert named <= there, sorted(named - there)
