"""The fused kernels against dense.py, in Triton's interpreter on a CPU, on the device where there is one.

Values and gradients are those of Codebook.mix and Codebook.nearest, for which `kernels_serve` lets backend.py choose
the kernels wherever they run; what one operation promises alone is asked of gpu/passes.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from similarities import NAMES
from torch.utils._python_dispatch import TorchDispatchMode
from whole import CODES, integers, normal

pytest.importorskip("triton")

from fused import DEVICE, answers, check, near, numbers, small_tiles, sums_of_tensor_cores

from vqscale.codes import backend, dense, products
from vqscale.codes.gpu import operators, passes, tiles
from vqscale.codes.scan import BITS, Keys
from vqscale.codes.softmax import forward
from vqscale.codes.softmax.backward import Upstream
from vqscale.codes.softmax.forward import Wanted

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _several_programs():
    with small_tiles():
        yield


ALL = "mean lse entropy columns"
NEAR = {"fp32": 3e-5, "bf16": 2e-2, "fp8": 2e-2}  # of the largest number, by the kind of products
QUICK = [name if name == "dot" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("similarity", QUICK)
@pytest.mark.parametrize("kind", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_values_and_gradients_are_the_dense_ones(ranks, similarity, kind, codes):
    # bfloat16 rounds the keys that are not the rows, the upstream gradient, the probabilities and their gradient
    check(ranks, (40, 203, 20), similarity, ALL, kind, NEAR[kind], codes=codes)


@pytest.mark.parametrize("codes", CODES)
def test_of_numbers_that_float8_holds_they_are_too(ranks, codes):
    # of other similarities the keys are not the rows, and float8 holds no more than a part of them
    check(ranks, (40, 203, 20), "dot", ALL, "fp8", NEAR["fp8"], codes=codes)


@pytest.mark.parametrize("used", ["mean", "lse", "entropy", "columns"])
def test_a_gradient_alone_is_the_dense_one(ranks, used):
    check(ranks, (18, 70, 16), "euclid", used, "fp32", NEAR["fp32"])


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 5), (33, 64, 33)])
def test_shapes_that_fill_no_tile(ranks, shape):
    for kind, tolerance in NEAR.items():
        check(ranks, shape, "dot", ALL, kind, tolerance)


def _wanted(codes, temperature=1.0, entropy_temperature=None, kind="fp32"):
    """What softmax/autograd.py asks for where there are kernels."""
    return Wanted(codes, 0, temperature, entropy_temperature, kind)


@pytest.mark.parametrize("kind", NEAR)
def test_the_best_row_is_exact_where_products_cannot_tell(kind):
    # All rows round to nearly the same bfloat16 numbers; float64 decides.
    rows = (normal(1, 24, seed=1) + 1e-4 * normal(300, 24, seed=2)).float().to(DEVICE)
    x = normal(20, 24, seed=3).float().to(DEVICE)
    ids, score = dense.nearest(x.double(), rows.double())
    assert len(set(ids.tolist())) > 3
    for got_score, got in (passes.best(x, Keys(rows), 0), _best_of_mix(x, rows, kind)):
        assert torch.equal(got, ids)
        torch.testing.assert_close(got_score.double(), score, rtol=1e-6, atol=0.0)
    if kind != "fp32":
        rounded = (x.bfloat16().double() @ rows.bfloat16().double().t()).argmax(1)
        assert not torch.equal(rounded, ids), "these rows would not show a search in bfloat16"


def _best_of_mix(x, rows, kind):
    mixed = passes.mix(x, Keys(rows), rows, _wanted(len(rows), kind=kind))
    assert mixed.entropy_soft is None
    return mixed.score_B, mixed.row_B


@pytest.mark.parametrize("kind", NEAR)
@pytest.mark.parametrize(("of_x", "of_rows"), [(1e-30, 1e10), (1e10, 1e-25), (1e-30, 1.0), (1e-40, 1e20)])
def test_it_is_of_numbers_whose_squares_are_nothing_in_float32(kind, of_x, of_rows):
    x = (of_x * normal(20, 24, seed=1)).float().to(DEVICE)
    rows = (of_rows * (normal(1, 24, seed=2) + 1e-3 * normal(300, 24, seed=3))).float().to(DEVICE)
    ids, _ = dense.nearest(x.double(), rows.double())
    assert torch.equal(passes.best(x, Keys(rows), 0)[1], ids)
    assert torch.equal(_best_of_mix(x, rows, kind)[1], ids)


def test_it_is_where_tensor_cores_cut_sums_of_float8_off():
    """All rows have the same numbers, which float8 holds, and the 100th a little more; but where the large ones come
    first, as there, more of the small ones is cut off."""
    one = numbers(1, 1, 256, 1.0, "fp8")[0][0].abs().float().sort().values
    rows = torch.cat([one.repeat(64, 1), one.flip(0).repeat(66, 1)])
    rows[100, -1] *= 2
    low, unit = products.float8(rows)
    assert torch.equal(low.float() * unit, rows), "what is off should be the sums"
    x = torch.ones(3, 256, device=DEVICE)
    with sums_of_tensor_cores():
        assert _best_of_mix(x, rows, "fp8")[1].tolist() == [100] * 3


@pytest.mark.parametrize(("kind", "bits"), [("fp32", 21), ("bf16", 21), ("fp8", 13)])
def test_in_doubt_is_what_operands_lose_and_sums_round_away_and_no_more(monkeypatch, kind, bits):
    x, rows = (scale * normal(num, 24, seed=num).float().to(DEVICE) for scale, num in ((3.0, 20), (1e-3, 150)))
    kernel, launched = operators.kernels.rescore_kernel, []

    class Seen:
        def __getitem__(self, grid):
            def launch(*args, **options):
                launched.append((*args[5:8], options["CHUNK"]))
                return kernel[grid](*args, **options)

            return launch

    monkeypatch.setattr(operators.kernels, "rescore_kernel", Seen())
    _best_of_mix(x, rows, kind)
    [(left_N, right_N, width_c3, chunk)] = launched
    given = operators.Operands.of(x, rows, None, kind)
    units = given.unit[1:].double() if kind == "fp8" else (1.0, 1.0)
    low_ND, low_KD = (part.double() * unit for part, unit in zip((given.score_x, given.score_c), units, strict=True))
    rounding, norm_N = (24 + 8) * 2.0**-bits, low_ND.norm(dim=1)
    exact = {"rtol": 1e-6, "atol": 0.0}
    torch.testing.assert_close(left_N.double(), (x.double() - low_ND).norm(dim=1) + rounding * norm_N, **exact)
    torch.testing.assert_close(right_N.double(), norm_N * (1 + rounding), **exact)
    for part_KD, width_c in ((rows.double(), width_c3[:, 0]), (rows.double() - low_KD, width_c3[:, 1])):
        longest_c = torch.stack([norm_k.max() for norm_k in part_KD.norm(dim=1).split(chunk)])
        torch.testing.assert_close(width_c.double(), 1.001 * longest_c, **exact)


def test_ties_go_to_the_lowest_row():
    some = integers(40, 6, seed=1)
    rows = torch.cat([some, some.flip(0), some, some[:17]]).to(DEVICE)
    bias = integers(40, seed=2)
    bias = torch.cat([bias, bias.flip(0), bias, bias[:17]]).to(DEVICE)
    x = integers(25, 6, seed=3).to(DEVICE)
    x[7] = 0.0
    l_nk = x @ rows.t() + bias
    score, row = passes.best(x, Keys(rows, bias), 0)
    assert torch.equal(row, l_nk.argmax(1))
    assert torch.equal(score.float(), l_nk.amax(1))
    # with one row, all equal, everything is in doubt
    assert passes.best(x, Keys(rows[:1].expand(150, -1)), 0)[1].eq(0).all()


@pytest.mark.parametrize("kind", NEAR)
def test_logits_of_ten_thousand(kind):
    shape, scale = (20, 90, 16), 600.0
    x, rows = numbers(*shape, scale, kind)
    assert (x @ rows.t()).abs().max() > 1e4
    got = answers(1, shape, scale, "dot", ALL, kind, (1.0, 0.01))
    truth = dense.mix(x, rows, "dot", 1.0, 0.01)
    assert torch.equal(got["ids"], dense.nearest(x, rows)[0].cpu())
    near(got["lse"], truth.lse_N, 1e-6)
    near(got["mean"], truth.mean_ND, 1e-5 if kind == "fp32" else 1e-2)
    # float32 sums of 16 products near 1e4 (steps of 9.8e-4) are off by up to 2.5 steps, in whatever order they are
    # added: at this temperature that is 28 per cent of a probability
    near(got["columns"], truth.columns_K, 0.28)
    for part in got.values():
        assert torch.isfinite(part).all()


def test_numbers_near_the_end_of_float32():
    rows = torch.tensor([[1e18, 0.0], [0.0, 1e18], [-1e18, 0.0]], device=DEVICE)
    x = torch.tensor([[1e3, 0.0], [0.0, -1e3]], device=DEVICE)
    for kind in NEAR:
        mixed = passes.mix(x, Keys(rows), rows, _wanted(3, 1.0, 0.01, kind))
        assert mixed.row_B.tolist() == [0, 0]
        assert torch.isfinite(mixed.sum_BD).all()
        torch.testing.assert_close(mixed.entropy_soft.sum_B, torch.tensor([1.0, 2.0], device=DEVICE))
    _, row = passes.best(x * 1e17, Keys(rows), 0)  # beyond float32: norms are infinite, float64 scores are not
    assert row.tolist() == [0, 0]


@pytest.mark.parametrize("kind", NEAR)
def test_products_that_overflow_leave_no_row_out(kind):
    rows = torch.zeros(200, 2, device=DEVICE)
    rows[70, 0], rows[150, 1] = 2.0, 1e22
    x = torch.tensor([[1e22, 1.0], [1.0, 1e22]], device=DEVICE)  # units of float8 and the score 1e44 are infinite
    assert passes.best(x, Keys(rows), 0)[1].tolist() == [70, 150]
    assert _best_of_mix(x, rows, kind)[1].tolist() == [70, 150]


def test_a_token_that_is_not_a_number_stays_one_and_harms_no_other():
    x = normal(20, 8, seed=1).float().to(DEVICE)
    rows = normal(50, 8, seed=2).float().to(DEVICE)
    bad = x.clone()
    bad[3, 2] = torch.nan
    good = torch.arange(20, device=DEVICE) != 3
    score, row = passes.best(bad, Keys(rows), 0)
    expected = passes.best(x, Keys(rows), 0)
    assert int(row[3]) == 0
    assert torch.equal(row[good], expected[1][good])
    assert torch.equal(score[good], expected[0][good])
    mixed, plain = (passes.mix(tokens, Keys(rows), rows, _wanted(50, 1.0, 0.2)) for tokens in (bad, x))
    for got, alone in (
        (mixed.soft.sum_B, plain.soft.sum_B),
        (mixed.entropy_soft.excess_B, plain.entropy_soft.excess_B),
        (mixed.sum_BD, plain.sum_BD),
    ):
        assert torch.isnan(got[3]).all()
        assert torch.equal(got[good], alone[good])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_that_is_not_a_number_is_reported(bad):
    x, rows = normal(20, 8, seed=1).float().to(DEVICE), normal(150, 8, seed=2).float().to(DEVICE)
    rows[77, 3] = bad
    score, row = passes.best(x, Keys(rows), 0)
    assert score.isnan().all()
    assert 0 <= int(row.min()) <= int(row.max()) < 150


@pytest.mark.parametrize(("num", "codes"), [(5, 0), (0, 7)])
def test_a_rank_without_rows_and_a_batch_without_tokens(num, codes):
    x, rows = torch.ones(num, 8, device=DEVICE), torch.ones(codes, 8, device=DEVICE)
    keys = Keys(rows, rows.sum(1))
    blocks = backend.BLOCKS
    wanted = Wanted(7, 2**20, 0.5, 0.125)
    got, expected = (side.mix(x, keys, rows, wanted) for side in (passes, blocks))
    for name in ("row_B", "score_B", "sum_BD"):
        assert torch.equal(getattr(got, name), getattr(expected, name))
    assert torch.equal(got.soft.sum_B, expected.soft.sum_B)
    assert torch.equal(got.entropy_soft.sum_B, expected.entropy_soft.sum_B)
    assert passes.best(x, keys, 0)[1].tolist() == [0] * num
    zero = torch.zeros(num, device=DEVICE)
    assert passes.column_sums(x, keys, got, zero, zero, wanted).tolist() == [0.0] * codes
    assert passes.row_means(x, keys, got, zero, zero, rows.sum(1), wanted).tolist() == [0.0] * num
    up = Upstream(score_B=zero, log_B=zero, g_mean_BD=x, shift_B=zero)
    out = passes.mix_backward(x, keys, rows, got, up, wanted)
    assert [part.shape for part in (out.x_BD, out.keys_kD, out.bias_k)] == [x.shape, rows.shape, (codes,)]
    assert not out.x_BD.any()
    assert not out.keys_kD.any()


def test_half_inputs_are_read_as_they_are():
    x, rows = normal(20, 12, seed=1).bfloat16().to(DEVICE), normal(60, 12, seed=2).bfloat16().to(DEVICE)
    mixed = passes.mix(x, Keys(rows), rows, _wanted(60))
    truth = dense.mix(x.double(), rows.double())
    assert torch.equal(mixed.row_B, dense.nearest(x.double(), rows.double())[0])
    assert mixed.sum_BD.dtype == mixed.soft.sum_B.dtype == torch.float32
    near(mixed.score_B + mixed.soft.sum_B.log2() / BITS, truth.lse_N, 1e-5)
    near(mixed.sum_BD / mixed.soft.sum_B[:, None], truth.mean_ND, 1e-2)
    up = Upstream(
        score_B=mixed.score_B, log_B=mixed.soft.sum_B.log2(), g_mean_BD=None, shift_B=-torch.ones(20, device=DEVICE)
    )
    out = passes.mix_backward(x, Keys(rows), rows, mixed, up, _wanted(60))
    assert out.x_BD.dtype == out.keys_kD.dtype == torch.bfloat16
    near(out.x_BD, torch.softmax(x.double() @ rows.double().t(), 1) @ rows.double(), 1e-2)


class _NoWaiting(TorchDispatchMode):
    """Refuses what makes a host wait for the device: numbers read back, shapes that depend on data."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "bincount")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        assert not name.startswith(self.WAITS), f"{name} waits for the device"
        if name.startswith("index"):
            assert not any(torch.is_tensor(i) and i.dtype == torch.bool for i in args[1]), "a mask has a length"
        return function(*args, **(kwargs or {}))


