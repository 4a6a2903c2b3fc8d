"""What every quantizer promises, over QUANTIZERS: one answer for all, the same on every grid of ranks.

What one quantizer alone promises (its formulas) is in the test of its name.
"""

from __future__ import annotations

import pytest
import torch
from quantizer_cases import CASES, DIM, FROM_DATA, SINGLE, TOKENS, WITH_TABLE, K, built, settings
from whole import GRIDS, close, engine_gradient, mine, normal, table

from vqscale.codes.rows import set_aside
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import Quantized

NUM_CODES = {"fsq": 5 * 4 * 3 * 3, "fsq symmetric": 2 * 4 * 3 * 8, "lfq": 2**DIM, "lfq groups": 2**DIM, "bsq": 2**DIM}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_one_answer_for_all(case, training):
    quantizer = built(case).train(training)
    assert quantizer.dim == DIM
    assert quantizer.num_codes == NUM_CODES.get(case, K)
    x = normal(TOKENS, DIM, seed=1).float().requires_grad_()
    out = quantizer(x)
    assert isinstance(out, Quantized)
    assert out.z.shape == x.shape
    assert out.z.dtype == torch.float32
    assert out.ids.shape == ((TOKENS,) if quantizer.num_ids == 1 else (TOKENS, quantizer.num_ids))
    assert out.ids.dtype == torch.int64
    assert 0 <= int(out.ids.min()) <= int(out.ids.max()) < quantizer.num_codes
    assert bool(out.losses) == (not case.startswith("fsq"))
    for number in [*out.losses.values(), *out.stats.values()]:
        assert number.shape == ()
        assert torch.isfinite(number)
    assert not any(number.requires_grad for number in out.stats.values())
    (sum(out.losses.values()) + out.z.sum()).backward()
    assert torch.isfinite(x.grad).all()
    assert float(x.grad.abs().sum()) > 0
    for parameter in quantizer.parameters():
        assert not parameter.requires_grad or torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_decode_is_exactly_what_forward_gave_and_encode_finds_its_ids(case, training):
    quantizer = built(case, num_codes=300).train(training)
    x = 2 * normal(500, DIM, seed=1).float()
    out = quantizer(x)
    assert torch.equal(quantizer.decode(out.ids), out.z) == quantizer.exact_decode
    assert torch.equal(quantizer.encode(x), out.ids)
    every = torch.cartesian_prod(*[torch.arange(quantizer.num_codes)] * quantizer.num_ids)
    assert torch.equal(quantizer.decode(every.flip(0)), quantizer.decode(every).flip(0))
    assert len(torch.unique(quantizer.decode(every), dim=0)) == len(every)
    assert not quantizer.decode(every).requires_grad
    assert quantizer.encode(x[:0]).shape == out.ids[:0].shape
    assert quantizer.decode(out.ids[:0]).shape == (0, DIM)


@pytest.mark.parametrize("case", CASES)
def test_what_is_none_of_its_own_a_quantizer_refuses_or_marks(case):
    """Tokens that are not finite have no id, and in a training something shows it; nor are other ids, or widths."""
    quantizer = built(case)
    x = normal(TOKENS, DIM, seed=1).float()
    ids = quantizer.encode(x)
    for value in (torch.nan, torch.inf, -torch.inf):
        bad = x.clone()
        bad[2, 1] = bad[5, 3] = value
        with pytest.raises(FloatingPointError, match=rf"[12] of {TOKENS} latents are not finite, and have no nearest"):
            quantizer.encode(bad)
        out = quantizer.train()(bad)
        assert not all(torch.isfinite(part).all() for part in (out.z, *out.losses.values())) or case.startswith("fsq")
        if value is torch.nan:
            assert not torch.isfinite(out.z).all()
    for number in (-1, quantizer.num_codes, 2**40):
        other = ids.clone()
        other[3] = number
        with pytest.raises(ValueError, match=rf"ids must be in 0 \.\. {quantizer.num_codes - 1}, for there are"):
            quantizer.decode(other)
    with pytest.raises(ValueError, match="ids are float32, and ids are whole numbers"):
        quantizer.decode(ids.float())
    for kind in (torch.int16, torch.uint8):
        assert torch.equal(quantizer.decode((ids % 13).to(kind)), quantizer.decode(ids % 13))
    for wrong in (torch.zeros(6, 1), torch.zeros(6, DIM + 2), torch.zeros(6, DIM, 1)):
        for call in (quantizer, quantizer.encode):
            with pytest.raises(ValueError, match=rf"tokens of this quantizer have shape \(N, {DIM}\), and these"):
                call(wrong)


