"""Products in bfloat16: where they are taken, what they leave as it is, and how far the rest is from float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from whole import GRIDS, engine_gradient, mine, normal, put

from vqscale import matmul, quantizers
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
        for precision, rounding in products.ROUNDINGS.items():
            low = precision in ("medium", "low")
            with products.precision(precision):
                assert torch.get_float32_matmul_precision() == ("medium" if low else precision)
                assert products.wanted("cpu", torch.float32) == ("bf16" if low and fast else "fp32")
                monkeypatch.setattr(products, "has_float8", lambda: True)
                assert products.wanted("cuda", torch.float32) == rounding
                monkeypatch.setattr(products, "has_float8", lambda: False)
                assert products.wanted("cuda", torch.float32) == ("bf16" if low else rounding)
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


class Switched(TorchDispatchMode):
    """What torch's switch says at each float32 product; where it allows, operands are rounded as TF32 does."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        single = any(isinstance(x, torch.Tensor) and x.dtype == torch.float32 for x in args)
        if single and operation._schema.name.removeprefix("aten::").rstrip("_") in ("mm", "addmm", "bmm", "mv"):
            self.seen.add(torch.get_float32_matmul_precision())
            if torch.get_float32_matmul_precision() != "highest":
                sums = int(operation._schema.name.startswith("aten::addmm"))  # what is added to is no operand
                args = (*args[:sums], *(self._round(x) for x in args[sums:]))
        return operation(*args, **(kwargs or {}))

    @staticmethod
    def _round(x):
        """To 10 bits of mantissa."""
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
            return x
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_under_tf32_ids_logits_and_softmaxes_are_those_of_float32(similarity, monkeypatch):
    """As on a GPU: the network's products are rounded, and those with probabilities."""
    monkeypatch.setattr(products, "wanted", lambda kind, dtype: products._asked.get())
    monkeypatch.setattr(matmul, "exact_in_onednn", lambda: False)

    def answers(precision):
        codebook = put(Codebook(CODES, DIM, similarity=similarity), normal(CODES, DIM, seed=1).float())
        x = normal(400, DIM, seed=2).float().requires_grad_()
        with Switched() as switched, products.precision(precision):
            network = x @ torch.eye(DIM)
            out = codebook.mix(x, 0.7, 0.01)
            ids = codebook.nearest(x)[0]
            (out.mean_ND.sum() + out.lse_N.sum()).backward()
        return switched.seen, network.detach(), out, ids, x.grad

    seen, exact, plain, ids, gradient = answers("highest")
    seen_low, rounded, low, low_ids, low_gradient = answers("high")
    assert (seen, seen_low) == ({"highest"}, {"highest", "high"})
    assert not torch.equal(exact, rounded)
    assert torch.equal(low.ids_N, ids)
    assert torch.equal(low_ids, ids)
    for name in ("score_N", "lse_N", "entropy_N", "columns_k", "code_ND"):
        assert torch.equal(getattr(low, name), getattr(plain, name)), name
    assert not torch.equal(low.mean_ND, plain.mean_ND)
    torch.testing.assert_close(low.mean_ND, plain.mean_ND, rtol=0, atol=2e-3)
    torch.testing.assert_close(low_gradient, gradient, rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", quantizers.QUANTIZERS)
def test_no_quantizer_leaves_its_codes_to_tf32_and_its_ids_of_training_are_those_of_encoding(name, monkeypatch):
    """But for products with probabilities, which on a CPU are float32, too."""
    monkeypatch.setattr(matmul, "exact_in_onednn", lambda: False)
    # from data they begin in a warm-up without ids
    inner = {"inner": {"name": "vq", "num_codes": 37, "dim": 6, "init": "normal"}}
    sizes = {"fsq": {"levels": [5, 4, 3]}, "lfq": {"dim": 6}, "bsq": {"dim": 6}, "residual": inner, "grouped": inner}
    quantizer = quantizers.build({"name": name, **sizes.get(name, {"num_codes": 37, "dim": 6})})
    quantizer.begin()
    with Switched() as switched, products.precision("high"):
        for seed in (5, 6):
            x_ND = normal(400, quantizer.dim, seed=seed).float().requires_grad_()
            answer = quantizer(x_ND)
            assert torch.equal(quantizer.encode(x_ND), answer.ids)
            (answer.z.sum() + sum(answer.losses.values())).backward()
            quantizer.update()
    assert switched.seen <= {"highest"}


@pytest.mark.gpu
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_on_a_gpu_ids_of_training_are_those_of_encoding_under_tf32(similarity):
    mesh = Mesh(device="cuda")
    rows, x = normal(4096, 64, seed=1).float(), normal(8192, 64, seed=2).float()
    codebook = put(Codebook(4096, 64, mesh=mesh, similarity=similarity), rows).to("cuda")
    with products.precision("high"):
        mixed, ids = codebook.mix(x.cuda(), 1.0, 0.01), codebook.nearest(x.cuda())[0]
    truth = dense.nearest(x.double(), rows.double(), similarity)[0]
    assert (mixed.ids_N.cpu() == truth).double().mean() > 0.9999  # ties within rounding of float32
    assert torch.equal(ids.cpu(), truth)
