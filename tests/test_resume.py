"""Runs that are killed, stopped and moved to other processes end like one that nothing happened to.

To the bit on the same number of processes: every number that was logged, every tensor of the last checkpoint.
Everything that has state is at work: dropout, moments, warm-up of the codes, revival, the window of counts, an order of
samples that is left in the middle of an epoch.
"""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path

import jobs
import pytest

from vqscale.disk import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.dist]

DROPOUT = "tokenizer.net.dropout=0.1"
KEEP_ONE = "run.keep=1"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_shards):
    """whole(world, *overrides): the uninterrupted run, made once."""
    made = {}

    def run(world, *overrides):
        if (world, overrides) not in made:
            path = jobs.write_config(tmp_path_factory.mktemp("whole"), tiny_shards, *overrides)
            made[world, overrides] = jobs.finish(path, world=world)
        return made[world, overrides]

    return run


def _saved(run):
    """(steps of finished checkpoints, other names beside them)"""
    names = [path.name for path in (run / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit()), sorted(n for n in names if not n.isdigit())


def _tear(rank):
    """Die within the line of step 7 of metrics.jsonl."""
    from vqscale.show.board import Board

    original = Board.scalars

    def scalars(self, step, values):
        if step == 7 and rank == 0:
            self._rows.write('{"step": 7, "tim')
            self._rows.flush()
            jobs.hear(signal.SIGKILL)
        original(self, step, values)

    Board.scalars = scalars


def _dies(target, call, rank):
    return partial(jobs.at_call, target, call, partial(jobs.hear, signal.SIGKILL), rank)


# In this order: (where a rank dies, more of the command, whether the checkpoint in the making stands then)
DEATHS = {
    "in the backward pass of step 3": (_dies("vqscale.engine.engine:Engine.backward", 3, 1), (), None),
    "half its rows written": (_dies("vqscale.disk.writer:_write_rows", 3, 1), (), False),
    "nothing told of what is written": (_dies("vqscale.disk.writer:_share_file", 1, 1), (), False),
    "before the manifest": (_dies("vqscale.disk.manifest:write", 1, 0), (), False),
    "before the checkpoint is renamed": (_dies("vqscale.disk.files:place", 1, 0), (), False),
    "after it is renamed": (_dies("vqscale.disk.writer:finished", 1, 0), (KEEP_ONE,), True),
    "while old ones are removed": (_dies("vqscale.disk.files:set_aside", 1, 0), (KEEP_ONE,), True),
    "within a line of metrics": (_tear, (), None),
    "in the last evaluation": (_dies("vqscale.show.pictures:usage", 1, 0), (), None),
    "before the summary": (_dies("vqscale.run.folder:write_summary", 1, 0), (), None),
}


def test_a_run_that_dies_everywhere_ends_like_one_that_never_did(tmp_path, tiny_shards, whole):
    path, run = jobs.write_config(tmp_path, tiny_shards, DROPOUT), tmp_path / "run"
    newest = 0
    for place, (death, more, stands) in DEATHS.items():
        job = jobs.start(path, *more, world=2, before=death)
        codes = job.wait()
        assert -9 in codes, f"{place}: exit codes {codes}:\n{job.output}"
        assert (f"going on after step {newest}" if newest else "a new run") in job.output, place
        standing, left = _saved(run)
        before, newest = newest, max(standing, default=0)
        if stands is not None:
            assert newest == (before + 2 if stands else before), place
            assert stands or any(name.startswith(f"{before + 2:010d}.") for name in left), place
        assert newest >= before, place
        assert checkpoint.latest(run / "checkpoints")[1] == [], place
        assert not (run / "summary.json").exists()
    assert newest == 8
    jobs.finish(path, world=2)
    expected = whole(2, DROPOUT)
    jobs.same_bits(expected, run, 8)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (expected, run)]
    for name in ("psnr", "ssim", "usage", "perplexity", "num_codes", "steps", "processes", "quantizer"):
        assert summaries[0][name] == summaries[1][name]


