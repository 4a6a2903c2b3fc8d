"""Learning rate and weight decay against points worked out by hand, and the configuration's own complaints."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vqscale.engine.config import EngineConfig, OptimConfig
from vqscale.engine.schedule import decay_share, learning_rate
from vqscale.parallel.config import MeshConfig


def test_warm_up_grows_evenly_to_the_peak():
    config = OptimConfig(lr=1.0, schedule="constant", warmup_steps=4)
    assert [learning_rate(s, config, 100) for s in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert learning_rate(0, OptimConfig(lr=1.0, schedule="constant"), 100) == 1.0


def test_cosine_goes_from_the_peak_to_the_final_factor():
    config = OptimConfig(lr=2.0, schedule="cosine", warmup_steps=10, final_factor=0.1)
    assert learning_rate(10, config, 111) == pytest.approx(2.0)
    assert learning_rate(60, config, 111) == pytest.approx(2.0 * 0.55)  # half way: the mean of 1 and 0.1
    assert learning_rate(110, config, 111) == pytest.approx(0.2)
    assert learning_rate(500, config, 111) == pytest.approx(0.2)
    rates = [learning_rate(s, config, 111) for s in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_cosine_of_a_run_shorter_than_its_warm_up_is_defined():
    config = OptimConfig(lr=1.0, schedule="cosine", warmup_steps=10)
    assert learning_rate(2, config, 3) == pytest.approx(3 / 11)
    assert learning_rate(0, OptimConfig(lr=1.0, schedule="cosine"), 1) == 1.0


def test_linear_stays_and_then_falls_straight():
    config = OptimConfig(lr=2.0, schedule="linear", warmup_steps=10, flat_share=0.2, final_factor=0.1)
    rates = [learning_rate(s, config, 111) for s in (9, 10, 30, 70, 110, 500)]
    assert rates == pytest.approx([2.0 * 10 / 11, 2.0, 2.0, 2.0 * 0.55, 0.2, 0.2])


def test_steps_drop_at_their_step():
    config = OptimConfig(lr=1.0, schedule="steps", drop_steps=(5, 8), drop_factor=0.5, warmup_steps=2)
    assert [learning_rate(s, config, 10) for s in (1, 2, 4, 5, 7, 8, 99)] == pytest.approx(
        [2 / 3, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    )


def test_weight_decay_goes_to_its_final_value_along_half_a_cosine():
    assert [decay_share(s, 101) for s in (0, 25, 50, 75, 100, 500)] == pytest.approx(
        [0.0, 0.5 - 0.5**1.5, 0.5, 0.5 + 0.5**1.5, 1.0, 1.0]
    )
    assert decay_share(0, 101) == decay_share(0, 1) == 0  # the first step has the first value, in a run of one step too


@pytest.mark.parametrize(
    ("data", "codes", "world", "expected"),
    [(None, None, 8, (1, 8)), (2, None, 8, (2, 4)), (None, 4, 8, (2, 4)), (2, 4, 8, (2, 4)), (None, None, 1, (1, 1))],
)
def test_the_mesh_is_derived_from_what_is_given(data, codes, world, expected):
    assert MeshConfig(data, codes).resolve(world) == expected


def test_a_mesh_that_does_not_fit_says_what_to_change():
    with pytest.raises(ValueError, match=r"data 2 x codes 4 = 8 processes, but 6 were started: change mesh.data"):
        MeshConfig(2, 4).resolve(6)
    with pytest.raises(ValueError, match=r"mesh.data 4 does not divide the 6 processes .* change mesh.data"):
        MeshConfig(4, None).resolve(6)
    with pytest.raises(ValueError, match=r"mesh.codes 5 does not divide the 6 processes"):
        MeshConfig(None, 5).resolve(6)


def test_problems_are_named_by_key_and_defaults_have_none():
    assert not [*MeshConfig().problems(), *EngineConfig().problems(), *OptimConfig().problems()]
    assert [key for key, _ in MeshConfig(0, -1).problems()] == ["data", "codes"]
    engine = EngineConfig(accumulation=0, clip_norm=-1.0, max_skipped=-1, timeout_s=0)
    assert [key for key, _ in engine.problems()] == ["accumulation", "clip_norm", "max_skipped", "timeout_s"]
    optim = OptimConfig(lr=0, betas=(0.9, 1.0), schedule="steps", rows_lr_factor=-1)
    assert [key for key, _ in optim.problems()] == ["lr", "rows_lr_factor", "betas", "drop_steps"]
    decays = OptimConfig(weight_decay=-1, rows_weight_decay=-1, final_weight_decay=-1)
    assert [key for key, _ in decays.problems()] == ["weight_decay", "rows_weight_decay", "final_weight_decay"]
    ((key, message),) = OptimConfig(final_weight_decay=0.08).problems()
    assert (key, message.split(":")[0]) == (
        "final_weight_decay",
        "final_weight_decay 0.08 is where a decay goes, but weight_decay and rows_weight_decay are 0, which stays 0",
    )
    assert not [*OptimConfig(rows_weight_decay=0.05, final_weight_decay=0.0).problems()]
    assert [key for key, _ in OptimConfig(schedule="steps", drop_steps=(9, 3)).problems()] == ["drop_steps"]
    assert [key for key, _ in OptimConfig(drop_steps=(3,)).problems()] == ["drop_steps"]


def test_the_configuration_does_not_import_torch():
    code = "import sys, vqscale.parallel.config, vqscale.engine.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