def test_no_operation_waits_for_the_device():
    x, rows = torch.randn(20, 8, device=DEVICE), torch.randn(70, 8, device=DEVICE)
    bias, zero, upstream = rows.sum(1), torch.zeros(20, device=DEVICE), torch.zeros(20, 5, device=DEVICE)
    plain = {
        name: getattr(operators, name)._init_fn for name in ("best", "mix", "column_sums", "row_means", "mix_backward")
    }
    with _NoWaiting():
        for kind in NEAR:
            plain["best"](x, rows, bias, kind)
            plain["mix"](x, rows, bias, rows, 1.0, 5.0, kind)
            plain["column_sums"](x, rows, bias, 5.0, zero, zero, kind)
            plain["row_means"](x, rows, bias, 5.0, zero, zero, bias, kind)
            plain["mix_backward"](x, rows, bias, rows, upstream, x, bias, True, True, 1.0, 5.0, 2**20, kind)
        with pytest.raises(AssertionError, match="waits"):
            zero.sum().item()
        with pytest.raises(AssertionError, match=r"waits|length"):
            zero[zero > 0]


def test_operators_keep_their_promises():
    x, rows = torch.randn(5, 8, device=DEVICE), torch.randn(20, 8, device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.best, (x, rows, None, "fp8"), test_utils=checks)
    torch.library.opcheck(operators.mix, (x, rows, None, rows, 1.0, 5.0, "fp8"), test_utils=checks)
    zero, upstream = torch.zeros(5, device=DEVICE), torch.zeros(5, 5, device=DEVICE)
    torch.library.opcheck(operators.column_sums, (x, rows, None, 1.0, zero, zero, "fp8"), test_utils=checks)
    torch.library.opcheck(operators.row_means, (x, rows, None, 1.0, zero, zero, rows[:, 0], "fp8"), test_utils=checks)
    given = (x, rows, rows.sum(1), rows, upstream, x, None, True, False, 1.0, 5.0, 2**20, "fp8")
    torch.library.opcheck(operators.mix_backward, given, test_utils=checks)