@pytest.mark.parametrize("case", CASES)
def test_stats_have_the_same_names_everywhere(case):
    names = {"usage", "perplexity", "dead", "code_norm", "latent_norm", "landing", "saturation"}
    more = {"entropy_token", "entropy_mean"} if settings(case).get("entropy_weight") else set()
    if case.startswith("scq"):
        more = {"support", "bits", "perplexity_soft"} | ({"residual"} if case == "scq" else set())
    quantizer = built(case)
    for driven in (False, True):
        for training in (True, False):
            out = quantizer.train(training)(normal(TOKENS, DIM, seed=1).float())
            assert set(out.stats) == names | more, (driven, training)
        quantizer.train()
        quantizer.begin()


@pytest.mark.parametrize("case", SINGLE)
def test_stats_say_what_their_names_say(case):
    quantizer = built(case).eval()
    x = normal(TOKENS, DIM, seed=1).float()
    out = quantizer(x)
    counts = torch.bincount(out.ids, minlength=quantizer.num_codes).double()
    share = counts[counts > 0] / TOKENS
    assert float(out.stats["usage"]) == pytest.approx(len(share) / quantizer.num_codes)
    assert float(out.stats["dead"]) == quantizer.num_codes - len(share)
    assert float(out.stats["perplexity"]) == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-5)
    assert float(out.stats["latent_norm"]) == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-5)
    code_norm = quantizer.decode(torch.arange(quantizer.num_codes)).norm(dim=1).mean()
    assert float(out.stats["code_norm"]) == pytest.approx(float(code_norm), rel=1e-5)
    assert 0 < float(out.stats["saturation"]) <= 1


def _step(data, codes, num_codes, cases):
    """One training step of every case: answers, and gradients of tables and of the rest."""
    mesh = None if data * codes == 1 else Mesh(data, codes)
    out = {}
    for case in cases:
        quantizer = built(case, mesh, num_codes=num_codes).double()
        tables = set_aside(quantizer)
        assert not any(name.endswith(("rows", "_k", "_kD")) for name in quantizer.state_dict())
        x = mine(normal(TOKENS, DIM, seed=1), mesh or Mesh()).requires_grad_()
        answer = quantizer(x)
        (
            sum(answer.losses.values()) + (answer.z * mine(normal(TOKENS, DIM, seed=2), mesh or Mesh())).sum(1).mean()
        ).backward()
        rows = {f"{name}.{key}": p for name, part in tables.items() for key, p in part.named_parameters()}
        out[case] = (
            (answer.z.detach(), answer.ids, quantizer.encode(x), quantizer.decode(answer.ids), x.grad),
            {key: value.detach() for key, value in answer.losses.items()},
            {key: value.detach() for key, value in answer.stats.items()},
            {key: p.grad for key, p in rows.items() if p.requires_grad},
            {key: p.grad for key, p in quantizer.named_parameters() if p.requires_grad},
        )
    return out


