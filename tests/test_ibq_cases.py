"""IBQ on cases small enough to be known to the last digit, its limits, and the published form of codes/dense.py."""

from __future__ import annotations

import math

import pytest
import torch
from whole import CODES, close, integers, mine, normal, put

from vqscale import quantizers
from vqscale.codes import dense
from vqscale.parallel.mesh import Mesh

TOKENS = 24


def ibq(rows, mesh=None, **settings):
    quantizer = quantizers.build(
        {"name": "ibq", "num_codes": len(rows), "dim": rows.shape[1], "init": "normal", **settings}, mesh
    )
    put(quantizer.codebook, rows)
    return quantizer


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


# d = 1, C = (1, -0.5), z = 0.3, g = 1
ROWS, TOKEN = double([1.0], [-0.5]), double([0.3])
P = 0.610639233949222
THROUGH = (0.5349576598000411, [1.106991531960008, -0.106991531960008])
QUANTIZATION = (1.1025, -2.0510592762799424, [1.8997881447440115, -0.1497881447440115])
ENTROPY = 0.668461290720305


def _known(codes):
    mesh = Mesh(1, codes)
    out = []
    # every rank has the same token: the mean over ranks is that of one token
    for loss in ("through", "quantization", "entropy"):
        quantizer = ibq(ROWS, mesh, entropy_weight=1.0, entropy_temperature=1.0)
        x = TOKEN.clone().requires_grad_()
        answer = quantizer(x)
        entropy = answer.losses.pop("entropy")
        value = {"through": answer.z.sum(), "quantization": sum(answer.losses.values()), "entropy": entropy}[loss]
        value.backward()
        out.append((float(value.detach()), x.grad, quantizer.codebook.rows.grad / codes))
    stats = {key: float(value) for key, value in answer.stats.items()}
    return out, stats


@pytest.mark.parametrize("codes", CODES)
def test_two_codes_on_a_line(ranks, codes):
    results = ranks(codes, _known, codes)
    for which, (value, dz, dc) in enumerate([(1.0, *THROUGH), QUANTIZATION]):
        for result, _ in results:
            assert result[which][0] == pytest.approx(value, abs=1e-12)
            close(result[which][1] / codes, double([dz]) / codes, 1e-12)
        close(torch.cat([result[which][2] for result, _ in results]), double(*dc)[:, None], 1e-12)
    for result, stats in results:
        # one token: its entropy is that of the mean, and without an epsilon the loss is zero to the last digit
        assert result[2][0] == pytest.approx(0.0, abs=1e-15)
        close(result[2][1], double([0.0]), 1e-15)
        assert stats["entropy_token"] == pytest.approx(ENTROPY, abs=1e-12)
        assert stats["entropy_mean"] == pytest.approx(ENTROPY, abs=1e-12)
        assert stats["saturation"] == pytest.approx(P, abs=1e-12)


def test_the_published_form_has_its_published_numbers():
    rows, x = ROWS.clone().requires_grad_(), TOKEN.clone().requires_grad_()
    published = dense.published_ibq(x, rows, beta=0.25, entropy_temperature=1.0)
    assert published.ids_N.tolist() == [0]
    assert published.z_ND.tolist() == [[1.0]]
    dx, dc = torch.autograd.grad(published.z_ND.sum(), (x, rows), retain_graph=True)
    close(dx, double([THROUGH[0]]), 1e-14)
    close(dc, double(*THROUGH[1])[:, None], 1e-14)
    assert float(published.quantization.detach()) == pytest.approx(QUANTIZATION[0], abs=1e-14)
    dx, dc = torch.autograd.grad(published.quantization, (x, rows), retain_graph=True)
    close(dx, double([QUANTIZATION[1]]), 1e-14)
    close(dc, double(*QUANTIZATION[2])[:, None], 1e-14)
    assert float(published.entropy.detach()) == pytest.approx(1.99998e-5, rel=1e-4)
    assert ENTROPY - float(published.entropy.detach()) == pytest.approx(0.6684412909305989, abs=1e-12)
    assert dense.published_ibq(x, rows).entropy is None


def test_two_codes_in_general():
    z, g, c = normal(1, 3, seed=1), normal(1, 3, seed=2), normal(2, 3, seed=3)
    p = torch.softmax(z @ c.t(), 1)[0, 0]
    v, difference = p * (1 - p), c[0] - c[1]
    along = difference @ g[0]
    quantizer, x = ibq(c), z.clone().requires_grad_()
    answer = quantizer(x)
    (answer.z * g).sum().backward()
    close(x.grad[0], v * difference * along)
    expected = torch.stack([v * along * z[0], -v * along * z[0]])
    expected[int(answer.ids)] += g[0]
    close(quantizer.codebook.rows.grad, expected)


