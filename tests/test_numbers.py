"""Every quantizer under low precision, and given tokens that are not numbers."""

from __future__ import annotations

import math

import pytest
import torch
from quantizer_cases import CASES, DIM, TOKENS, WITH_TABLE, built
from whole import CODES, mine, normal

from vqscale.parallel.mesh import Mesh


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_and_autocast_do_not_lower_the_precision(case, kind):
    answers = []
    for lower in (True, False):
        quantizer = built(case)
        x = normal(TOKENS, DIM, seed=1).to(kind)
        x = (x if lower else x.float()).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            out = quantizer(x)
            values = [out.z, out.ids, quantizer.encode(x), quantizer.decode(out.ids), *out.losses.values()]
        (sum(out.losses.values()) + out.z.square().mean()).backward()
        rows = [p.grad for p in quantizer.parameters() if p.requires_grad]
        answers.append([v.detach() for v in [*values, *out.stats.values(), *rows, x.grad.to(kind)]])
    for got, expected in zip(*answers, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def _not_a_number(codes, case, bad):
    mesh = Mesh(1, codes)
    quantizer = built(case, mesh, num_codes=3, revive_every=1, revive_after=0)
    quantizer.begin()
    x = mine(normal(TOKENS, DIM, seed=1).float(), mesh)
    if mesh.world.rank == codes - 1:
        x[2, 1] = bad
    x.requires_grad_()
    out = quantizer(x)
    loss = sum(out.losses.values())
    loss.backward()
    quantizer.update(stepped=False)
    again = quantizer(mine(normal(TOKENS, DIM, seed=1).float(), mesh))
    quantizer.update()
    return float(loss), out.ids, float(sum(again.losses.values())), quantizer.codebook.rows.detach()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("case", WITH_TABLE)
@pytest.mark.parametrize("codes", CODES)
def test_a_token_that_is_not_a_number_is_seen_in_the_loss_and_nowhere_after(ranks, codes, case, bad):
    # 3 codes: on 4 ranks one has no rows
    results = ranks(codes, _not_a_number, codes, case, bad)
    assert not math.isfinite(results[-1][0])
    if math.isnan(bad):
        assert math.isnan(results[-1][0])
    for _, ids, after, rows in results:
        assert 0 <= int(ids.min()) <= int(ids.max()) < 3
        assert math.isfinite(after)
        assert torch.isfinite(rows).all()
