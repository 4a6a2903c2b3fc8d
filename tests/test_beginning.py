"""What a run is told of the beginning of its codes: what a fit saw and did, what will not happen, what stands in.

Where the codes go, and that this is the same on every grid of ranks, is in test_fit.py and test_upkeep.py.
"""

from __future__ import annotations

import json
import math

import jobs
import numpy as np
import pytest
import torch
from quantizer_cases import DIM, TOKENS, built, settings
from whole import GRIDS, mine, normal

from vqscale import config as configuration
from vqscale import quantizers
from vqscale.codes.rows import set_aside
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers import QUANTIZERS
from vqscale.run import folder
from vqscale.show import run_page, study_page
from vqscale.train.config import TokenizerRun


def _driven(config, mesh=None, seed=3):
    quantizer = quantizers.build(config, mesh, seed=seed)
    quantizer.begin()
    return quantizer.train()


def _steps(quantizer, batches):
    """What each update fitted."""
    told = []
    for x in batches:
        quantizer(x)
        quantizer.update()
        told.append(quantizer.fits())
    return told


def _batches(dim, steps, tokens=TOKENS, scale=1.0):
    return [scale * normal(tokens, dim, seed=10 + step).float() for step in range(steps)]


def _soon(config):
    """With rows from data after two steps, if it has rows, and revival after two more."""
    if "inner" in config:
        return {**config, "inner": _soon(config["inner"])}
    return {**config, "init": "data", "warmup_steps": 2, "revive_after": 2} if "init" in config else config


# A fit is told.


@pytest.mark.parametrize("name", ["vq", "ema", "ibq", "scq", "simvq"])
def test_a_table_tells_once_what_its_rows_were_drawn_from(name):
    quantizer = _driven({"name": name, "num_codes": 40, "dim": 3, "warmup_steps": 4})
    flat = [x * torch.tensor([10.0, 1.0, 1e-4]) for x in _batches(3, 6)]
    *before, at, after, later = _steps(quantizer, flat)
    assert not any([*before, after, later])
    fit = at["fit"]
    assert (fit.tokens, fit.drawn, fit.num_codes) == (2 * TOKENS, 40, 40)  # 24 a step: two steps of the four
    drawn = torch.cat(flat[2:4]).double().numpy()
    values = np.linalg.eigvalsh(np.cov(drawn.T, bias=True))
    assert fit.rank == 2
    assert math.log10(fit.condition) == pytest.approx(math.log10(values[-1] / values[0]), abs=0.3)  # 40 of the 48
    assert "40 rows drawn from 48 tokens of all ranks; these vary in 2 of 3 directions" in str(fit)
    assert "the other" not in str(fit)


@pytest.mark.parametrize("config", [{"name": "fsq", "levels": [5, 5, 5]}, {"name": "lfq", "dim": 3}])
def test_whitening_tells_of_its_first_step(config):
    first, second = _steps(_driven(config), [x * torch.tensor([1.0, 2.0, 0.0]) for x in _batches(3, 2)])
    assert not second
    assert (first["fit"].tokens, first["fit"].rank, first["fit"].num_codes) == (TOKENS, 2, 0)
    assert "whitened" in str(first["fit"])
    assert "the other directions count as 0.0001 of the mean variance" in str(first["fit"])
    assert set(first["fit"].numbers()) == {"tokens", "rank", "condition"}


def test_every_column_of_a_composition_tells_for_itself():
    inner = {"name": "vq", "num_codes": 4, "dim": 2, "warmup_steps": 2}
    grouped = _steps(_driven({"name": "grouped", "groups": 2, "inner": inner}), _batches(4, 3))
    assert [sorted(told) for told in grouped] == [[], ["fit/0", "fit/1"], []]
    residual = _driven({"name": "residual", "levels": 2, "stagger": 1, "inner": inner})
    assert [sorted(told) for told in _steps(residual, _batches(2, 4))] == [[], ["fit/0"], ["fit/1"], []]
    assert residual.beginning == (3, 3)


def test_landing_is_a_statistic_from_the_warm_up_to_whole_codes():
    quantizer = _driven({"name": "vq", "num_codes": 4, "dim": 2, "warmup_steps": 2, "landing_steps": 1})
    told = []
    for x in _batches(2, 5):
        told.append(float(quantizer(x).stats["landing"]))
        quantizer.update()
    assert told == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert quantizer.beginning == (2, 3)


