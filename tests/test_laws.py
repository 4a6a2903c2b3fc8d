"""Laws through numbers, against numpy and scipy; the laws of a study with noise, one seed, runs that failed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from vqscale.metrics import laws as least_squares
from vqscale.metrics.laws import fit, student_t
from vqscale.show import laws, page, study_page
from vqscale.show.study_page import Results

SIZES = [2.0**n for n in (8, 10, 12, 14, 16)]
AXES = {"power": (np.log2, np.log2), "exponential": (np.asarray, np.log2), "linear": (np.asarray, np.asarray)}


def _points(form, seeds=2, noise=0.1):
    """y of slope -0.3 with noise in what is fitted."""
    rng = np.random.default_rng(5)
    x = np.repeat(SIZES if form == "power" else np.log2(SIZES), seeds)
    line = 1.5 - 0.3 * AXES[form][0](x) + noise * rng.standard_normal(len(x))
    return x, line if form == "linear" else 2.0**line


@pytest.mark.parametrize("coverage", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 8, 30, 101])
def test_the_quantiles_of_student_are_those_of_scipy(coverage, degrees):
    expected = scipy.stats.t.ppf((1 + coverage) / 2, degrees)
    assert student_t(coverage, degrees) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("form", AXES)
@pytest.mark.parametrize("seeds", [1, 3])
def test_a_law_is_the_line_of_numpy_with_the_interval_of_scipy(form, seeds):
    x, y = _points(form, seeds)
    u, v = AXES[form][0](x), AXES[form][1](y)
    found, theirs = fit(form, x, y), scipy.stats.linregress(u, v)
    slope, intercept = np.polyfit(u, v, 1)
    reach = theirs.stderr * scipy.stats.t.ppf(0.975, len(x) - 2)
    assert (found.slope, found.intercept) == pytest.approx((slope, intercept), rel=1e-10)
    assert (found.low, found.high) == pytest.approx((slope - reach, slope + reach), rel=1e-8)
    assert found.r2 == pytest.approx(theirs.rvalue**2, rel=1e-10)
    by_hand = intercept + slope * u[0]
    assert found.at([x[0]])[0] == pytest.approx(by_hand if form == "linear" else 2**by_hand)
    assert found.constant == pytest.approx(found.at([1.0 if form == "power" else 0.0])[0])


def test_the_interval_holds_the_exponent_in_95_of_100_draws():
    rng, held = np.random.default_rng(0), 0
    x = np.repeat(SIZES, 2)
    for _ in range(1000):
        found = fit("power", x, 3 * x**0.9 * 2.0 ** (0.2 * rng.standard_normal(len(x))))
        held += found.low < 0.9 < found.high
    assert abs(held - 950) < 4 * math.sqrt(1000 * 0.95 * 0.05)


def test_points_on_a_line_have_no_width_and_a_constant_explains_nothing():
    found = fit("power", SIZES, [2 * k**0.75 for k in SIZES])
    assert (found.slope, found.constant, found.r2) == pytest.approx((0.75, 2, 1))
    assert found.high - found.low < 1e-9
    flat = fit("linear", SIZES, [3.0] * 5)
    assert (flat.slope, flat.constant) == pytest.approx((0, 3), abs=1e-12)
    assert math.isnan(flat.r2)


def test_two_values_are_no_law():
    with pytest.raises(ValueError, match="2 different values, and a law needs at least 3"):
        fit("power", [1, 1, 2, 2], [1, 2, 3, 4])


@pytest.mark.parametrize(
    ("form", "x", "y", "has"),
    [
        ("power", 0, 1, False), ("power", 1, 0, False), ("exponential", 0, 1, True), ("exponential", 1, -1, False),
        ("linear", -1, -1, True), ("linear", math.nan, 1, False), ("linear", 1, math.inf, False),
    ],
)  # fmt: skip
def test_a_point_has_a_place_where_its_logarithms_are(form, x, y, has):
    assert least_squares.has_place(form, x, y) == has


TOKENIZER, PRIOR = study_page.TASKS["tokenizer"], study_page.TASKS["prior"]


def _run(quantizer, size, seed, **more):
    """A run whose ids carry 0.9 of log2 K and whose distortion is 2^(-0.5 bits), with a cost of 0.1 s + 1 us a code."""
    bits = 0.9 * math.log2(size) + 0.01 * seed
    summary = {"num_codes": int(size), "usage": 1.0, "ceiling": 1.0, "perplexity": 2**bits, "ids_per_token": 1}
    summary |= {"psnr": 5 * bits * math.log10(2), "process_s": 0.1 + 1e-6 * size, "ssim": 0.5}
    labels = {"quantizer": quantizer, "K": str(int(size)), "seed": str(seed)}
    row = {"loss": 0.1, "loss/l2": size**-0.25}
    result = study_page.result(TOKENIZER, summary | more, row)
    return {"run": f"{quantizer}-{int(size)}-seed{seed}", **labels, "status": "done"} | result


DIALS = ["quantizer", "K"]
STUDY = [_run(quantizer, size, seed) for quantizer in ("ibq", "vq") for size in SIZES for seed in (0, 1)]


def _laws(lines, task=TOKENIZER, dials=DIALS):
    return {(each.line["law"], each.curve): each.line for each in laws.fitted(task.laws, lines, dials)}


def test_the_laws_of_a_study_are_those_that_its_numbers_were_made_by():
    found = _laws(STUDY)
    assert len(found) == 2 * len(TOKENIZER.laws)
    expected = {
        "perplexity ~ K^b": 0.9, "distortion ~ K^b": -0.45, "distortion ~ 2^(b bits)": -0.5,
        "reconstruction ~ K^b": -0.25, "process_s = a + b K": 1e-6,
    }  # fmt: skip
    for (law, _), line in found.items():
        assert line["b"] == pytest.approx(expected[law], rel=1e-6)
        assert line["low"] <= line["b"] <= line["high"]
        assert (line["n"], line["seeds"], line["note"]) == (10, 2, "")
        assert line["values"] == (10 if "bits" in law else 5)
        assert line["r2"] > 0.999


def test_what_is_left_out_of_a_law_is_named():
    lines = [dict(line) for line in STUDY if line["quantizer"] == "ibq"]
    for place, changes in {
        0: {"status": "failed", "perplexity": None, "error": "out of memory"},
        1: {"status": "waiting", "perplexity": None},
        4: {"perplexity": 0.0},
        5: {"perplexity": None},
    }.items():
        lines[place] |= changes
    line = _laws(lines)["perplexity ~ K^b", "ibq"]
    assert line["b"] == pytest.approx(0.9, rel=1e-2)
    assert (line["n"], line["values"], line["seeds"]) == (6, 3, 2)
    assert line["note"] == (
        "without ibq-256-seed0 (failed); without ibq-256-seed1 (waiting); without ibq-4096-seed0 (K 4096, perplexity "
        "0.0); without ibq-4096-seed1 (no perplexity)"
    )
    for each in lines[2:]:
        each |= {"status": "waiting", "perplexity": None}
    lines[2] |= {"perplexity": 2.0, "status": "done"}
    line = _laws(lines)["perplexity ~ K^b", "ibq"]
    assert "b" not in line
    assert line["note"].startswith("not fitted: 1 different values, and a law needs at least 3; without ibq-256-seed0")
    assert "without 8 runs (waiting)" in line["note"]


def test_one_seed_says_that_its_interval_is_of_the_residuals_alone():
    for line in _laws([line for line in STUDY if line["seed"] == "1"]).values():
        assert line["note"] == "one seed: the interval is of the residuals alone"
        assert (line["n"], line["seeds"]) == (5, 1)


@pytest.mark.parametrize("sizes", [[4096.0], [100.0, 200.0, 300.0]])
def test_without_a_dial_that_goes_by_powers_there_are_no_laws(sizes):
    assert not _laws([_run("vq", size, seed) for size in sizes for seed in (0, 1)])


def test_the_laws_of_a_prior_go_over_its_dial():
    lines = [
        {"run": f"{n}", "width": f"{n}", "seed": "0", "status": "done", "loss": 9 * n**-0.125} for n in (64, 256, 1024)
    ]
    found = _laws(lines, PRIOR, ["width"])
    assert found["loss ~ width^b", "all"]["b"] == pytest.approx(-0.125)
    assert [law for law, _ in found] == ["loss ~ width^b"]


def test_bits_are_those_that_are_stored_or_the_entropy_of_the_ids():
    def bits(**numbers):
        return study_page.result(TOKENIZER, numbers, {}).get("bits")

    assert bits(perplexity=64.0, ids_per_token=1) == 6
    assert bits(perplexity=64.0, id_bits=11.5) == 11.5
    assert bits(perplexity=64.0) is None
    scq = study_page.result(TOKENIZER, {"perplexity": 64.0, "id_bits": 6.0}, {"codes/bits": 92.0})
    assert scq["bits"] == 92


@pytest.mark.slow
@pytest.mark.parametrize("key", TOKENIZER.figures)
def test_every_figure_of_a_study_is_drawn_with_its_laws(key):
    figure = TOKENIZER.figures[key]
    plain = page.chart(figure, STUDY, key, DIALS)
    assert plain is not None
    told = [each for each in laws.fitted(TOKENIZER.laws, STUDY, DIALS) if each.law.of == key]
    lines = {each.curve: each.fit.at for each in told if each.law.over == figure.over}
    assert (page.chart(figure, STUDY, key, DIALS, lines) != plain) == bool(lines)


@pytest.mark.slow
def test_the_page_has_the_laws_and_says_how_many_runs_are_done_and_where_the_ceiling_is_low(tmp_path):
    low, dead = dict(STUDY[8]) | {"ceiling": 0.63}, {"run": "ibq-9-seed0", "quantizer": "ibq", "K": "512", "seed": "0"}
    lines = [*STUDY[:8], low, *STUDY[9:], dead | {"status": "failed", "error": "no memory"}]
    text = study_page.write(tmp_path, Results("sizes", TOKENIZER, lines, DIALS, {}, ["commit 7"])).read_text()
    assert "Of 21 runs are: 20 done, 1 failed (ibq-9-seed0)." in text
    assert "below 98%, the held-out tokens being too few for so many codes, in ibq-65536-seed0 (63.0%)" in text
    assert "<td>distortion ~ 2^(b bits)</td><td>ibq</td><td>-0.5</td>" in text
    assert "without ibq-9-seed0 (failed)" in text
    assert text.count("data:image/png;base64,") == len(TOKENIZER.figures)
    assert "http" not in text.replace("http-equiv", "")


def test_no_caution_where_the_ceiling_is_high_enough():
    assert TOKENIZER.cautions(STUDY) == []
    assert PRIOR.cautions([{"run": "a", "status": "done"}]) == ()