def _equal_codes(codes):
    mesh = Mesh(1, codes)
    quantizer = ibq(normal(1, 3, seed=1).expand(6, 3).clone(), mesh)
    x, g = mine(normal(TOKENS, 3, seed=2), mesh).requires_grad_(), mine(normal(TOKENS, 3, seed=3), mesh)
    answer = quantizer(x)
    (answer.z * g).sum().backward()
    return answer.ids, x.grad, quantizer.codebook.rows.grad


@pytest.mark.parametrize("codes", CODES)
def test_equal_codes_are_the_first_of_them_and_send_nothing_back(ranks, codes):
    results = ranks(codes, _equal_codes, codes)
    assert not any(result[0].any() for result in results)
    for result in results:
        close(result[1], torch.zeros_like(result[1]), 1e-14)
    rows = torch.cat([result[2] for result in results])
    expected = torch.zeros(6, 3, dtype=torch.float64)
    expected[0] = normal(TOKENS, 3, seed=3).sum(0)
    close(rows, expected)


def test_the_largest_product_wins_and_not_the_nearest():
    rows, x = double([1.0, 0.0], [3.0, 0.1]), double([1.0, 0.0])[None]
    assert ibq(rows)(x[0]).ids.tolist() == [1]
    assert ibq(rows, similarity="euclid")(x[0]).ids.tolist() == [0]


def test_saturated_probabilities_leave_the_hard_path_alone():
    rows, x = normal(13, 4, seed=1), (1e5 * normal(TOKENS, 4, seed=2)).requires_grad_()
    g = normal(TOKENS, 4, seed=3)
    quantizer = ibq(rows)
    answer = quantizer(x)
    assert float(answer.stats["saturation"]) == pytest.approx(1.0)
    (answer.z * g).sum().backward()
    close(x.grad, torch.zeros_like(g))
    close(quantizer.codebook.rows.grad, dense.sums(answer.ids, g, 13))


def test_z_is_the_row_to_the_bit_in_float32():
    for scale in (1e-3, 1.0, 1e3):
        rows = scale * normal(300, 8, seed=1).float()
        answer = ibq(rows)(normal(500, 8, seed=2).float())
        assert torch.equal(answer.z, rows[answer.ids])


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_entropies_keep_their_bounds(scale):
    rows, x = normal(50, 4, seed=1), scale * normal(TOKENS, 4, seed=2)
    stats = ibq(rows, entropy_weight=1.0, entropy_temperature=0.05)(x).stats
    token, mean = float(stats["entropy_token"]), float(stats["entropy_mean"])
    assert 0 <= token <= mean <= math.log(50)
    if scale == 10.0:  # almost one-hot: no more codes than tokens
        assert token < 0.1
        assert mean <= math.log(TOKENS)


def test_no_entropy_loss_without_its_weight():
    answer = ibq(normal(5, 2, seed=1))(normal(8, 2, seed=2))
    assert set(answer.losses) == {"quantization", "commitment", "codebook"}
    assert "entropy_mean" not in answer.stats


def test_the_dense_definition_breaks_ties_low_and_knows_its_similarities():
    rows, x = integers(60, 3, seed=1, most=1), integers(30, 3, seed=2)
    for similarity, score in (
        ("dot", x @ rows.t()),
        ("euclid", -0.5 * (x[:, None] - rows).square().sum(2)),
        ("cosine", torch.cosine_similarity(x[:, None], rows[None], dim=2)),
    ):
        ids, best = dense.nearest(x, rows, similarity)
        if similarity != "cosine":
            lowest = torch.tensor([int(torch.nonzero(line == line.max())[0]) for line in score])
            assert torch.equal(ids, lowest)
        offset = 0.5 * x.square().sum(1) if similarity == "euclid" else 0.0
        close(best - offset, score.amax(1), 1e-5)


@pytest.mark.parametrize("K", [1024, 8192, 16384])
def test_the_published_epsilon_is_what_the_loss_here_leaves_out(K):
    """At a uniform mean the released code reports -log(1/K + 1e-5) (6.92, 8.93, 9.55), not log K."""
    rows, x = torch.zeros(K, 2, dtype=torch.float64), normal(4, 2, seed=1)
    published = dense.published_ibq(x, rows, entropy_temperature=0.01)
    assert math.log(K) - float(published.entropy.detach()) == pytest.approx(-math.log(1 / K + 1e-5), abs=1e-9)
    answer = ibq(rows, entropy_weight=1.0)(x)
    assert float(answer.stats["entropy_mean"]) == pytest.approx(math.log(K), abs=1e-9)
    assert float(answer.losses["entropy"].detach()) == pytest.approx(0.0, abs=1e-9)