# Too few tokens, constant ones, and none that are numbers.


@pytest.mark.parametrize("name", ["vq", "ema", "ibq", "scq"])
def test_rows_without_a_token_begin_normal_with_the_moments_of_those_that_had_one(name):
    config = {"name": name, "num_codes": 4000, "dim": 2, "warmup_steps": 2, "init_scale": 0.3, "revive_every": 0}
    mix = torch.tensor([[3.0, 1.0], [0.0, 0.5]])
    quantizer, batches = _driven(config), [x @ mix + 5.0 for x in _batches(2, 2, tokens=500)]
    fit = _steps(quantizer, batches)[-1]["fit"]
    assert (fit.tokens, fit.drawn) == (1000, 1000)
    assert "the other 3,000 of 4,000 rows had no token and are normal" in str(fit)
    rows = quantizer.codebook.rows.detach()
    seen = torch.cat(batches)
    assert {tuple(row.tolist()) for row in rows[3000:]} == {tuple(token.tolist()) for token in seen}
    torch.testing.assert_close(rows[:3000].mean(0), seen.mean(0), atol=0.2, rtol=0.0)
    torch.testing.assert_close(rows[:3000].t().cov(), seen.t().cov(), atol=0.6, rtol=0.1)
    if name == "ema":
        assert torch.equal(quantizer.averages.sums_kD, rows), "or old averages would pull them back"


def test_simvq_whitens_by_the_rows_that_are_tokens_and_its_other_codes_have_their_moments():
    config = {"name": "simvq", "num_codes": 4000, "dim": 2, "warmup_steps": 2}
    quantizer, batches = _driven(config), [3.0 * x + 5.0 for x in _batches(2, 2, tokens=500)]
    _steps(quantizer, batches)
    codes, seen = quantizer.decode(torch.arange(4000)), torch.cat(batches)
    assert float(torch.cdist(codes[3000:].double(), seen.double()).min(1).values.max()) < 1e-3
    torch.testing.assert_close(codes[:3000].mean(0), seen.mean(0), atol=0.3, rtol=0.0)
    torch.testing.assert_close(codes[:3000].t().cov(), seen.t().cov(), atol=0.8, rtol=0.1)


@pytest.mark.parametrize("name", ["vq", "ema", "ibq", "simvq"])
def test_fewer_tokens_than_dimensions_are_codes_all_the_same(name):
    quantizer = _driven({"name": name, "num_codes": 3, "dim": 8, "warmup_steps": 1, "revive_every": 0})
    (x,) = _batches(8, 1, tokens=3)
    fit = _steps(quantizer, [x])[0]["fit"]
    assert (fit.rank, fit.dim) == (2, 8)
    codes = quantizer.decode(torch.arange(3))
    torch.testing.assert_close(codes[torch.cdist(codes, x).argmin(0)], x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["vq", "ema", "ibq", "simvq", "lfq", "bsq", "fsq"])
def test_constant_latents_are_told_and_latents_that_differ_later_find_codes(case):
    quantizer = _driven(_soon(settings(case)))
    constant = torch.full((TOKENS, DIM), 2.3)
    told = [fits for fits in _steps(quantizer, [constant] * 2) if fits]
    assert [fits["fit"].rank for fits in told] == [0]
    assert "latents are constant" in str(told[0]["fit"])
    for x in _batches(DIM, 8):
        x.requires_grad_()
        out = quantizer(x)
        (out.z.sum() + sum(out.losses.values())).backward()
        assert torch.isfinite(out.z).all()
        assert torch.isfinite(x.grad).all()
        quantizer.update()
    assert len(quantizer.eval().encode(normal(200, DIM, seed=1).float()).unique(dim=0)) > 3


