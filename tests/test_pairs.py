"""The lists of pairs that a softmax does not round away: what is found, what is left out, how much that can be."""

from __future__ import annotations

import math

import pytest
import torch
from whole import close, normal, put

from vqscale.codes import dense, scan
from vqscale.codes.codebook import Codebook
from vqscale.codes.softmax import forward, pairs
from vqscale.codes.softmax.pairs import Collector, Pairs


def _pairs(num_tokens=5, num_rows=9):
    token, row = (torch.rand(num_tokens, num_rows, generator=torch.Generator().manual_seed(1)) > 0.6).nonzero(
        as_tuple=True
    )
    return Pairs(token, row, normal(len(token), seed=2), num_tokens)


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 200, 2000])
@pytest.mark.parametrize("above", [0.0, 3.0])
def test_found_is_every_score_above_the_floor_in_order(columns, above):
    score, floor = normal(7, columns, seed=1), normal(7, seed=2) + above
    token, row, value = pairs.find(score, scan.line_peaks(score), floor)
    expected = (score >= floor[:, None]).nonzero()
    assert torch.equal(torch.stack([token, row], 1), expected)
    assert torch.equal(value, score[token, row])


def test_what_is_not_a_number_is_found():
    score = torch.zeros(2, 70)
    score[1, 68] = math.nan
    token, row, _ = pairs.find(score, scan.line_peaks(score), torch.tensor([1.0, 1.0]))
    assert (token.tolist(), row.tolist()) == ([1], [68])


def test_products_over_pairs_are_the_dense_ones(monkeypatch):
    some, values, x = _pairs(), normal(9, 4, seed=3), normal(5, 4, seed=4)
    weight = normal(len(some), seed=5)
    whole = torch.zeros(5, 9, dtype=torch.float64)
    whole[some.token_P, some.row_P] = weight
    close(some.mean(weight, values), whole @ values)
    close(some.sums(weight), whole.sum(1))
    close(some.columns(weight, 9), whole.sum(0))
    close(some.dot(x, values), (x @ values.t())[some.token_P, some.row_P])
    for at_once in (pairs.ROWS_AT_ONCE, 2):
        out = normal(9, 4, seed=6)
        monkeypatch.setattr(pairs, "ROWS_AT_ONCE", at_once)
        some.add_outer(weight, x, out)
        close(out, normal(9, 4, seed=6) + whole.t() @ x)


def test_no_pairs_at_all():
    none = Collector(3).close(torch.zeros(3, 2))
    values, out = torch.ones(4, 2), torch.zeros(4, 2)
    none.add_outer(torch.zeros(0), torch.ones(3, 2), out)
    assert len(none) == 0
    assert not none.mean(torch.zeros(0), values).any()
    assert none.dot(torch.ones(3, 2), values).shape == (0,)
    assert not out.any()


def test_a_list_is_bounded_by_its_tokens():
    row = torch.arange(pairs.PER_TOKEN)
    found = (torch.zeros_like(row), row, torch.zeros(pairs.PER_TOKEN))
    collector = Collector(1)
    assert collector.add(found, 0, 0)
    assert not collector.add(found, 0, pairs.PER_TOKEN)
    assert len(collector.close(torch.zeros(1))) == pairs.PER_TOKEN


def _mixed(x, rows, temperature, entropy_temperature=None, budget=1):
    return forward.mix(x, scan.Keys(rows), rows, forward.Wanted(len(rows), budget, temperature, entropy_temperature))


@pytest.mark.parametrize("temperature", [0.003, 0.03, 0.3, 3.0])
def test_what_is_left_out_of_a_softmax_is_below_its_rounding(temperature):
    """The bound of pairs.py, against probabilities in float64: nobody's list lacks more than 2^-24 of the sum."""
    x, rows = normal(32, 16, seed=1).float(), normal(4096, 16, seed=2).float()
    mixed = _mixed(x, rows, temperature)
    p = torch.softmax(x.double() @ rows.double().t() / temperature, 1)
    kept = torch.zeros_like(p, dtype=torch.bool)
    for tokens, some in mixed.dense:
        kept[tokens, some] = True
    kept[mixed.pairs.token_P, mixed.pairs.row_P] = True
    assert float((p * ~kept).sum(1).max()) <= 2.0**-24
    if temperature <= 0.03:
        assert len(mixed.pairs), "this temperature would not show a list"
        assert kept.double().mean() < 0.5
    if temperature == 3.0:
        assert kept.all()


@pytest.mark.parametrize("entropy_temperature", [0.5, 0.01])
def test_an_entropy_temperature_is_served_by_pairs_where_they_are_few(entropy_temperature):
    mixed = _mixed(normal(16, 8, seed=1), normal(2000, 8, seed=2), 1.0, entropy_temperature)
    assert (mixed.entropy_pairs is not None) == (entropy_temperature == 0.01)