def test_parts_cover_the_loop_and_none_is_empty():
    for count in (1, 5, 32, 131, 132, 133, 2048):
        for length in (1, 63, 64, 65, 1000, 262144):
            num, per_part = tiles.parts(count, length, 64, 132)
            assert 1 <= num <= tiles.MOST_PARTS
            assert per_part % 64 == 0
            assert (num - 1) * per_part < length <= num * per_part
    # 4096 tokens in tiles of 128 on 132 processors: 4 parts fill 128 of them
    assert tiles.parts(32, 262144, 64, 132) == (4, 65536)


def test_blocks_serve_a_cpu_whatever_is_wanted():
    assert backend.pick(torch.zeros(2, 8), "bf16") is backend.BLOCKS
    assert backend.BLOCKS.mix is forward.mix


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "name"), [("90", "row_means"), ("89", "peaks"), ("120", "logit_gradient")])
def test_a_kernel_compiles_for_a_device_that_is_not_here_and_fits(tmp_path, capability, name):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(ROOT / "tools" / "bench"), "kernels", "--only", name, "--capability", capability]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in done.stdout.splitlines()[1:-1]:
        kernel, *_, products = line.split()
        assert kernel == name
        assert int(products) > 0, "the tensor cores would be idle; those of sm_90 without a product of warp groups"


