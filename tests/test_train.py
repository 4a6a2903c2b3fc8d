"""Whole runs: what they leave behind, and that mesh, engine and accumulation do not change what is computed."""

from __future__ import annotations

import json
import math

import jobs
import pytest

from vqscale import config as configuration
from vqscale.plan import operations_of
from vqscale.train.config import Run

pytestmark = [pytest.mark.slow, pytest.mark.dist]

UPKEEP = "warmup_steps: 2, revive_every: 2, revive_after: 1, revive_below: 0.5, revive_most: 16"
TABLE = f"num_codes: 101, dim: 8, {UPKEEP}"
# One whose rows no optimiser steps and one of several ids per token, beside ibq, which the other tests have. What all
# quantizers promise on several processes is in test_quantizers.py, in milliseconds.
OTHERS = {
    "ema": f"tokenizer.quantizer={{name: ema, {TABLE}}}",
    "residual": f"tokenizer.quantizer={{name: residual, levels: 2, inner: {{name: vq, {TABLE}}}}}",
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_shards):
    """The run that all others are compared with: plain torch, one process."""
    return jobs.finish(jobs.write_config(tmp_path_factory.mktemp("alone"), tiny_shards))


def test_torchrun_and_deepspeed_on_two_processes(tmp_path, tiny_shards, alone):
    path = jobs.write_config(tmp_path, tiny_shards, "engine.name=deepspeed", "engine.zero_stage=1")
    process = jobs.torchrun(2, path)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    run = tmp_path / "run"
    jobs.same_numbers(alone, run)
    _check_folder(run, path)

    before = jobs.contents(run)
    again = jobs.start(path, "engine.name=torch", world=2)  # an engine of another kind, which starts sooner
    assert again.wait() == [0, 0], again.output
    assert f"the run in {run} is done: 8 steps" in again.output
    assert jobs.contents(run) == before


def _check_folder(run, path):
    """The folder of a finished run of the config in `path` on two processes."""
    config = configuration.load(Run, path)
    assert configuration.load(Run, run / "run.yaml") == config
    assert {"command.txt", "commit.txt", "diff.patch", "versions.json"} <= {p.name for p in (run / "code").iterdir()}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert all(math.isfinite(x) for row in rows for x in row.values())
    logged = {"loss", "loss/l2", "loss/commitment", "codes/usage", "codes/perplexity", "codes/dead", "lr", "grad_norm"}
    logged |= {"skipped", "broken", "time/images_per_s", "time/data_wait", "time/step_s", "time/code_axis_share"}
    logged |= {"time/operations_per_s", "time/peak_share", "time/memory_mib"}
    assert logged <= rows[-2].keys()
    assert {"val/psnr", "val/ssim", "val/usage", "val/perplexity"} <= rows[-1].keys()
    assert rows[4]["val/images"] == 8  # run.eval_images; the last evaluation takes all
    assert rows[-1]["val/images"] == jobs.NUM_VAL

    summary = json.loads((run / "summary.json").read_text())
    assert summary["num_codes"] == 101
    assert summary["steps"] == 8
    assert summary["processes"] == 2
    for name in ("psnr", "ssim", "usage", "perplexity"):
        assert summary[name] == rows[-1][f"val/{name}"]
    assert 0 < summary["usage"] <= 1 < summary["perplexity"] <= 101
    assert summary["images_per_s"] > 0
    assert summary["operations_per_s"] == pytest.approx(summary["images_per_s"] * operations_of(config))
    assert 0 < summary["peak_share"] < 2, "a step of small convolutions is no faster than two processes' products"
    assert 0 < summary["code_axis_share"] < 1
    assert 0 < rows[0]["time/memory_mib"] <= rows[-2]["time/memory_mib"] <= summary["memory_mib"]
    pictures = sorted(file.relative_to(run / "samples").as_posix() for file in (run / "samples").rglob("*.png"))
    assert pictures == [f"{kind}/{step:010d}.png" for kind in ("reconstructions", "usage") for step in (4, 8)]
    assert all(file.stat().st_size > 500 for file in (run / "samples").rglob("*.png"))
    assert sum(file.stat().st_size for file in (run / "tb").glob("events*")) > 10_000
    assert jobs.steps_saved(run) == [2, 4, 6, 8]


@pytest.mark.parametrize(("world", "stage"), [(1, 2), (2, 3)])
def test_deepspeed_and_plain_torch_compute_the_same(tmp_path, tiny_shards, alone, world, stage):
    path = jobs.write_config(tmp_path, tiny_shards, "engine.name=deepspeed", f"engine.zero_stage={stage}")
    jobs.same_numbers(alone, jobs.finish(path, world=world))


@pytest.mark.parametrize(("data", "codes"), [(2, 1), (2, 2), (1, 4)])
def test_a_global_batch_gives_the_same_run_on_any_mesh(tmp_path, tiny_shards, alone, data, codes):
    path = jobs.write_config(tmp_path, tiny_shards, f"mesh.data={data}", f"mesh.codes={codes}")
    jobs.same_numbers(alone, jobs.finish(path, world=data * codes))


@pytest.mark.parametrize("name", OTHERS)
def test_other_quantizers_compute_the_same_on_two_processes(tmp_path, tiny_shards, name):
    path = jobs.write_config(tmp_path / "1", tiny_shards, OTHERS[name])
    other = jobs.write_config(tmp_path / "2", tiny_shards, OTHERS[name])
    jobs.same_numbers(jobs.finish(path), jobs.finish(other, world=2))


def test_renewed_codes_begin_without_moments(tmp_path, tiny_shards):
    run = jobs.finish(jobs.write_config(tmp_path, tiny_shards, "run.checkpoint_every=1"))
    rows = "quantizer.codebook.rows"
    renewed = {}
    for step in jobs.steps_saved(run):
        found = jobs.tensors(run, step)
        new_K = found["rows/quantizer.upkeep.window.age_k"] == 0
        for moment in ("exp_avg", "exp_avg_sq"):
            old_KD = found[f"rows/{moment}/{rows}"]
            assert (old_KD[new_K] == 0).all()
            assert step <= 2 or (old_KD[~new_K] != 0).any(dim=1).all()  # all others have learned: IBQ reaches all rows
        renewed[step] = int(new_K.sum())
    assert renewed[1] == renewed[2] == 101  # the warm-up
    assert [step for step in range(3, 9) if 0 < renewed[step] < 101] == [3, 5, 7]  # revival


def test_micro_batches_add_up_to_the_batch(tmp_path, tiny_shards):
    # Revival takes its candidates from the last micro-batch, and the entropy of a mean is not a mean of entropies.
    upkeep = ["tokenizer.quantizer.init=uniform", "tokenizer.quantizer.revive_every=0"]
    upkeep.append("tokenizer.quantizer.entropy_weight=0")
    path = jobs.write_config(tmp_path / "1", tiny_shards, *upkeep)
    other = jobs.write_config(tmp_path / "2", tiny_shards, *upkeep, "engine.accumulation=2")
    whole, added = jobs.finish(path), jobs.finish(other, world=2)
    jobs.same_numbers(whole, added)