@pytest.mark.parametrize("name", ["vq", "ema", "ibq", "simvq"])
def test_tokens_that_are_no_numbers_become_no_rows(name):
    """A step without numbers is skipped, and the warm-up lasts a step longer; where a driver does not skip it, the rows
    that would have been none stay what they were."""
    config = {"name": name, "num_codes": 20, "dim": 3, "warmup_steps": 2}
    quantizer = _driven(config)
    first, last = _batches(3, 2)
    for x, stepped in ((first, True), (last * torch.nan, False), (last, True)):
        quantizer(x)
        quantizer.update(stepped)
        assert bool(quantizer.fits()) == (x is last)
    drawn = quantizer.decode(torch.arange(20))
    assert float(torch.cdist(drawn.double(), last.double()).min(1).values.max()) < 1e-3
    heedless = _driven(config)
    _steps(heedless, [first, torch.cat([last[:12], last[12:] * torch.nan])])
    assert torch.isfinite(heedless.codebook.rows).all()


# What will not happen is told beforehand.


def test_a_run_that_ends_before_its_codes_begin_is_warned_of_it():
    quantizer = quantizers.build({"name": "ibq", "num_codes": 64, "warmup_steps": 100, "landing_steps": 50})
    (told,) = quantizer.forecast(steps=100, tokens=64)
    assert "no step of this run trains with codes: they begin after a warm-up of 100 steps" in told
    (told,) = quantizer.forecast(steps=150, tokens=64)
    assert "codes do not land in this run: the decoder is given whole codes after step 150" in told
    assert quantizer.forecast(steps=151, tokens=64) == []
    assert quantizers.build({"name": "ibq", "init": "normal"}).forecast(1, 1) == []
    assert quantizers.build({"name": "fsq", "levels": [5, 5, 5]}).forecast(1, 64) == []


def test_more_codes_than_tokens_of_the_warm_up_are_told_with_the_warm_up_that_has_enough():
    table = {"name": "simvq", "num_codes": 2**18, "warmup_steps": 100}
    (told,) = quantizers.build(table).forecast(steps=400, tokens=1024)
    assert "262,144 codes (num_codes) are more than the 100 steps of the warm-up x 1,024 tokens = 102,400" in told
    assert "the other 159,744 rows begin normal" in told
    assert "at most 256 a time" in told
    assert "A warm-up of 256 steps (warmup_steps) has a token for every row" in told
    assert quantizers.build({**table, "warmup_steps": 256}).forecast(400, 1024) == []
    (told,) = quantizers.build({**table, "revive_every": 0}).forecast(400, 1024)
    assert "that is what most of them stay" in told
    grouped = {"name": "grouped", "groups": 2, "inner": {"name": "vq", "num_codes": 300, "dim": 2, "warmup_steps": 1}}
    assert len(quantizers.build(grouped).forecast(9, 64)) == 1


def test_whitening_of_fewer_tokens_than_dimensions_is_told():
    quantizer = quantizers.build({"name": "bsq", "dim": 16})
    (told,) = quantizer.forecast(steps=9, tokens=16)
    assert "a pass has 16 tokens of all ranks and latents have 16 dimensions" in told
    assert quantizer.forecast(9, 17) == []


def test_pages_say_that_codes_never_began():
    numbers = {"steps": 8, "codes_begin": 100, "codes_landed": 100, "usage": 0.9, "perplexity": 60, "num_codes": 64}
    assert "Its codes never began" in run_page.unbegun(numbers)
    assert "Its codes never landed" in run_page.unbegun({**numbers, "codes_begin": 2})
    assert run_page.unbegun({**numbers, "steps": 101}) == ""
    assert run_page.unbegun({"steps": 8}) == ""  # a summary of before
    verdict = study_page.TASKS["tokenizer"].verdict
    assert verdict(numbers) == "codes never began: the warm-up of 100 steps is not over in 8"
    assert verdict({**numbers, "steps": 101}) == "in use"


def test_a_run_is_not_continued_with_another_fit(tmp_path):
    def run(quantizer):
        data = {"train": {"shards": "none.tar", "image_size": 16}}
        place = {"folder": str(tmp_path / "run")}
        return configuration.parse(TokenizerRun, {"run": place, "data": data, "tokenizer": {"quantizer": quantizer}})

    fsq = {"name": "fsq", "levels": [5, 5, 5]}
    ibq = {"name": "ibq", "warmup_steps": 10}
    for before, after, key in (
        (fsq, {**fsq, "fit": "none"}, "fit"),
        (fsq, {**fsq, "whiten_decay": 0.5}, "whiten_decay"),
        (ibq, {**ibq, "init": "normal"}, "init"),
        (ibq, {**ibq, "warmup_steps": 20}, "warmup_steps"),
        (ibq, {**ibq, "landing_steps": 20}, "landing_steps"),
    ):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "run.yaml").write_text(configuration.dump(run(before)))
        folder.check(run(before))
        with pytest.raises(ValueError, match=f"another config(.|\n)*tokenizer.quantizer.{key}"):
            folder.check(run(after))