@pytest.mark.parametrize(
    ("num_codes", "cases"),
    [pytest.param(3, WITH_TABLE, marks=pytest.mark.slow), (K, CASES), (200, WITH_TABLE)],
    ids=["3", "K", "200"],
)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_fixed_global_batch_gives_the_same_on_every_grid(ranks, grid, num_codes, cases):
    world = grid[0] * grid[1]
    results = ranks(world, _step, *grid, num_codes, cases, timeout_s=240.0)
    for case, (tensors, losses, stats, rows, replicated) in _step(1, 1, num_codes, cases).items():
        got = [result[case] for result in results]
        z, ids, encoded, decoded, grad_x = (torch.cat([part[0][which] for part in got]) for which in range(5))
        assert torch.equal(ids, tensors[1])
        assert torch.equal(encoded, ids)
        close(z, tensors[0])
        assert torch.equal(decoded, z if built(case).exact_decode else tensors[3])
        close(grad_x / world, tensors[4])
        for key, loss in losses.items():
            close(torch.stack([part[1][key] for part in got]).mean(), loss)
        for key, value in stats.items():
            close(torch.stack([part[2][key] for part in got]).mean(), value)
        for key, grad in rows.items():
            close(engine_gradient([part[3][key] for part in got], grid[1]), grad)
        for key, grad in replicated.items():
            close(sum(part[4][key] for part in got) / world, grad)


def _train(data, codes, case, init):
    """Six driven steps of plain gradient descent after the engine's rule; rows, and what `update` returned."""
    mesh = Mesh(data, codes)
    quantizer = built(case, mesh, init=init, warmup_steps=3, revive_every=2, revive_after=1, window_decay=0.5).double()
    quantizer.begin()
    codebook, out = quantizer.codebook, []
    for step in range(6):
        x = mine(normal(TOKENS, DIM, seed=10 + step), mesh).requires_grad_()
        answer = quantizer(x)
        through = answer.z is x or torch.equal(answer.z, x)
        codebook.rows.grad = None
        if answer.losses:
            sum(answer.losses.values()).backward()
        if codebook.rows.grad is not None:
            with torch.no_grad():
                codebook.rows -= ops.sum_over(codebook.rows.grad, mesh.data) / mesh.world.size
        renewed = [
            (parameter is codebook.rows, local + codebook.layout.start) for parameter, local in quantizer.update()
        ]
        usage = {key: float(answer.stats[key]) for key in ("usage", "perplexity", "dead")}
        out.append((codebook.rows.detach().clone(), through, bool(answer.losses), renewed, usage))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("case", FROM_DATA)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_driven_training_is_the_same_on_every_grid(ranks, grid, case):
    results = ranks(grid[0] * grid[1], _train, *grid, case, "data")
    for step, (rows, through, losses, renewed, usage) in enumerate(_train(1, 1, case, "data")):
        close(table([result[step][0] for result in results], grid[1]), rows)
        assert through == (step < 3)
        assert losses == (step >= 3)
        for result in results:
            assert result[step][1:3] == (through, losses)
            assert result[step][4] == pytest.approx(usage)
        for which, (is_rows, ids) in enumerate(renewed):
            assert is_rows
            for replica in range(grid[0]):
                group = results[replica * grid[1] : (replica + 1) * grid[1]]
                assert sorted(torch.cat([result[step][3][which][1] for result in group]).tolist()) == sorted(
                    ids.tolist()
                )
        if step == 2 and not case.startswith("simvq"):  # whose rows are whitened: test_fit.py
            tokens = normal(TOKENS, DIM, seed=12)
            assert all((tokens == row).all(1).any() for row in rows)


@pytest.mark.parametrize("case", WITH_TABLE)
def test_evaluation_changes_nothing(case):
    quantizer = built(case, init="data", warmup_steps=1)
    quantizer.begin()
    quantizer.eval()
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    x = normal(TOKENS, DIM, seed=1).float()
    out = quantizer(x)
    assert not torch.equal(out.z, x), "evaluation quantizes, also in the warm-up"
    assert torch.equal(out.z, quantizer.decode(out.ids)) == quantizer.exact_decode
    assert all(len(rows) == 0 for _, rows in quantizer.update())
    for key, value in quantizer.state_dict().items():
        assert torch.equal(value, before[key]), key
