"""tools/bench rounding: float8 against its definition and its bounds, and what a search would have to score again."""

from __future__ import annotations

import json

import forks
import pytest
import torch


@pytest.fixture
def rounding(tool):
    return tool("rounding")


def nearest(x, scale):
    """x, a float, as the nearest of all finite numbers of e4m3, written out, times a power of two; ties to even."""
    steps = [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)]
    numbers = steps[:-1]  # the last stands for what is not a number
    at = min(range(len(numbers)), key=lambda i: (abs(numbers[i] - abs(x) * scale), i % 2))
    return numbers[at] / scale if x > 0 else -numbers[at] / scale


def test_float8_is_the_nearest_number_of_three_bits_of_mantissa(rounding):
    x_ND = torch.randn(4, 9, dtype=torch.float64) * torch.tensor([1.0, 1e-3, 1e-6, 0.0]).double().repeat(3)[:9]
    x_ND[0, :4] = torch.tensor([255.9, 17.0, 19.0, 0.0])  # ties go to the even one
    scale = 1.0
    while x_ND.abs().max() * scale >= 256:
        scale /= 2
    while x_ND.abs().max() * scale < 128:
        scale *= 2
    for row, low in zip(x_ND.tolist(), rounding.float8(x_ND).tolist(), strict=True):
        assert low == [nearest(x, scale) if x else 0.0 for x in row]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("power", [1, 5, 25])  # of normal numbers: all alike, and rows of which few numbers count
@pytest.mark.parametrize("operands", ["bf16", "float8"])
def test_rows_and_scores_are_off_by_no_more_than_the_bounds(rounding, operands, scale, power):
    rounded = rounding.ROUNDED[operands]
    x_ND, c_KD = scale * torch.randn(40, 33).double() ** power, torch.randn(70, 33).double() ** power
    c_KD[1] = c_KD[0]  # a tie
    c_KD[2], x_ND[2] = 0.0, 0.0
    low_ND, low_KD = rounded(x_ND), rounded(c_KD)
    for given, low in ((x_ND, low_ND), (c_KD, low_KD)):
        assert ((given - low).norm(dim=1) <= rounding.bound(given, rounded)).all()
    most = rounding.bound(x_ND, rounded)[:, None] * c_KD.norm(dim=1)
    most += low_ND.norm(dim=1)[:, None] * rounding.bound(c_KD, rounded)
    assert ((x_ND @ c_KD.t() - low_ND @ low_KD.t()).abs() <= most * (1 + 1e-12)).all()
    assert torch.equal(low_KD[1], low_KD[0])


def test_the_bound_of_a_number_is_reached_and_what_is_not_a_number_stays_in_its_row(rounding):
    x_ND = torch.ones(3, 4).double()
    x_ND[0, 1], x_ND[1, 2] = 17 / 16, torch.nan
    low_ND = rounding.float8(x_ND)
    assert abs(low_ND[0, 1] - 17 / 16) == 2.0**-4
    assert torch.equal(low_ND.isnan().any(1), torch.tensor([False, True, False]))


def test_no_chunk_that_has_the_best_score_is_left_out(rounding):
    x_ND, c_KD = torch.randn(30, 8).double(), torch.randn(700, 8).double()
    c_KD[650] = c_KD[3]  # a tie between the first chunk and the last
    exact = x_ND @ c_KD.t()
    for rounded in rounding.ROUNDED.values():
        low_ND, low_KD = rounded(x_ND), rounded(c_KD)
        again = rounding.in_doubt(x_ND, c_KD, low_ND, low_KD, low_ND @ low_KD.t())
        best = torch.stack([(part == exact.amax(1, keepdim=True)).any(1) for part in exact.split(rounding.CHUNK, 1)], 1)
        assert (again | ~best).all()
        assert again.double().mean() < 1


def test_float8_puts_chunks_in_doubt_that_bfloat16_does_not():
    """The price of ids that are exact (codes/gpu/passes.py): at the size of the README it is all of them."""
    done = forks.program("tools/bench", "rounding", "--tokens", "32", "--codes", "4096", "--dim", "64", "--json")
    assert done.returncode == 0, done.stderr
    rows = {(row["tokens"], row["operands"]): row for row in json.loads(done.stdout)["rows"]}
    assert len(rows) == 4
    assert all(0 < row["worst"] <= 1 for row in rows.values())
    low, lower = rows["normal", "bf16"], rows["normal", "float8"]
    assert low["doubt"] < 3 < 10 < lower["doubt"] <= lower["chunks"] == 32
    assert lower["scored_again"] > 0.9
    for key in ("logit_rms", "entropy_rms", "gradient"):
        assert lower[key] > 8 * low[key]
    done = forks.program("tools/bench", "rounding", "--tokens", "16", "--codes", "256", "--dim", "8")
    assert done.stdout.count("float8") == 2, done.stderr