@pytest.mark.parametrize(
    ("capability", "tokens_codes"), [(80, (64, 64)), (86, (32, 32)), (89, (32, 32)), (90, (128, 64)), (120, (32, 32))]
)
def test_tiles_follow_the_shared_memory_of_the_device(capability, tokens_codes):
    chosen = tiles.tile("gradient", 256, 2, capability=capability)
    assert (chosen.tokens, chosen.codes) == tokens_codes


@pytest.mark.gpu
@pytest.mark.parametrize("similarity", NAMES)
@pytest.mark.parametrize(("kind", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize("dim", [64, 256])
def test_on_the_device_at_real_sizes(ranks, similarity, kind, tolerance, dim):
    check(ranks, (1024, 16384 + 7, dim), similarity, ALL, kind, tolerance, answers=answers)


@pytest.mark.gpu
@pytest.mark.skipif(not products.has_float8(), reason="this device multiplies no float8")
@pytest.mark.parametrize("dim", [64, 256])
def test_float8_on_the_device_at_real_sizes(ranks, dim):
    # 1e-1: of sums of float8 tensor cores keep fewer bits than those of bfloat16
    check(ranks, (1024, 16384 + 7, dim), "dot", ALL, "fp8", 1e-1, answers=answers)


@pytest.mark.gpu
def test_on_the_device_the_kernels_are_chosen_and_need_little():
    x = torch.randn(4096, 256, device="cuda")
    rows = torch.randn(262144, 256, device="cuda") / 16
    assert products.wanted("cuda", x.dtype) == "fp32"
    assert backend.pick(x).mix is forward.mix
    assert backend.pick(x).best is backend.pick(x.bfloat16()).best is passes.best
    with products.precision("medium"):
        assert backend.pick(x, products.wanted("cuda", x.dtype)).mix is passes.mix
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mixed = passes.mix(x, Keys(rows), rows, _wanted(len(rows), 1.0, 0.01))
    zero = torch.zeros(4096, device="cuda")
    up = Upstream(score_B=mixed.score_B, log_B=mixed.soft.sum_B.log2(), g_mean_BD=x, shift_B=zero)
    passes.mix_backward(x, Keys(rows), rows, mixed, up, _wanted(len(rows), 1.0, 0.01))
    assert torch.cuda.max_memory_allocated() - before < 1.5 * 2**30
    for first in range(0, 4096, 512):
        ids = (x[first : first + 512].double() @ rows.double().t()).argmax(1)
        assert torch.equal(mixed.row_B[first : first + 512], ids)
