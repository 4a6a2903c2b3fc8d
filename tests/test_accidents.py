"""What goes wrong around a run: damaged shards and checkpoints, full disks, numbers that are not finite, no compiler.

A run either goes on and says so, or ends on all ranks with a message; what was good on the disk stays good.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
from functools import partial

import jobs
import pytest


def _shards(tiny_shards, folder, damage):
    """A copy of the shards in which the bytes of train-1.tar went through `damage`."""
    shutil.copytree(tiny_shards, folder, ignore=shutil.ignore_patterns("index"))
    path = folder / "train-1.tar"
    path.write_bytes(damage(path.read_bytes()))
    return folder


def _flip(tar, every=2):
    """Flip the bytes of every second image."""
    flipped = bytearray(tar)
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        images = [member for member in opened if member.name.endswith(".png")]
    for member in images[::every]:
        end = member.offset_data + member.size
        flipped[member.offset_data : end] = bytes(255 - byte for byte in tar[member.offset_data : end])
    return bytes(flipped)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "least", "most"),
    # Whatever is lost of a shard counts once. Of the 64 samples of 8 steps a quarter have flipped bytes: six in each of
    # two epochs, and those that come early in the third.
    [(lambda tar: tar[: len(tar) // 2], 1, 1), (lambda tar: b"", 1, 1), (_flip, 12, 18)],
)
def test_damaged_shards_are_counted_and_the_run_goes_on(tmp_path, tiny_shards, damage, least, most):
    shards = _shards(tiny_shards, tmp_path / "shards", damage)
    run = jobs.finish(jobs.write_config(tmp_path, shards))
    counted = [row["broken"] for row in jobs.rows(run) if "broken" in row]
    assert counted == sorted(counted)
    assert least <= counted[-1] <= most
    assert all(math.isfinite(x) for row in jobs.rows(run) for x in row.values())


@pytest.mark.slow
@pytest.mark.dist
def test_too_many_broken_samples_end_the_run_on_all_ranks(tmp_path, tiny_shards):
    shards = _shards(tiny_shards, tmp_path / "shards", _flip)
    path = jobs.write_config(tmp_path, shards, "run.checkpoint_every=1")
    job = jobs.start(path, "data.train.max_broken=4", world=2)
    assert job.wait() == [1, 1]
    for rank in (0, 1):
        assert f"[rank {rank} of 2] error: " in job.output
    assert "samples were broken, data.train.max_broken is 4: repair or leave out the shards named" in job.output
    assert f"{shards}/train-1.tar 000" in job.output
    assert "Traceback" not in job.output
    last = jobs.steps_saved(tmp_path / "run")[-1]
    assert last == jobs.rows(tmp_path / "run")[-1]["step"]
    assert jobs.finish(path, world=2)  # with the limit of before it goes on


@pytest.mark.slow
@pytest.mark.dist
def test_nothing_but_broken_samples(tmp_path, tiny_shards):
    shards = _shards(tiny_shards, tmp_path / "shards", partial(_flip, every=1))
    path = jobs.write_config(tmp_path, shards, f"data.train.shards={shards}/train-1.tar", "data.train.max_broken=3")
    job = jobs.start(path, world=2)
    assert job.wait() == [1, 1]
    assert "max_broken" in job.output
    assert "Traceback" not in job.output


@contextlib.contextmanager
def _small_disk(folder, size):
    """A file system of its own on the folder; skipped where that is not allowed."""
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_shards):
    """The run on one process to which nothing happened."""
    return jobs.finish(jobs.write_config(tmp_path_factory.mktemp("whole"), tiny_shards))


@pytest.mark.slow
@pytest.mark.dist
def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on(tmp_path, tiny_shards):
    path, run = jobs.write_config(tmp_path, tiny_shards), tmp_path / "run"
    with _small_disk(run, "640k"):  # room for one checkpoint and a half
        job = jobs.start(path, world=2)
        assert job.wait() == [1, 1]
        assert "the checkpoint of step 4 was not written: rank 0: OSError: [Errno 28] No space left" in job.output
        assert f"The last good one stands: {run}/checkpoints/0000000002. Make room under {run}/checkpoi" in job.output
        assert "Traceback" not in job.output
        assert [entry.name for entry in (run / "checkpoints").iterdir()] == ["0000000002"]
        subprocess.run(["mount", "-o", "remount,size=20m", str(run)], check=True)
        jobs.finish(path, world=2)
        other = jobs.finish(jobs.write_config(tmp_path / "other", tiny_shards), world=2)
        jobs.same_bits(other, run, 8)


@pytest.mark.slow
def test_a_disk_that_is_full_from_the_start(tmp_path, tiny_shards):
    path = jobs.write_config(tmp_path, tiny_shards)
    with _small_disk(tmp_path / "run", "4k"):
        job = jobs.start(path)
        assert job.wait() == [1]
        assert "No space left on device" in job.output
        assert "a disk is full; make room, and the same command goes on from what is finished" in job.output
        assert "Traceback" not in job.output


def _flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.slow
def test_damaged_checkpoints_are_passed_over(tmp_path, tiny_shards, whole):
    half, run = jobs.stopped(tmp_path, tiny_shards), tmp_path / "run"
    saved = run / "checkpoints"
    _flip_byte(saved / "0000000005" / "ranges" / "00000.safetensors")
    next((saved / "0000000004" / "rows" / "parameter").rglob("c.*")).unlink()
    jobs.finish(half)
    output = (tmp_path / "log.txt").read_text()
    assert f"passed over the checkpoint {saved}/0000000005: ranges/00000.safetensors was changed after" in output
    assert f"passed over the checkpoint {saved}/0000000004: rows/parameter/" in output
    assert f"going on after step 2 of {saved}/0000000002" in output
    jobs.same_bits(whole, run, 8)


@pytest.mark.slow
def test_a_run_without_a_whole_checkpoint_does_not_begin_again_by_itself(tmp_path, tiny_shards):
    half, run = jobs.stopped(tmp_path, tiny_shards), tmp_path / "run"
    for step in (2, 4, 5):
        (run / "checkpoints" / f"{step:010d}" / "facts.json").unlink()
    before = jobs.contents(run)
    job = jobs.start(half)
    assert job.wait() == [2]
    assert f"none of the 3 checkpoints in {run}/checkpoints is whole" in job.output
    assert "facts.json cannot be read (No such file or directory)" in job.output
    assert "put one back, or remove them to begin the run again, or change run.folder" in job.output
    assert jobs.contents(run) == before


def _poison(first, last, on_rank, rank):
    """From step `first` to `last` an image of one rank has a pixel that is not a number."""
    from vqscale.data.samples import SampleStream

    original = SampleStream.batches

    def batches(self, *consumed):
        for number, batch in enumerate(original(self, *consumed), 1):
            if consumed and rank == on_rank and first <= number <= last:
                batch.samples[0, 0, 0, 0] = math.nan
            yield batch

    SampleStream.batches = batches


def _finite(run, step):
    return all(x.isfinite().all() for x in jobs.tensors(run, step).values())


@pytest.mark.slow
@pytest.mark.dist
def test_numbers_that_are_not_finite_skip_a_step_on_all_ranks(tmp_path, tiny_shards):
    """Step 2 ends the warm-up, in which codes are drawn from the batch; step 5 revives codes from it."""
    for step in (2, 5):
        path = jobs.write_config(tmp_path / str(step), tiny_shards)
        run = jobs.finish(path, world=2, before=partial(_poison, step, step, 1))
        rows = [row for row in jobs.rows(run) if "loss" in row]
        assert [row["skipped"] for row in rows] == [int(row["step"] >= step) for row in rows]
        assert [row["step"] for row in rows if row["loss"] is None] == [step]
        assert [row["step"] for row in rows if row["grad_norm"] is None] == [step]
        assert _finite(run, 8)


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_ends_when_too_many_steps_are_skipped(tmp_path, tiny_shards):
    path, run = jobs.write_config(tmp_path, tiny_shards, "engine.max_skipped=2"), tmp_path / "run"
    job = jobs.start(path, world=2, before=partial(_poison, 4, 9, 1))
    assert job.wait() == [1, 1]
    for rank in (0, 1):
        assert f"[rank {rank} of 2] error: 3 steps in a row had gradients that are not finite" in job.output
    assert "engine.max_skipped allows 2: lower optim.lr" in job.output
    assert "Traceback" not in job.output
    assert [row["skipped"] for row in jobs.rows(run) if "loss" in row] == [0, 0, 0, 1, 2]
    assert jobs.steps_saved(run) == [2, 4]
    assert _finite(run, 4)


@pytest.mark.slow
def test_a_learning_rate_that_is_far_too_high(tmp_path, tiny_shards):
    path = jobs.write_config(tmp_path, tiny_shards, "engine.max_skipped=2", "optim.lr=1e30", "engine.clip_norm=0")
    job = jobs.start(path)
    assert job.wait() == [1]
    assert "3 steps in a row had gradients that are not finite" in job.output
    assert _finite(tmp_path / "run", 2)
    assert all("NaN" not in line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_deepspeed_without_a_compiler(tmp_path, tiny_shards, whole):
    path = jobs.write_config(tmp_path, tiny_shards, "engine.name=deepspeed")
    # a process of its own, for DeepSpeed looks for compilers when it is imported
    environment = {**os.environ, "PATH": "/nowhere", "CXX": "/nowhere/c++"}
    subprocess.run([sys.executable, str(jobs.LAUNCH), str(path)], env=environment, check=True)
    run = tmp_path / "run"
    jobs.same_numbers(whole, run)
    assert json.loads((run / "summary.json").read_text())["commit"] == "unknown"  # nor is there git