# The same fit on every grid.

FITTED = [case for case in QUANTIZERS if not hasattr(built(case), "columns")]
NESTED = {
    "residual of vq": {"name": "residual", "levels": 2, "stagger": 1, "inner": settings("vq")},
    "residual of fsq": {"name": "residual", "levels": 2, "scale": 0.5, "inner": settings("fsq")},
    "grouped ema": {"name": "grouped", "groups": 2, "inner": {**settings("ema"), "dim": DIM // 2}},
    "grouped lfq": {"name": "grouped", "groups": 2, "inner": {"name": "lfq", "dim": DIM // 2}},
}


def _configs():
    for case in FITTED:
        config = settings(case)
        yield case, config
    yield from NESTED.items()


def _fitted(data, codes):
    """{(case, type): (whole tables, what is replicated, fits, ids of other tokens)} after five driven steps."""
    mesh, out = Mesh(data, codes), {}
    for dtype in (torch.float32, torch.float64):
        for case, config in _configs():
            quantizer, told = _driven(_soon(config), mesh).to(dtype), {}
            tables = set_aside(quantizer)
            for step, x in enumerate(_batches(DIM, 5, scale=0.3)):
                quantizer(mine(x.to(dtype) + 1.0, mesh))
                quantizer.update()
                told |= {f"{step} {name}": fit.numbers() for name, fit in quantizer.fits().items()}
            rows = {f"{name}.{key}": x for name, part in tables.items() for key, x in part.state_dict().items()}
            whole = {key: torch.cat(ops.gather_objects(x, mesh.codes)) for key, x in rows.items()}
            ids = quantizer.eval().encode(_batches(DIM, 9, scale=0.3)[-1].to(dtype) + 1.0)
            out[case, dtype] = whole, {key: x.clone() for key, x in quantizer.state_dict().items()}, told, ids
    return out


@pytest.mark.parametrize("grid", GRIDS[2:])
def test_every_quantizer_fits_the_same_on_one_process_and_on_four(ranks, grid):
    """To 1e-10 in float64, counts exactly; the ids of float32 are equal."""
    alone = _fitted(1, 1)
    for other in ranks(grid[0] * grid[1], _fitted, *grid, timeout_s=240.0):
        for (case, dtype), (tables, replicated, told, ids) in alone.items():
            its_tables, its_replicated, its_told, its_ids = other[case, dtype]
            assert torch.equal(its_ids, ids), case
            assert told, case
            assert its_told.keys() == told.keys()
            if dtype == torch.float64:
                torch.testing.assert_close(its_tables, tables, rtol=1e-10, atol=1e-10)
                torch.testing.assert_close(its_replicated, replicated, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_a_run_whose_warm_up_is_longer_says_so_at_its_start_and_in_its_summary_and_goes_on(tmp_path, tiny_shards):
    quantizer = "tokenizer.quantizer={name: vq, num_codes: 2000, dim: 8, warmup_steps: 3}"
    path = jobs.write_config(tmp_path, tiny_shards, quantizer, "run.steps=2")
    run = jobs.finish(path)
    assert "warning: no step of this run trains with codes: they begin after a warm-up of 3 steps" in _log(path)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["codes_begin"], summary["codes_landed"], summary["steps"]) == (3, 3, 2)
    assert [row["codes/landing"] for row in jobs.rows(run) if "loss" in row] == [0.0, 0.0]
    jobs.finish(path, "run.steps=4")
    log = _log(path)
    assert "the 3 steps of the warm-up x 128 tokens = 384 that rows are drawn from" in log
    assert "step 3, fit: 384 rows drawn from 384 tokens of all ranks" in log
    assert "the other 1,616 of 2,000 rows had no token and are normal" in log
    assert [row["codes/landing"] for row in jobs.rows(run) if "loss" in row] == [0.0, 0.0, 0.0, 1.0]


def _log(path):
    """What the last start of a run said, in one line."""
    return " ".join((path.parent / "log.txt").read_text().split())
