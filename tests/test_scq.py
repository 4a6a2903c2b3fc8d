"""SCQ: convex combinations of codes against the formulas written out, values and gradients, whole and split."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from whole import CODES, GRIDS, close, engine_gradient, mine, normal, put

from vqscale import quantizers
from vqscale.codes.codebook import Codebook
from vqscale.codes.convex import dense, exact, relaxed
from vqscale.config import ConfigError
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import Quantizer
from vqscale.quantizers.scq import SCQ, WEIGHT_BITS

SOLVERS = ["exact", "relaxed"]
LAMBDAS = [0.01, 0.1, 1.0, 10.0]
TOKENS, DIM = 16, 4


def built(rows, mesh=None, **settings):
    config = {"name": "scq", "num_codes": len(rows), "dim": rows.shape[1], "init": "normal", **settings}
    quantizer = quantizers.build(config, mesh)
    put(quantizer.codebook, rows)
    return quantizer


def weights(quantizer, x):
    """The whole P of one process, tokens x codes."""
    z, entries, *_ = _combined(quantizer, x)
    p = torch.zeros(len(x), quantizer.num_codes, dtype=torch.float64)
    p[entries.token_E, entries.row_E] = entries.weight_E
    close(
        z.detach().double(), p @ quantizer.codebook.rows.detach().double(), 1e-5 if x.dtype == torch.float32 else 1e-12
    )
    return p


def _combined(quantizer, x):
    solve = relaxed.combine if quantizer.config.solver == "relaxed" else exact.combine
    return solve(x, quantizer.codebook, quantizer.config.lam)


LINE = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
PLANE = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("solver", "lam", "second"),
    [
        *[("exact", lam, 0.3 / (1 + 2 * lam)) for lam in (0.1, 1.0, 10.0)],
        ("exact", 0.1, 0.25),
        ("exact", 1.0, 0.1),
        ("exact", 10.0, 0.0142857),
        ("relaxed", 0.1, 0.13636),
        ("relaxed", 1.0, 0.075),
        ("relaxed", 10.0, 0.0136364),
    ],
)
def test_two_codes_on_a_line(solver, lam, second, dtype):
    quantizer = built(LINE.to(dtype), solver=solver, lam=lam)
    p = weights(quantizer, torch.tensor([[0.3]], dtype=dtype))
    close(p, torch.tensor([[1 - second, second]], dtype=torch.float64), 5e-6 if solver == "relaxed" else 1e-6)


def test_the_relaxed_system_before_projection_does_not_sum_to_one():
    # C.2's toy: raw (1, 0.27273), so the projection is needed; the K x K solve says it, and ours projects the same
    matrix = LINE @ LINE.t() + 0.1 * torch.eye(2, dtype=torch.float64)
    right = torch.tensor([0.1, 0.3], dtype=torch.float64)
    raw = torch.linalg.solve(matrix, right)
    close(raw, torch.tensor([1.0, 0.272727], dtype=torch.float64), 1e-6)
    p = weights(built(LINE, solver="relaxed", lam=0.1), torch.tensor([[0.3]], dtype=torch.float64))
    close(p[0], dense.project(raw[None])[0], 1e-12)


@pytest.mark.parametrize(
    ("solver", "lam", "expected"),
    [
        ("exact", 1e-9, (0.5, 0.2, 0.3)),
        ("exact", 0.1, (0.61538, 0.14685, 0.23776)),
        ("exact", 1.0, (0.875, 0.0375, 0.0875)),
        ("relaxed", 1e-9, (0.83333, 0.03333, 0.13333)),
        ("relaxed", 1.0, (0.91667, 0.01667, 0.06667)),
    ],
)
def test_three_codes_in_the_plane(solver, lam, expected):
    p = weights(built(PLANE, solver=solver, lam=lam), torch.tensor([[0.2, 0.3]], dtype=torch.float64))
    close(p[0], torch.tensor(expected, dtype=torch.float64), 6e-6)


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_p_is_the_dense_one(lam, scale):
    rows, x = normal(40, 5, seed=1), scale * normal(TOKENS, 5, seed=2)
    exact = weights(built(rows, lam=lam), x)
    loose = weights(built(rows, lam=lam, solver="relaxed"), x)
    close(exact, dense.exact(x, rows, lam), 1e-7)  # projected gradients end about there
    close(loose, dense.relaxed(x, rows, lam), 1e-11)
    for p in (exact, loose):
        assert (p >= 0).all()
        close(p.sum(1), torch.ones(TOKENS, dtype=torch.float64), 1e-12)
    hard = dense.nearest(x, rows)
    values = [dense.objective(p, x, rows, lam) for p in (exact, loose, hard)]
    assert (values[0] <= values[1] + 1e-12).all()
    assert (values[0] <= values[2] + 1e-12).all()
    # Not a theorem: it holds for each of these tokens near the codes, and on average for those far outside.
    if scale <= 1:
        assert (values[1] <= values[2] + 1e-12).all()
    assert float(values[1].mean()) < float(values[2].mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lam", [1e-3, 0.1, 10.0])
def test_the_residual_is_below_the_tolerance_and_is_what_it_says(dtype, lam):
    rows = normal(2000, 16, seed=1).to(dtype)
    x = torch.cat([scale * normal(8, 16, seed=2).to(dtype) for scale in (0.5, 1.0, 3.0)])
    quantizer = built(rows, lam=lam)
    p = weights(quantizer, x)
    rows, x = rows.double(), x.double()
    size = rows.norm(dim=1).max() * (x - p @ rows).norm(dim=1) + lam
    violation = dense.violation(p, x, rows, lam) / size
    # the tolerance, and as much again: the scores that are compared are rounded to the rows' precision
    assert float(violation.max()) < (2e-6 if dtype == torch.float32 else 2e-12)
    reported = exact.solve(x.to(dtype), quantizer.codebook, lam)
    assert float((reported.residual_N - violation).abs().max()) < exact.TOLERANCE[dtype]
    assert float(quantizer(x.to(dtype)).stats["residual"]) == float(reported.residual_N.max())
    assert reported.passes < 25


def test_limits_of_lam():
    rows, x = normal(40, 5, seed=1), normal(TOKENS, 5, seed=2)
    inside = torch.softmax(normal(TOKENS, 40, seed=3), 1) @ rows
    hard = dense.nearest(x, rows) @ rows
    for solver in SOLVERS:
        close(built(rows, lam=1e6, solver=solver)(x).z.detach(), hard, 2e-5)
    # small: the nearest point of the hull, which is the token itself if it lies inside, and otherwise no code is
    # further in the direction of the token than z is
    close(built(rows, lam=1e-8)(inside).z.detach(), inside, 1e-6)
    z = built(rows, lam=1e-8)(3 * x).z.detach()
    assert float((((3 * x - z) @ rows.t()).amax(1) - ((3 * x - z) * z).sum(1)).max()) < 1e-6
    # the relaxation is not consistent: it stays away from a token that lies inside
    assert float((built(rows, lam=1e-8, solver="relaxed")(inside).z.detach() - inside).norm(dim=1).mean()) > 0.1


@pytest.mark.parametrize("solver", SOLVERS)
def test_permuting_the_codes_permutes_p(solver):
    rows, x = normal(40, 5, seed=1), normal(TOKENS, 5, seed=2)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    close(weights(built(rows[order], solver=solver), x), weights(built(rows, solver=solver), x)[:, order], 1e-11)


def test_ties_go_to_the_lowest_id():
    # the token is as near to code 1 as to code 2: the one-hot is at 1, which therefore has the larger weight
    rows = torch.tensor([[5.0, 5.0], [1.0, 0.0], [-1.0, 0.0]])
    for solver in SOLVERS:
        assert built(rows, solver=solver)(torch.zeros(1, 2)).ids.tolist() == [1]
    # nine rows, each seven times: equal rows have equal weights up to rounding, unless one of them is the nearest code
    rows, x = normal(9, 3, seed=1).repeat(7, 1), 0.5 * normal(200, 3, seed=2)
    quantizer = built(rows, lam=1e-3)
    out, p = quantizer(x), weights(quantizer, x).view(-1, 7, 9)
    shared = p[torch.arange(200), :, out.ids % 9].amin(1) > p.amax((1, 2)) - 1e-9
    assert int(shared.sum()) > 50
    assert int(out.ids[shared].max()) < 9


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("lam", [0.1, 1.0])
def test_gradients_are_those_of_the_dense_form(solver, lam):
    rows, x, weight = normal(40, 5, seed=1), normal(TOKENS, 5, seed=2), normal(TOKENS, 5, seed=3)
    quantizer = built(rows, lam=lam, solver=solver)
    token = x.clone().requires_grad_()
    out = quantizer(token)
    ((out.z * weight).sum() + sum(out.losses.values())).backward()
    whole, other = rows.clone().requires_grad_(), x.clone().requires_grad_()
    if solver == "relaxed":
        p = dense.relaxed(other, whole, lam)
    else:
        p = dense.on_support(dense.exact(x, rows, lam) > 1e-7, other, whole, lam)
    z = p @ whole
    close(out.z.detach(), z.detach(), 1e-11)
    ((z * weight).sum() + F.mse_loss(z, other)).backward()
    close(token.grad, other.grad, 1e-9)
    close(quantizer.codebook.rows.grad, whole.grad, 1e-9)
    assert float(whole.grad.abs().max()) > 0.1


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_are_finite_differences_away_from_changes_of_the_support(solver):
    rows, x = normal(12, 3, seed=1), normal(6, 3, seed=5)
    quantizer = built(rows, lam=0.3, solver=solver)
    codebook = quantizer.codebook

    def output(token, table):
        codebook.__dict__["rows"] = table
        return _combined(quantizer, token)[0]

    del codebook._parameters["rows"]
    assert torch.autograd.gradcheck(output, (x.requires_grad_(), rows.clone().requires_grad_()), rtol=1e-6)


def _split(data, codes, num_codes, solver, dtype, budget):
    mesh = Mesh(data, codes)
    quantizer = built(2 * normal(num_codes, DIM, seed=1).to(dtype), mesh, solver=solver)
    quantizer.codebook.budget = budget
    x = mine(normal(TOKENS, DIM, seed=2).to(dtype), mesh).requires_grad_()
    out = quantizer(x)
    loss = (out.z * mine(normal(TOKENS, DIM, seed=3).to(dtype), mesh)).sum(1).mean() + sum(out.losses.values())
    loss.backward()
    stats = {key: float(value) for key, value in out.stats.items() if key != "residual"}
    return out.z.detach(), out.ids, x.grad, quantizer.codebook.rows.grad, stats


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_split_rows_give_what_one_process_gives(ranks, grid, solver):
    world = grid[0] * grid[1]
    # fewer codes than ranks, not divisible, many; blocks of 64 rows and programs one by one
    for num_codes, budget, dtype in [(3, 1, torch.float64), (517, 1, torch.float64), (1037, 2**26, torch.float32)]:
        got = ranks(world, _split, *grid, num_codes, solver, dtype, budget)
        z, ids, grad_x, grad_rows, stats = _split(1, 1, num_codes, solver, dtype, 2**26)
        tolerance = 1e-10 if dtype == torch.float64 else 2e-5
        close(torch.cat([part[0] for part in got]), z, tolerance)
        assert torch.equal(torch.cat([part[1] for part in got]), ids)
        close(torch.cat([part[2] for part in got]) / world, grad_x, tolerance)
        close(engine_gradient([part[3] for part in got], grid[1]), grad_rows, tolerance)
        for key, value in stats.items():
            assert sum(part[4][key] for part in got) / world == pytest.approx(value, rel=1e-6)


def _sent(codes, solver):
    """Bytes of a forward and a backward pass; most codes of the larger tables are of no use to these tokens."""
    mesh, out = Mesh(1, codes), {}
    rows = normal(2**14, 8, seed=1).float().abs()
    rows[64:] *= -1
    for num_codes in (2**8, 2**11, 2**14):
        quantizer = built(rows[:num_codes], mesh, solver=solver)
        quantizer.eval()
        x = (2 + normal(TOKENS, 8, seed=2 + mesh.world.rank).float().abs()).requires_grad_()
        with ops.count_bytes() as sent:
            answer = quantizer(x)
            (sum(answer.losses.values()) + answer.z.sum()).backward()
        out[num_codes] = (sent["codes"], float(answer.stats["support"]))
    return out


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("codes", [2, 4])
def test_the_bytes_of_a_step_do_not_know_K(ranks, codes):
    for sent in ranks(codes, _sent, codes, "exact"):
        assert len(set(sent.values())) == 1, sent
        assert next(iter(sent.values()))[1] > 2
    # G knows all codes, so other codes are another solution: a bound, of vectors and 40 numbers per token, and D x D
    for sent in ranks(codes, _sent, codes, "relaxed"):
        for number, _ in sent.values():
            assert number < (codes - 1) * (TOKENS * (8 * 8 * 8 + 120 * 8) + 2 * 8 * 8 * 8)


def test_stats_say_what_their_names_say():
    rows, x = normal(40, 5, seed=1), normal(TOKENS, 5, seed=2)
    for solver in SOLVERS:
        quantizer = built(rows, solver=solver)
        out = quantizer(x)
        p = weights(quantizer, x)
        assert torch.equal(out.ids, p.argmax(1))
        size = (p > 0).sum(1).double()
        assert float(out.stats["support"]) == pytest.approx(float(size.mean()))
        assert float(out.stats["saturation"]) == pytest.approx(float(p.amax(1).mean()))
        stored = (p >= 0.5**WEIGHT_BITS / 2).sum(1).double()
        bits = stored * math.log2(40) + (stored - 1) * WEIGHT_BITS
        assert float(out.stats["bits"]) == pytest.approx(float(bits.mean()))
        mean = p.mean(0)
        perplexity = float(torch.exp(-torch.xlogy(mean, mean).sum()))
        assert float(out.stats["perplexity_soft"]) == pytest.approx(perplexity)
        assert 1 <= perplexity <= 40
    # where one code is enough, it costs what an id costs
    assert float(built(rows, lam=1e9)(x).stats["bits"]) == pytest.approx(math.log2(40))


def test_the_loss_reaches_the_encoder_and_the_rows_with_its_weight():
    rows, x = normal(40, 5, seed=1), 2 * normal(TOKENS, 5, seed=2)
    out = built(rows, quantization_weight=3.0)(x)
    assert set(out.losses) == {"quantization"}
    close(out.losses["quantization"].detach(), 3 * (x - out.z.detach()).square().mean())
    # a support of one code: P does not move, the decoder's gradient ends at the row
    token = torch.tensor([[3.0, 0.0]], requires_grad=True)
    alone = built(torch.tensor([[1.0, 0.0], [-1.0, 0.5]]))
    assert float(alone(token).stats["support"]) == 1
    alone(token).z.sum().backward()
    assert token.grad.abs().max() == 0
    assert alone.codebook.rows.grad.tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_z_is_no_code_and_ids_are_rows():
    rows, x = normal(40, 5, seed=1), normal(TOKENS, 5, seed=2)
    quantizer = built(rows)
    out = quantizer(x)
    assert not quantizer.exact_decode
    assert torch.equal(quantizer.decode(out.ids), rows[out.ids])
    assert float((out.z.detach() - x).norm()) < float((quantizer.decode(out.ids) - x).norm())
    assert Quantizer.exact_decode
    assert SCQ.exact_decode is False


def test_many_equal_rows_end_with_a_residual_that_says_so():
    # the weight of the far cluster wants to be shared by all its rows: too many to hold
    rows = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64).repeat(1024, 1)
    x = torch.tensor([[0.4, 0.4]], dtype=torch.float64).expand(4, 2).clone().requires_grad_()
    quantizer = built(rows)
    out = quantizer(x)
    most = exact.MOST + exact.MOST_PER_DIM * 2
    assert most <= float(out.stats["support"]) < most + 20
    assert 1e-6 < float(out.stats["residual"]) < 1e-2
    p = weights(quantizer, x)
    # with weight w over n copies: 2 (x - w)^2 + lam ((1 - p_0)^2 + ...); against one copy of each in closed form
    value = dense.objective(p, x.detach(), rows, 0.1)
    w = torch.linspace(0, 1, 100001, dtype=torch.float64)
    best = (2 * (0.4 - w).square() + 0.1 * (w.square() + w.square() / 1024)).min()
    assert float((value - best).max()) < 0.1 / exact.MOST
    out.z.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="lam is 0"):
        quantizers.build({"name": "scq", "lam": 0})
    with pytest.raises(ConfigError, match="solver"):
        quantizers.build({"name": "scq", "solver": "cvx"})
    with pytest.raises(ConfigError, match="scq"):
        quantizers.build({"name": "residual", "inner": {"name": "scq"}})


def _status(key):
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def _large(codes, solver):
    """(MiB that a step takes above what was there before, the residual, the largest gradient of the rows)."""
    mesh = Mesh(1, codes)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    config = {"name": "scq", "num_codes": 2**16, "dim": 16, "init": "normal", "solver": solver, "scan_mib": 8}
    quantizer = quantizers.build(config, mesh)
    x = mine(normal(256, 16, seed=1).float(), mesh).requires_grad_()
    out = quantizer(x)
    (sum(out.losses.values()) + out.z.square().mean()).backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(quantizer.codebook.rows.grad).all()
    return _status("VmHWM") - before, out.z.detach(), {key: float(value) for key, value in out.stats.items()}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("codes", CODES[:2])
def test_65536_codes_in_little_memory(ranks, codes, solver):
    """One tensor of these tokens x codes would be 64 MiB; a rank has blocks of 8 MiB and a table of 4 MiB at most."""
    results = ranks(codes, _large, codes, solver)
    for more, _, stats in results:
        assert more < 90
        assert 5 < stats["support"] < 40
        assert stats.get("residual", 0.0) < exact.TOLERANCE[torch.float32]
    z = torch.cat([part for _, part, _ in results])
    assert z.shape == (256, 16)


def test_the_example_of_three_codes():
    """The numbers at the top of exact.py."""
    codebook = put(Codebook(3, 1, similarity="euclid"), torch.tensor([[0.0], [1.0], [3.0]]).double())
    z, entries, solution = exact.combine(torch.tensor([[1.9]]).double(), codebook, 0.1)
    assert solution.support.ids_Ns.tolist() == [[1, 2]]
    assert solution.support.weight_Ns[0].tolist() == pytest.approx([1.2 / 2.1, 0.9 / 2.1])
    assert len(entries) == 2
    assert float(z.detach()) == pytest.approx(1.857, abs=1e-3)
