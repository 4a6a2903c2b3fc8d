"""Products in bfloat16: where they are taken, what they leave as it is, and how far the rest is from float64."""

from __future__ import annotations

import pytest
import torch
from whole import GRIDS, engine_gradient, mine, normal, put

from vqscale.codes import dense, products
from vqscale.codes.codebook import Codebook
from vqscale.codes.softmax import forward
from vqscale.parallel.mesh import Mesh

TOKENS, CODES, DIM = 24, 700, 12
SIMILARITIES = ["dot", "euclid", "cosine"]
# Of a norm. Operands and the sums of a block are rounded to 2^-9 each; a gradient is a difference of such numbers.
MEAN, GRADIENT = 2.0**-8, 2.0**-6


def _mixed(precision, similarity, scale, data=1, codes=1):
    """(what a mixture says, what products in bfloat16 may move: mean rows, gradients of x and of the rows)."""
    mesh = Mesh(data, codes)
    with products.precision(precision), pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "fast_on_cpu", lambda: True)
        codebook = put(Codebook(CODES, DIM, mesh=mesh, similarity=similarity), normal(CODES, DIM, seed=1).float())
        codebook.budget = 1  # many blocks
        x = mine(scale * normal(TOKENS, DIM, seed=2).float(), mesh).requires_grad_()
        out = codebook.mix(x, 0.7, 0.2)
    weight_ND, weight_N = (mine(weight.float(), mesh) for weight in _weights())
    loss = ((out.mean_ND * weight_ND).sum(1) + (out.lse_N + out.entropy_N) * weight_N).mean()
    loss.backward()
    says = [part.detach() for part in (out.ids_N, out.score_N, out.lse_N, out.entropy_N, out.code_ND, out.columns_k)]
    return says, [out.mean_ND.detach(), x.grad, codebook.rows.grad]


def _weights():
    return normal(TOKENS, DIM, seed=3), normal(TOKENS, seed=4)


def _truth(similarity, scale):
    """The same three in float64."""
    x, rows = (scale * normal(TOKENS, DIM, seed=2).float()).double(), normal(CODES, DIM, seed=1).float().double()
    x.requires_grad_(), rows.requires_grad_()
    out = dense.mix(x, rows, similarity, 0.7, 0.2)
    weight_ND, weight_N = _weights()
    ((out.mean_ND * weight_ND).sum(1) + (out.lse_N + out.entropy_N) * weight_N).mean().backward()
    return [out.mean_ND.detach(), x.grad, rows.grad]


def _distance(got, expected):
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 1000.0])
def test_what_is_not_a_product_with_probabilities_keeps_every_bit(similarity, scale):
    plain, exact = _mixed("highest", similarity, scale)
    low, near = _mixed("medium", similarity, scale)
    for got, expected in zip(low, plain, strict=True):
        assert torch.equal(got, expected)
    bounds = (MEAN, GRADIENT, GRADIENT)
    for got, float32, truth, bound in zip(near, exact, _truth(similarity, scale), bounds, strict=True):
        assert got.dtype == torch.float32
        assert _distance(got, truth) < bound + 2 * _distance(float32, truth)
    if scale == 1.0:
        assert not torch.equal(near[0], exact[0]), "nothing was rounded: these products were float32"


def _on_ranks(data, codes):
    return _mixed("medium", "dot", 1.0, data, codes)[1]


@pytest.mark.parametrize("grid", GRIDS[1:])
def test_on_any_grid(ranks, grid):
    world = grid[0] * grid[1]
    results = ranks(world, _on_ranks, *grid)
    mean_ND, x_grad, rows_grad = _truth("dot", 1.0)
    assert _distance(torch.cat([part[0] for part in results]), mean_ND) < MEAN
    assert _distance(torch.cat([part[1] for part in results]) / world, x_grad) < GRADIENT
    assert _distance(engine_gradient([part[2] for part in results], grid[1]), rows_grad) < GRADIENT


def test_they_are_taken_where_they_are_asked_for_and_the_machine_is_worth_it(monkeypatch):
    for fast in (True, False):
        monkeypatch.setattr(products, "fast_on_cpu", lambda fast=fast: fast)
        for precision in ("highest", "high", "medium"):
            medium = precision == "medium"
            with products.precision(precision):
                assert torch.get_float32_matmul_precision() == precision
                assert products.wanted("cpu", torch.float32) == ("bf16" if medium and fast else "fp32")
                assert products.wanted("cuda", torch.float32) == ("bf16" if medium else "fp32")
                assert products.wanted("cpu", torch.float64) == products.wanted("cuda", torch.float64) == "fp32"


def test_what_others_set_in_the_process_does_not_reach_a_codebook_and_precision_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr(products, "fast_on_cpu", lambda: True)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert products.wanted("cpu", torch.float32) == "fp32"
        with pytest.raises(ZeroDivisionError), products.precision("high"):
            1 / 0  # noqa: B018
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    with products.precision("medium"), products.precision("highest"):
        assert products.wanted("cuda", torch.float32) == "fp32"
    assert products.wanted("cuda", torch.float32) == "fp32"


def test_a_mixture_asks_for_them(monkeypatch):
    asked = []
    whole = forward._pass
    monkeypatch.setattr(forward, "_pass", lambda *args, **more: asked.append(args[3]) or whole(*args, **more))
    monkeypatch.setattr(products, "fast_on_cpu", lambda: True)
    for precision in ("highest", "medium"):
        with products.precision(precision):
            Codebook(40, 4).mix(torch.randn(3, 4))
    assert [wanted.products for wanted in asked] == ["fp32", "bf16"]