@pytest.mark.parametrize(
    ("temperatures", "passes"), [((0.3, 1.0), 1), ((1.0, 1.0), 1), ((1.0, 0.5), 2), ((1.0, 0.01), 1)]
)
def test_an_entropy_temperature_that_is_not_below_the_temperature_begins_no_list(temperatures, passes, monkeypatch):
    made, whole = [], forward._pass
    monkeypatch.setattr(forward, "_pass", lambda *args, **more: made.append(1) or whole(*args, **more))
    _mixed(normal(16, 8, seed=1), normal(2000, 8, seed=2), *temperatures)
    assert len(made) == passes


def test_equal_codes_overflow_the_list_and_are_done_densely():
    codebook = put(Codebook(3000, 4), torch.zeros(3000, 4))
    x = torch.ones(8, 4, requires_grad=True)
    out = codebook.mix(x, 1.0, 0.01)
    close(out.entropy_N.detach(), torch.full((8,), math.log(3000)), 1e-5)
    close(out.columns_k.detach(), torch.full((3000,), 8 / 3000), 1e-6)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 3000.0])
def test_float32_gradients_from_flat_to_saturated(scale):
    """|x . c| from 0.1 to 1e4: as near to float64 as the dense form is in float32."""
    rows, x, weight = normal(700, 16, seed=1), scale * normal(24, 16, seed=2), normal(24, 16, seed=3)

    def gradients(mix, dtype):
        leaves = [part.float().to(dtype).requires_grad_() for part in (x, rows)]
        out = mix(*leaves)
        ((out.mean_ND * weight.to(dtype)).sum() + out.entropy_N.sum() + out.lse_N.sum()).backward()
        return [leaf.grad.double() for leaf in leaves]

    def ours():
        codebook = put(Codebook(700, 16), rows.float())
        codebook.budget = 1
        leaf = x.float().requires_grad_()
        out = codebook.mix(leaf, 1.0, 0.01)
        ((out.mean_ND * weight.float()).sum() + out.entropy_N.sum() + out.lse_N.sum()).backward()
        return [leaf.grad.double(), codebook.rows.grad.double()]

    truth = gradients(lambda x, rows: dense.mix(x, rows, "dot", 1.0, 0.01), torch.float64)
    plain = gradients(lambda x, rows: dense.mix(x, rows, "dot", 1.0, 0.01), torch.float32)
    for got, naive, exact in zip(ours(), plain, truth, strict=True):
        size = float(exact.abs().max())
        assert float((got - exact).abs().max()) <= 4 * float((naive - exact).abs().max()) + 4e-6 * size


def test_a_token_that_is_not_a_number_is_reported_and_spoils_no_other():
    rows, x = normal(900, 6, seed=1).float(), normal(5, 6, seed=2).float()
    clean = put(Codebook(900, 6), rows).mix(x, 0.02, 0.001)
    x[3, 2] = math.nan
    for budget in (1, 2**26):
        codebook = put(Codebook(900, 6), rows)
        codebook.budget = budget
        out = codebook.mix(x, 0.02, 0.001)
        assert out.mean_ND[3].isnan().any()
        assert out.entropy_N[3].isnan()
        others = [0, 1, 2, 4]
        close(out.mean_ND[others].detach(), clean.mean_ND[others].detach(), 1e-5)
        assert torch.equal(out.ids_N[others], clean.ids_N[others])


@pytest.mark.parametrize(("temperature", "entropy_temperature"), [(0.03, None), (1.0, 0.01)])
def test_what_is_left_out_of_gradients_is_below_the_bound(temperature, entropy_temperature, monkeypatch):
    """Four times 2^-24 of the largest term (softmax/README.md), in float64, where rounding is far below that."""
    monkeypatch.setattr(pairs, "depth", lambda num_codes, dtype: 24.0 + math.log2(num_codes))
    rows, x, weight = normal(4096, 16, seed=1), normal(32, 16, seed=2), normal(32, 16, seed=3)
    codebook, leaves = put(Codebook(4096, 16), rows), [x.clone().requires_grad_(), rows.clone().requires_grad_()]
    codebook.budget, ours_x = 1, x.clone().requires_grad_()

    def loss(out):
        return out.entropy_N.sum() if entropy_temperature else (out.mean_ND * weight).sum()

    loss(codebook.mix(ours_x, temperature, entropy_temperature)).backward()
    truth = dense.mix(*leaves, "dot", temperature, entropy_temperature or 1.0)
    exact = torch.autograd.grad(loss(truth), leaves)
    if entropy_temperature:
        slope_N = truth.entropy_N.detach() + (24 + 12) * math.log(2)
    else:
        slope_N = (weight @ rows.t() - (weight * truth.mean_ND).sum(1, keepdim=True)).abs().amax(1).detach()
    term_N = 4 * 2.0**-24 * slope_N / (entropy_temperature or temperature)
    off_N = (ours_x.grad - exact[0]).norm(dim=1)
    assert (off_N <= term_N * rows.norm(dim=1).max()).all()
    assert ((codebook.rows.grad - exact[1]).norm(dim=1) <= (term_N * x.norm(dim=1)).sum()).all()
    assert off_N.max() > 1e-12, "nothing was left out"
