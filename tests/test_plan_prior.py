"""`vqscale plan` of priors: what a step holds, sends and takes on GPUs, at 2^18 ids, for every kind of prior."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from vqscale import config as configuration
from vqscale.plan import prior_step
from vqscale.plan.machines import MACHINES
from vqscale.plan.prior import plan
from vqscale.plan.traffic import Grid
from vqscale.programs.commands import plan as command
from vqscale.train.config.prior import PriorRun

PRIORS = Path(__file__).parent.parent / "configs" / "prior"
KINDS = {
    "flat": ["ibq_B_262144.yaml"],
    "factorised": ["openmagvit2_B.yaml"],
    "bits": ["ibq_B_262144.yaml", "prior.head={name: bits, width: 256}"],
    "coarse-to-fine": ["ctf_B.yaml", "--codes", "262144"],
    "masked": ["halton_small.yaml", "--codes", "262144"],
}


@pytest.fixture(scope="module")
def priced():
    """What the command says of each kind on 2 GPUs, by kind."""
    return {
        kind: command.plan(command.arguments([str(PRIORS / name), *words, "--gpus", "2"]))["json"]
        for kind, (name, *words) in KINDS.items()
    }


@pytest.fixture(scope="module")
def config():
    return configuration.load(PriorRun, PRIORS / "ibq_B_262144.yaml")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_priced_at_2_18_on_2_gpus(priced, kind):
    operations, steps, split = priced[kind]["operations"], priced[kind]["steps"], kind != "bits"  # those have no rows
    assert [(step["data"], step["codes"]) for step in steps] == [(2, 1), (1, 2)]
    for step in steps:
        assert step["step_s"] == pytest.approx(sum(step["seconds"].values()))
        network = 32 * operations["training: transformer"] / (MACHINES["h200"].tflops["bf16"] * 1e12)
        assert step["seconds"]["network"] > 0.99 * network, "products at their rate are the least"
        assert step["products"] == 32 * operations["training: head"]
        assert (step["sent"]["codes"] > 0) == (step["codes"] > 1 and split)
        assert (step["sent"]["data"] > 0) == (step["data"] > 1 and split)


def test_a_flat_head_of_2_18_outweighs_the_others(priced):
    share = {kind: found["steps"][0]["code_axis_share"] for kind, found in priced.items()}
    assert share["flat"] > 0.5, "in float32, on a base model"
    assert share["coarse-to-fine"] < 0.1
    assert share["factorised"] < share["flat"]
    assert share["bits"] < share["flat"]


def test_memory_and_bytes_are_those_of_the_dry_run(config):
    step = prior_step.work(config)
    steps = prior_step.predict(config, 4, 2, MACHINES["h100"], step)
    assert {found.grid for found in steps} == {Grid(2, 1), Grid(1, 2)}
    for found in steps:
        mesh = replace(config.mesh, data=found.grid.data, codes=found.grid.codes)
        run = replace(config, mesh=mesh, data=replace(config.data, batch=4 * 2 * config.engine.accumulation))
        costs = plan(run, 2)
        assert found.memory == costs.memory
        assert sorted(found.sent.values()) == sorted(costs.sent.values())


def test_the_head_is_as_fast_as_its_products_may_be():
    machine = MACHINES["h200"]
    rate = machine.tflops
    assert prior_step.head_seconds(3 * 10**12, "highest", machine) == pytest.approx(3 / rate["fp32"])
    assert prior_step.head_seconds(3 * 10**12, "high", machine) == pytest.approx(1 / rate["fp32"] + 2 / rate["tf32"])
    assert prior_step.head_seconds(3 * 10**12, "medium", machine) == pytest.approx(3 / rate["bf16"])


def test_text_says_the_split_and_what_drawing_takes(capsys):
    assert command.main([str(PRIORS / "ibq_B_262144.yaml"), "--gpus", "2", "engine.matmul=medium"]) == 0
    text = capsys.readouterr().out
    assert "autoregressive prior, K 262,144" in text
    assert "sampling" in text
    assert "2 GPUs: mesh.codes=" in text


def test_a_width_of_rows_is_refused(capsys):
    assert command.main([str(PRIORS / "ibq_B_262144.yaml"), "--dim", "8"]) == 2
    assert "leave --dim out" in capsys.readouterr().err
