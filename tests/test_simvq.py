"""SimVQ against a published implementation, against the mapped codebook written out, and whole against split."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from vector_quantize_pytorch import SimVQ as PublishedSimVQ
from whole import GRIDS, integers, mine, normal, put

from vqscale import quantizers
from vqscale.codes.rows import Rows, draw
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.simvq import LONGEST, _back_through

K, DIM, TOKENS = 37, 6, 48


def _simvq(mesh=None, **keys):
    quantizer = quantizers.build({"name": "simvq", "num_codes": K, "dim": DIM, **keys}, mesh).double()
    put(quantizer.codebook, normal(K, DIM, seed=1) * DIM**-0.5)
    quantizer.map.weight.data = normal(DIM, DIM, seed=2)
    if quantizer.map.bias is not None:
        quantizer.map.bias.data = normal(DIM, seed=3)
    return quantizer


@pytest.mark.parametrize("rotation", [False, True])
def test_it_is_the_one_of_vector_quantize_pytorch(rotation):
    published = PublishedSimVQ(DIM, K, rotation_trick=rotation).double()
    ours = _simvq(bias=False, gradient="rotation" if rotation else "straight_through")
    published.frozen_codebook.copy_(ours.codebook.rows)
    published.code_transform.weight.data.copy_(ours.map.weight)
    x, y = (normal(TOKENS, DIM, seed=4).requires_grad_() for _ in range(2))
    upstream = normal(TOKENS, DIM, seed=5)
    answer = ours(x)
    loss = sum(answer.losses.values())
    z, ids, their_loss = published(y[None])
    assert torch.equal(answer.ids, ids[0])
    assert torch.allclose(answer.z, z[0], rtol=0, atol=1e-12)
    assert torch.allclose(loss, their_loss, rtol=1e-12)
    (loss + (answer.z * upstream).sum()).backward()
    (their_loss + (z[0] * upstream).sum()).backward()
    if not rotation:
        assert torch.allclose(ours.map.weight.grad, published.code_transform.weight.grad, rtol=0, atol=1e-12)
    assert torch.allclose(x.grad, y.grad, rtol=0, atol=1e-6 if rotation else 1e-12)  # theirs has an eps of 1e-6


def _step(data, codes, bias, learn_basis):
    mesh = Mesh(data, codes)
    quantizer = _simvq(mesh, bias=bias, learn_basis=learn_basis)
    x = mine(normal(TOKENS, DIM, seed=4), mesh).requires_grad_()
    answer = quantizer(x)
    (sum(answer.losses.values()) + (answer.z * mine(normal(TOKENS, DIM, seed=5), mesh)).sum()).backward()
    grads = [p.grad for p in quantizer.map.parameters()]
    if learn_basis:
        grads.append(
            F.pad(
                quantizer.codebook.rows.grad,
                (0, 0, quantizer.codebook.layout.start, K - quantizer.codebook.layout.stop),
            )
        )
    return answer.z.detach(), answer.ids, float(sum(answer.losses.values())), x.grad, grads, answer.stats["code_norm"]


@pytest.mark.parametrize(("bias", "learn_basis"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("grid", GRIDS)
def test_whole_and_split_are_the_mapped_codebook_written_out(ranks, grid, bias, learn_basis):
    results = ranks(grid[0] * grid[1], _step, *grid, bias, learn_basis)
    world = len(results)
    x, rows = normal(TOKENS, DIM, seed=4).requires_grad_(), (normal(K, DIM, seed=1) * DIM**-0.5).requires_grad_()
    weight = normal(DIM, DIM, seed=2).requires_grad_()
    shift = (normal(DIM, seed=3) if bias else torch.zeros(DIM, dtype=torch.float64)).requires_grad_()
    codes = rows @ weight.t() + shift
    ids = (x.detach()[:, None] - codes.detach()[None]).square().sum(2).argmin(1)
    z = codes[ids]
    loss = F.mse_loss(z, x.detach()) + 0.25 * F.mse_loss(x, z.detach())
    passed = z.detach() + x - x.detach()
    # every rank's loss is a mean over its own tokens: the world's is their mean, and upstream gradients add up
    (world * loss + (passed * normal(TOKENS, DIM, seed=5)).sum()).backward()
    assert torch.equal(torch.cat([r[1] for r in results]), ids)
    assert torch.allclose(torch.cat([r[0] for r in results]), z.detach(), rtol=0, atol=1e-12)
    assert sum(r[2] for r in results) / world == pytest.approx(float(loss.detach()), rel=1e-12)
    assert torch.allclose(torch.cat([r[3] for r in results]), x.grad, rtol=0, atol=1e-12)
    wanted = [weight.grad, *[shift.grad] * bias, *[rows.grad] * learn_basis]
    for got, want in zip(zip(*[r[4] for r in results], strict=True), wanted, strict=True):
        assert torch.allclose(sum(got), want, rtol=0, atol=1e-11)
    for result in results:
        assert float(result[5]) == pytest.approx(float(codes.detach().norm(dim=1).mean()), rel=1e-12)


def test_with_the_identity_it_is_the_nearest_fixed_row_and_ties_go_to_the_lowest():
    quantizer = _simvq(bias=False)
    quantizer.map.weight.data = torch.eye(DIM, dtype=torch.float64)
    rows = integers(K, DIM, seed=1, dtype=torch.float64)
    rows[20] = rows[3]
    put(quantizer.codebook, rows)
    x = integers(TOKENS, DIM, seed=2, dtype=torch.float64)
    x[0] = rows[3]
    ids = (x[:, None] - rows[None]).square().sum(2).argmin(1)
    assert ids[0] <= 3
    assert torch.equal(quantizer.encode(x), ids)


def test_the_basis_comes_from_the_seed_and_does_not_learn():
    quantizer = quantizers.build({"name": "simvq", "num_codes": 2000, "dim": 4}, seed=5)
    assert torch.equal(quantizer.codebook.rows, draw(Rows(2000), 4, "normal", 4**-0.5, 5))
    assert not quantizer.codebook.rows.requires_grad
    again = quantizers.build({"name": "simvq", "num_codes": 2000, "dim": 4}, seed=5)
    assert torch.equal(quantizer.map.weight, again.map.weight)
    quantizer.begin()
    before = quantizer.codebook.rows.clone()
    quantizer(torch.randn(50, 4))
    assert quantizer.update() == []
    assert torch.equal(quantizer.codebook.rows, before)


def test_a_basis_that_learns_tells_which_rows_begin_anew():
    """Those that a fit or a revival has set: an engine forgets their moments."""
    keys = {"dim": 4, "learn_basis": True, "warmup_steps": 1, "revive_patience": 0.5}
    quantizer = quantizers.build({"name": "simvq", "num_codes": 50, **keys}, seed=5)
    quantizer.begin()
    changes = []
    for seed in range(8):
        before = quantizer.codebook.rows.detach().clone()
        quantizer(torch.randn(64, 4, generator=torch.Generator().manual_seed(seed)) * (1 if seed < 2 else 0.01))
        ((rows, changed),) = quantizer.update()
        assert rows is quantizer.codebook.rows
        assert rows.requires_grad
        moved = (rows.detach() != before).any(1).nonzero().flatten()
        assert torch.equal(changed.sort().values, moved)
        changes.append(len(moved))
    assert max(changes) == 50, "the fit sets every row"
    assert 0 < changes[-1] < 50, "revived are those that no token takes"


def test_revived_rows_are_never_so_long_that_a_step_of_the_map_throws_their_codes():
    """Exact where the map keeps all directions; else the least squares of [W; d 1] c = [x; 0], and at most LONGEST."""
    turn, other = torch.linalg.qr(normal(DIM, DIM, seed=1)).Q, torch.linalg.qr(normal(DIM, DIM, seed=2)).Q
    x = normal(TOKENS, DIM, seed=3)
    sizes = torch.tensor([5, 4, 3, 2, 1, 1], dtype=torch.float64)
    plain = turn @ sizes.diag() @ other
    torch.testing.assert_close(_back_through(plain, x) @ plain.t(), x)
    lost = turn @ torch.tensor([5, 4, 3, 2, 1, 1e-7], dtype=torch.float64).diag() @ other
    gain = lost.norm() / DIM**0.5
    damping = gain / (2 * LONGEST) * torch.eye(DIM, dtype=torch.float64)
    wanted = torch.linalg.lstsq(torch.cat([lost, damping]), F.pad(x, (0, DIM)).t()).solution.t()
    rows = _back_through(lost, x)
    torch.testing.assert_close(rows, wanted)
    assert (rows.norm(dim=1) * gain <= LONGEST * x.norm(dim=1)).all()
    assert (torch.linalg.solve(lost, x.t()).norm(dim=0) * gain > 1e4 * x.norm(dim=1)).all()
    off = (rows @ lost.t() - x) @ turn
    assert off[:, :5].abs().max() < 0.05 * x.abs().max()  # all that is left of x lies where the map loses it
    assert torch.equal(_back_through(0 * plain, x), x)