@pytest.mark.parametrize("name", ["vq", "ema"])
def test_other_quantizers_go_on_to_the_bit(tmp_path, tiny_shards, whole, name):
    upkeep = "warmup_steps: 2, revive_every: 2, revive_after: 1, revive_below: 0.5, revive_most: 16"
    quantizer = f"tokenizer.quantizer={{name: {name}, num_codes: 101, dim: 8, {upkeep}}}"
    path = jobs.write_config(tmp_path, tiny_shards, quantizer)
    job = jobs.start(path, before=_dies("vqscale.engine.engine:Engine.backward", 6, 0))
    assert job.wait() == [-9]
    jobs.same_bits(whole(1, quantizer), jobs.finish(path), 8)


ROWS = "warmup_steps: 2, landing_steps: 2, revive_every: 2, revive_after: 1, revive_below: 0.5, revive_most: 16"
BEGINNINGS = {
    "ibq": (f"name: ibq, num_codes: 101, dim: 8, similarity: euclid, {ROWS}", 2, "101 rows drawn from 128 tokens"),
    "simvq": (f"name: simvq, num_codes: 101, dim: 8, {ROWS}", 2, "101 rows drawn from 128 tokens"),
    "fsq": ("name: fsq, levels: [5, 4, 3]", 1, "128 tokens of all ranks whitened"),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_killed_in_the_warm_up_at_the_fit_and_after_it_a_run_goes_on_to_the_bit(tmp_path, tiny_shards, name):
    """And its log says once what was fitted; a fit that is done again after a kill is said again."""
    quantizer, at, told = BEGINNINGS[name]
    more = (f"tokenizer.quantizer={{{quantizer}}}", "run.checkpoint_every=1", "run.steps=6", "run.eval_every=6")
    whole = jobs.write_config(tmp_path / "whole", tiny_shards, *more)
    path, run = jobs.write_config(tmp_path / "killed", tiny_shards, *more), tmp_path / "killed" / "run"
    backward, fits = "vqscale.engine.engine:Engine.backward", "vqscale.train.loop:tell_fits"
    # (call of this start before which it is killed, steps that are saved then)
    for target, call, saved in ((backward, at, at - 1), (fits, 1, at - 1), (backward, 3, at + 1)):
        job = jobs.start(path, before=partial(jobs.saved_at_once, _dies(target, call, 0)))
        assert job.wait() == [-9], job.output
        assert (max(_saved(run)[0]) if (run / "checkpoints").exists() else 0) == saved
    jobs.finish(path)
    jobs.same_bits(jobs.finish(whole), run, 6)
    fitted = [row for row in jobs.rows(run) if "fit/tokens" in row]
    assert [row["step"] for row in fitted] == [at]
    assert fitted[0]["fit/tokens"] == 128
    log = (tmp_path / "whole" / "log.txt").read_text()
    assert log.count(f"step {at}, fit: {told}") == 1


def test_the_survivor_of_a_killed_rank_says_so_and_leaves(tmp_path, tiny_shards):
    path = jobs.write_config(tmp_path, tiny_shards)
    job = jobs.start(path, world=2, before=_dies("vqscale.engine.engine:Engine.backward", 3, 1))
    assert job.wait() == [1, -9]
    assert "[rank 0 of 2] error: lost another rank" in job.output
    assert "Traceback" not in job.output


def test_torchrun_killed_terminated_and_started_again(tmp_path, tiny_shards, whole):
    """kill -9 of one rank, kill -9 of everything, SIGTERM to torchrun, the same command each time; then the end."""
    longer = ("run.steps=60", "run.checkpoint_every=5", "run.eval_every=60", "run.keep=2", DROPOUT)
    path, run = jobs.write_config(tmp_path, tiny_shards, *longer), tmp_path / "run"

    def until(step):
        process = jobs.torchrun(2, path)
        jobs.wait_for(lambda: (run / "checkpoints" / f"{step:010d}").exists() or process.poll() is not None)
        assert process.poll() is None, process.communicate()[0]
        return process, jobs.descendants(process.pid)

    process, started = until(5)
    jobs.kill([pid for pid in started if b"launch/train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()][:1])
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    jobs.wait_for(lambda: not jobs.alive(started))

    process, started = until(_saved(run)[0][-1] + 5)
    jobs.kill([process.pid, *started])
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL

    process, started = until(_saved(run)[0][-1] + 5)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1  # torchrun's; that of the processes is 75
    assert "asked to stop (SIGTERM): saved step" in output
    assert not (run / "summary.json").exists()
    jobs.wait_for(lambda: not jobs.alive(started))

    jobs.finish(path, world=2)
    jobs.same_bits(whole(2, *longer), run, 60)


def test_signals_and_a_file_stop_at_a_step_and_the_run_goes_on(tmp_path, tiny_shards, whole):
    path, run = jobs.write_config(tmp_path, tiny_shards, DROPOUT), tmp_path / "run"
    backward = "vqscale.engine.engine:Engine.backward"
    stops = [
        (partial(jobs.at_call, backward, 3, partial(jobs.hear, signal.SIGUSR1), 1), 3),  # one rank of two hears it
        (partial(jobs.at_call, backward, 2, partial(jobs.hear, signal.SIGTERM), 0), 5),
        (partial(jobs.at_call, backward, 1, partial(Path.touch, run / "STOP"), 0), 6),
        (partial(jobs.at_call, backward, 1, partial(jobs.hear, signal.SIGUSR2), 0), 7),
    ]
    for stop, step in stops:
        job = jobs.start(path, world=2, before=stop)
        assert job.wait() == [jobs.STOPPED] * 2, job.output
        assert "asked to stop" in job.output
        assert f"saved step {step}; run it again to go on" in job.output
        assert _saved(run)[0][-1] == step
        assert jobs.rows(run)[-1]["step"] == step
        assert not (run / "STOP").exists()
    jobs.finish(path, world=2)
    jobs.same_bits(whole(2, DROPOUT), run, 8)


@pytest.mark.parametrize(("world", "more"), [(1, ()), (4, ("mesh.data=2",)), (1, ("engine.name=deepspeed",))])
def test_stopped_on_two_processes_and_continued_on_others(tmp_path, tiny_shards, whole, world, more):
    path = jobs.write_config(tmp_path, tiny_shards)
    stop = partial(jobs.at_call, "vqscale.engine.engine:Engine.backward", 5, partial(jobs.hear, signal.SIGTERM), 0)
    assert jobs.start(path, world=2, before=stop).wait() == [jobs.STOPPED] * 2
    assert _saved(tmp_path / "run")[0][-1] == 5
    jobs.same_numbers(whole(2), jobs.finish(path, *more, world=world))


@pytest.mark.parametrize(("first", "then"), [(0, 2), (2, 0)])
def test_workers_and_a_resume_within_an_epoch_change_nothing(tmp_path, tiny_shards, whole, first, then):
    path = jobs.write_config(tmp_path, tiny_shards, DROPOUT)
    death = _dies("vqscale.engine.engine:Engine.backward", 6, 0)
    assert jobs.start(path, f"data.train.num_workers={first}", before=death).wait() == [-9]
    run = jobs.finish(path, f"data.train.num_workers={then}", f"data.val.num_workers={then}")
    jobs.same_bits(whole(1, DROPOUT), run, 8)


def test_more_steps_after_the_end(tmp_path, tiny_shards):
    """A finished run goes on when run.steps is raised, and its summary is a new one."""
    same = ("optim.schedule=constant", "run.eval_images=0")  # nothing that the number of steps changes
    path = jobs.write_config(tmp_path / "a", tiny_shards, *same, "run.steps=4")
    run = jobs.finish(path)
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
    jobs.finish(path, "run.steps=8")
    other = jobs.finish(jobs.write_config(tmp_path / "b", tiny_shards, *same))
    jobs.same_bits(other, run, 8)
    assert json.loads((run / "summary.json").read_text())["steps"] == 8
