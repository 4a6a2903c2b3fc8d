"""Residual and grouped quantizers against loops written out, and the gradient estimators against their formulas."""

from __future__ import annotations

import pytest
import torch
from whole import normal

from vqscale import quantizers
from vqscale.quantizers.gradients import rotation, straight_through

DIM, TOKENS = 6, 40
VQ = {"name": "vq", "num_codes": 11, "dim": DIM, "init": "normal"}


def _rows(quantizer):
    return [column.codebook.rows.detach().double() for column in quantizer.quantizers()]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_residual_takes_away_what_each_level_found(scale):
    quantizer = quantizers.build({"name": "residual", "inner": VQ, "levels": 3, "scale": scale}).double()
    x = normal(TOKENS, DIM, seed=1).requires_grad_()
    answer = quantizer(x)
    rest, z, losses = x.detach(), torch.zeros(TOKENS, DIM, dtype=torch.float64), 0.0
    for level, rows in enumerate(_rows(quantizer)):
        seen = rest / scale**level
        ids = torch.cdist(seen, rows).argmin(1)
        assert torch.equal(answer.ids[:, level], ids)
        losses += 1.25 * float((rows[ids] - seen).square().mean())
        z, rest = z + rows[ids] * scale**level, rest - rows[ids] * scale**level
    assert answer.ids.shape == (TOKENS, 3)
    assert torch.allclose(answer.z, z, rtol=0, atol=1e-12)
    assert float(sum(answer.losses.values()).detach()) == pytest.approx(losses, rel=1e-12)
    assert torch.equal(quantizer.encode(x), answer.ids)
    assert torch.equal(quantizer.decode(answer.ids), quantizer.eval()(x).z)
    assert len({rows.sum().item() for rows in _rows(quantizer)}) == 3, "levels have rows of their own"


def test_grouped_cuts_the_token_and_joins_the_answers():
    quantizer = quantizers.build({"name": "grouped", "inner": VQ | {"dim": 3}, "groups": 2}).double()
    assert (quantizer.dim, quantizer.num_ids, quantizer.num_codes) == (6, 2, 11)
    x = normal(TOKENS, DIM, seed=1).requires_grad_()
    upstream = normal(TOKENS, DIM, seed=2)
    answer = quantizer(x)
    first, second = _rows(quantizer)
    ids = torch.stack(
        [torch.cdist(x.detach()[:, :3], first).argmin(1), torch.cdist(x.detach()[:, 3:], second).argmin(1)]
    )
    assert torch.equal(answer.ids, ids.t())
    assert torch.equal(answer.z.detach(), torch.cat([first[ids[0]], second[ids[1]]], dim=1))
    (answer.z * upstream).sum().backward()
    assert torch.allclose(x.grad, upstream, rtol=0, atol=1e-12)
    assert torch.equal(quantizer.decode(answer.ids), answer.z.detach())


def test_levels_that_draw_rows_from_data_wait_for_the_one_before():
    inner = VQ | {"init": "data", "warmup_steps": 2, "revive_every": 0}
    quantizer = quantizers.build({"name": "residual", "inner": inner, "levels": 3, "stagger": 2})
    quantizer.begin()
    for step in range(8):
        answer = quantizer(normal(TOKENS, DIM, seed=step).float())
        quantizer.update()
        # until the last level has its rows, it passes on what is left: nothing is lost
        exact = torch.allclose(answer.z, normal(TOKENS, DIM, seed=step).float(), atol=1e-6)
        assert exact == (step < 6), step
    spread = [float(rows.norm(dim=1).mean()) for rows in _rows(quantizer)]
    assert spread[0] > spread[1] > spread[2] > 0.1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "residual", "levels": 0}, "levels is 0"),
        ({"name": "residual", "scale": 0.0}, "scale is 0"),
        ({"name": "grouped", "groups": 0}, "groups is 0"),
        ({"name": "grouped", "inner": {"name": "residual"}}, "residual"),
        ({"name": "residual", "inner": {"name": "vq", "num_code": 3}}, "did you mean"),
    ],
)
def test_what_a_composition_may_not_be(settings, words):
    with pytest.raises(ValueError, match=words):
        quantizers.build(settings)


def test_straight_through_is_the_code_forward_and_the_identity_backward():
    x, c, upstream = normal(5, 3, seed=1).requires_grad_(), normal(5, 3, seed=2), normal(5, 3, seed=3)
    z = straight_through(x, c)
    (z * upstream).sum().backward()
    assert torch.equal(z.detach(), c)
    assert torch.equal(x.grad, upstream)


def test_rotation_is_the_code_forward_and_the_scaled_rotation_backward():
    x, c, upstream = normal(5, 3, seed=1).requires_grad_(), normal(5, 3, seed=2), normal(5, 3, seed=3)
    z = rotation(x, c)
    (z * upstream).sum().backward()
    assert torch.equal(z.detach(), c)
    for row in range(5):
        e, q = (v / v.norm() for v in (x.detach()[row], c[row]))
        half = (e + q) / (e + q).norm()
        turn = torch.eye(3, dtype=torch.float64) - 2 * torch.outer(half, half) + 2 * torch.outer(q, e)
        assert torch.allclose(turn @ e, q, atol=1e-12)
        want = c[row].norm() / x.detach()[row].norm() * turn.t() @ upstream[row]
        assert torch.allclose(x.grad[row], want, rtol=0, atol=1e-12)


def test_rotation_of_opposite_directions_is_the_identity_backward():
    x = torch.tensor([[1.0, 2.0, -1.0]], requires_grad=True)
    rotation(x, -2 * x.detach()).sum().backward()
    assert torch.equal(x.grad, torch.ones(1, 3))
