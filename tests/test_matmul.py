"""Products of float32 on a CPU: as exact in either library, in both directions, and asked for where they may be."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vqscale import matmul
from vqscale.codes.merge import full_precision


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"], autouse=True)
def library(request, monkeypatch):
    """Each library in turn, where the machine has both and they are as exact."""
    if request.param and not matmul.exact_in_onednn():
        pytest.skip("oneDNN would round here, or is not there")
    monkeypatch.setattr(matmul, "exact_in_onednn", lambda: request.param)
    return request.param


@pytest.mark.parametrize(
    ("rows", "inner", "columns"), [(1, 384, 4096), (8, 3, 17), (100, 384, 1000), (64, 64, 64), (2048, 16, 512)]
)
def test_products_are_float32(rows, inner, columns):
    torch.manual_seed(0)
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    exact, most = a.double() @ b.double(), (a.abs().double() @ b.abs().double()).max()
    with matmul.full("cpu"):
        found = [a @ b, torch.bmm(a[None], b[None])[0], torch.zeros_like(exact, dtype=a.dtype).addmm_(a, b)]
        found += [(b.t() @ a.t()).t(), torch.mm(a, b, out=torch.empty(rows, columns))]
    for got in found:
        assert (got - exact).abs().max() < 2.0**-24 * max(8, inner / 16) * most


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 48), (3, 7, 48), (2, 3, 7, 48)])
def test_a_linear_is_torchs_in_values_and_gradients(bias, shape):
    torch.manual_seed(0)
    ours = matmul.Linear(48, 80, bias=bias)
    exact = nn.Linear(48, 80, bias=bias).double()
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(shape)
    found = []
    for layer, given in ((ours, x.clone().requires_grad_()), (exact, x.double().requires_grad_())):
        y = layer(given)
        (y.sin() * y).sum().backward()
        found.append([y.detach(), given.grad, *(p.grad for p in layer.parameters())])
    for got, expected in zip(*found, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_linear_has_second_derivatives_and_leaves_what_is_frozen():
    layer, x = matmul.Linear(8, 6), torch.randn(4, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    y = x @ layer.weight.t() + layer.bias
    (same,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    expected = torch.autograd.grad(same.square().sum(), layer.weight)[0]
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-4, atol=1e-4)
    layer.requires_grad_(False)
    layer.weight.grad = None
    layer(x).sum().backward()
    assert layer.weight.grad is None


@pytest.mark.parametrize("learns", ["weight", "x", "both"])
def test_a_linear_keeps_what_a_gradient_is_made_of(learns):
    """As torch's own does: of a frozen layer no x, of a first layer no weight."""
    layer, x = matmul.Linear(8, 6).requires_grad_(learns != "x"), torch.randn(4, 8, requires_grad=learns != "weight")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda kept: kept):
        layer(x)
    assert sorted(kept) == {"weight": [4 * 8], "x": [6 * 8], "both": [4 * 8, 6 * 8]}[learns]


@pytest.mark.parametrize("shape", [(8,), (4, 8), (2, 3, 8), (2, 0, 8)])
def test_what_a_linear_answers_may_be_changed_in_place(shape):
    layer, x = matmul.Linear(8, 6), torch.randn(shape, requires_grad=True)
    y = layer(x).mul_(2.0)
    assert y.shape == (*shape[:-1], 6)
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * layer.weight.sum(0).detach().expand(shape))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        layer(torch.randn(*shape[:-1], 16) if len(shape) > 1 else torch.randn(16))


def test_a_linear_goes_through_torch_func():
    layer, x = matmul.Linear(8, 6), torch.randn(3, 4, 8)
    named = {name: p.detach() for name, p in layer.named_parameters()}
    each = torch.func.vmap(torch.func.grad(lambda p, x: torch.func.functional_call(layer, p, x).sum()), (None, 0))
    torch.testing.assert_close(each(named, x)["weight"], x.sum(1)[:, None].expand(3, 6, 8))
    _, slope = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(slope, layer.weight.sum(1).detach().expand(3, 4, 6))


class Products(TorchDispatchMode):
    """torch's switch at each product of matrices."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation._schema.name in ("aten::mm", "aten::addmm", "aten::linear"):
            self.seen.append(torch.get_float32_matmul_precision())
        return operation(*args, **(kwargs or {}))


def test_the_switch_is_turned_around_products_alone(library):
    layer, x = matmul.Linear(8, 6, bias=False), torch.randn(4, 8, requires_grad=True)
    wanted = "medium" if library else "highest"
    with Products() as products:
        y = layer(x)
        assert torch.get_float32_matmul_precision() == "highest"
        y.sum().backward()
        assert products.seen == [wanted] * 3
        with full_precision(x):
            x @ x.t()
        x.detach() @ x.detach().t()
    assert products.seen[3:] == [wanted, "highest"]
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("switch", ["high", "medium"])
def test_what_the_run_allows_stays_allowed_and_other_types_are_torchs(switch):
    layer, x = matmul.Linear(8, 6), torch.randn(4, 8)
    with matmul.matmul_precision(switch), Products() as products:
        layer(x)
    assert set(products.seen) == {switch}
    assert torch.equal(layer.double()(x.double()), F.linear(x.double(), layer.weight, layer.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x).dtype == torch.bfloat16
    with torch.device("meta"):
        assert matmul.Linear(8, 6)(torch.empty(4, 8)).shape == (4, 6)


def test_a_processor_that_would_round_is_left_alone(monkeypatch):
    monkeypatch.undo()
    matmul._keeps_bits.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        assert not matmul.exact_in_onednn()
        with matmul.full("cpu"):
            assert torch.get_float32_matmul_precision() == "highest"
    matmul._keeps_bits.cache_clear()
    with matmul.full("cuda"):
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_matrix_for_few_rows_is_the_product(dtype):
    weight, x = torch.randn(24, 40, dtype=dtype), torch.randn(3, 40, dtype=dtype)
    got, exact = matmul.Matrix(weight)(x), x.double() @ weight.double().t()
    assert got.dtype == dtype
    assert (got - exact).abs().max() < {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.2}[dtype]


def test_what_asks_the_processor_is_no_product_of_a_run():
    matmul._keeps_bits.cache_clear()
    with FlopCounterMode(display=False) as counter:
        matmul.exact_in_onednn()
    assert counter.get_total_flops() == 0
