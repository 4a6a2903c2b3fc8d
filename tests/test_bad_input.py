"""What a user can get wrong, and what can go wrong around a run: a message with the rule, its origin and what to
change, a status that is not 0, and nothing lost of what was written before.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from functools import partial

import jobs
import pytest
import torch
import yaml

BACKWARD = "vqscale.parallel.engine:Engine.backward"


def _ask(*arguments, env=None):
    """launch/train.py as a command; (exit status, what it printed, what it complained)."""
    done = subprocess.run(
        [sys.executable, str(jobs.LAUNCH), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, **(env or {})},
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_shards):
    """A good config, whose run nobody starts."""
    return jobs.write_config(tmp_path_factory.mktemp("config"), tiny_shards)


def test_an_unknown_key_is_named_with_its_line_and_its_neighbour(config, tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text(config.read_text().replace("num_codes:", "num_coddes:"))
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "num_coddes" in text)
    status, out, complaint = _ask(path)
    assert status == 2
    assert not out
    key = "tokenizer.quantizer.num_cod"
    assert complaint == f"error: {path}:{line}: {key}des: unknown key; did you mean {key}es?\n"


def test_all_problems_are_told_at_once_and_by_one_rank(config, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(config.read_text().replace("batch: 8", "batch: eight").replace("steps: 8", "steps: 0", 1))
    arguments = (path, "engine.nam=torch", "tokenizer.net.channels=6")
    status, _, complaint = _ask(*arguments, env={"WORLD_SIZE": "2", "RANK": "0"})
    assert status == 2
    assert "the config has 4 problems" in complaint
    assert "data.batch: expected int, found the text 'eight'; write plain digits, like 1000" in complaint
    assert "run.steps: steps is 0: use at least 1" in complaint
    assert "command line: engine.nam: unknown key; did you mean engine.name?" in complaint
    assert "4 groups do not divide 6 channels" in complaint
    assert complaint.count(str(path)) >= 2
    assert _ask(*arguments, env={"WORLD_SIZE": "2", "RANK": "1"}) == (2, "", "")


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        (
            "mesh.codes=3",
            "mesh.codes 3 does not divide the 2 processes that were started: change mesh.codes",
        ),
        (
            "mesh={data: 2, codes: 2}",
            "data 2 x codes 2 = 4 processes, but 2 were started: change mesh.data",
        ),
        (
            "data.batch=7",
            "data.batch 7 does not divide by 2 processes x accumulation 1 = 2: change data.batch",
        ),
        (
            "engine.accumulation=3",
            "data.batch 8 does not divide by 2 processes x accumulation 3 = 6: change data",
        ),
    ],
)
def test_what_does_not_fit_the_processes(config, override, rule):
    status, _, complaint = _ask(config, override, env={"WORLD_SIZE": "2", "RANK": "0"})
    assert status == 2
    assert complaint.startswith(f"error: {rule}")


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["--frobnicate"], "--frobnicate is neither an option nor key=value, and there is one CONFIG: see launch/tr"),
        (["another.yaml"], "another.yaml is neither an option nor key=value, and there is one CONFIG: see launch/tr"),
        (["--world", "8"], "--world takes a number of processes, with --dry-run; found 8: use --world 8"),
        (["--dry-run", "--world", "x"], "--world takes a number of processes, with --dry-run; found x: use --world 8"),
        (["=3"], "command line: =3: an override is key=value"),
    ],
)
def test_a_command_line_that_says_nothing(config, arguments, rule):
    status, _, complaint = _ask(config, *arguments)
    assert status == 2
    assert complaint.startswith(f"error: {rule}")


def test_a_config_that_is_not_there_names_its_neighbour(config):
    status, _, complaint = _ask(config.with_name("rum.yaml"))
    assert status == 2
    assert f"rum.yaml: there is no such file (looked from {os.getcwd()}); did you mean {config}?" in complaint


def test_an_equals_sign_in_a_path_is_no_override(config, tmp_path):
    (tmp_path / "lr=1").mkdir()
    path = shutil.copy(config, tmp_path / "lr=1" / "run.yaml")
    status, _, complaint = _ask(path, "optim.lr=fast")
    assert status == 2
    assert "optim.lr: expected float" in complaint


# One process each that imports torch, because the disk or the device is looked at.


@pytest.mark.parametrize(
    ("override", "rules"),
    [
        (
            "data.train.shards=/nowhere/a-{0..2}.tar",
            ["data.train: 3 of 3 shards do not exist: /nowhere/a-0.tar"],
        ),
        ("data.val.shards=/nowhere/*.tar", ["data.val: no shard: the pattern '/nowhere/*.tar'", "change the pattern"]),
        ("data.val.shards=ftpp://host/a.tar", ["data.val: nothing opens ftpp:", "copy the shards to a disk"]),
        ("run.folder={config}/run", ["run.folder", "cannot be written", "is no folder; choose another run.folder"]),
        pytest.param(
            "run.device=cuda",
            ["device cuda needs a GPU that torch can use, and it finds none here"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
@pytest.mark.slow
def test_what_is_not_there(config, tmp_path, override, rules):
    path = shutil.copy(config, tmp_path / "run.yaml")
    job = jobs.start(tmp_path / "run.yaml", override.replace("{config}", str(path)))
    assert job.wait() == [2]
    assert job.output.startswith("error: ")
    assert "Traceback" not in job.output
    for rule in rules:
        assert rule in job.output


def test_help_and_errors_come_without_torch_and_the_plan_without_processes(config):
    for arguments, status in ((["--help"], 0), ([config, "optim.lr=fast"], 2), ([config, "mesh.codes=7"], 2)):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", str(jobs.LAUNCH), *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "WORLD_SIZE": "2"},
            check=False,
        )
        assert done.returncode == status, done.stderr
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
        assert "yaml" in imported
        assert not imported & {"torch", "numpy", "deepspeed", "zarr", "webdataset", "PIL"}
        if "--help" in arguments:
            assert "tokenizer.quantizer" in done.stdout
            assert "mesh.codes" in done.stdout
            assert "STOP" in done.stdout


@pytest.mark.slow
def test_a_dry_run_starts_nothing(config):
    job = jobs.start(config, "--dry-run", WORLD_SIZE="8")  # seven of them would never come
    assert job.wait() == [0]
    for part in ("data 1 x codes 8 = 8 processes", "parameters", "memory per rank", "bytes sent per rank and step"):
        assert part in job.output
    assert "17,068" in job.output  # parameters in all
    job = jobs.start(config, "--dry-run", "--world", "4", "mesh.data=2")
    assert job.wait() == [0]
    assert "data 2 x codes 2 = 4 processes" in job.output
    assert not (config.parent / "run").exists()


# From here on runs start.


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
    ("damage", "broken"), [(lambda tar: tar[: len(tar) // 2], 1), (lambda tar: b"", 1), (_flip, 16)]
)
def test_damaged_shards_are_counted_and_the_run_goes_on(tmp_path, tiny_shards, damage, broken):
    shards = _shards(tiny_shards, tmp_path / "shards", damage)
    run = jobs.finish(jobs.write_config(tmp_path, shards))
    counted = [row["broken"] for row in jobs.rows(run) if "broken" in row]
    assert counted == sorted(counted)
    # Whatever is lost of a shard counts once; of 64 samples in 8 steps a quarter is damaged: two epochs of six, and
    # those of the third epoch that come early.
    assert counted[-1] == broken if broken == 1 else 12 <= counted[-1] <= 18
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
    assert (
        "samples were broken, data.train.max_broken is 4: repair or leave out the shards named, or raise" in job.output
    )
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


@pytest.fixture
def half(tmp_path, tiny_shards):
    """The config of a run on one process that was stopped after step 5; checkpoints of 2, 4 and 5."""
    path = jobs.write_config(tmp_path, tiny_shards)
    stop = partial(jobs.at_call, BACKWARD, 5, partial(jobs.hear, signal.SIGTERM), 0)
    assert jobs.start(path, before=stop).wait() == [jobs.STOPPED]
    assert jobs.steps_saved(tmp_path / "run") == [2, 4, 5]
    return path


def _bytes(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
        assert "make room and start again, the checkpoints that are finished stand" in job.output
        assert "Traceback" not in job.output


def _flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.slow
def test_damaged_checkpoints_are_passed_over(half, tmp_path, whole):
    run = tmp_path / "run"
    saved = run / "checkpoints"
    _flip_byte(saved / "0000000005" / "replicated.pt")
    next((saved / "0000000004" / "rows" / "parameter").rglob("c.*")).unlink()
    jobs.finish(half)
    output = (tmp_path / "log.txt").read_text()
    assert f"passed over the checkpoint {saved}/0000000005: replicated.pt was changed after it was written" in output
    assert f"passed over the checkpoint {saved}/0000000004: rows/parameter/" in output
    assert f"going on after step 2 of {saved}/0000000002" in output
    jobs.same_bits(whole, run, 8)


@pytest.mark.slow
def test_a_run_without_a_whole_checkpoint_does_not_begin_again_by_itself(half, tmp_path):
    run = tmp_path / "run"
    for step in (2, 4, 5):
        (run / "checkpoints" / f"{step:010d}" / "facts.json").unlink()
    before = _bytes(run)
    job = jobs.start(half)
    assert job.wait() == [2]
    assert f"none of the 3 checkpoints in {run}/checkpoints is whole" in job.output
    assert "facts.json cannot be read (No such file or directory)" in job.output
    assert "put one back, or remove them to begin the run again, or change run.folder" in job.output
    assert _bytes(run) == before


@pytest.mark.slow
def test_the_folder_of_another_run_is_left_alone(half, tmp_path, tiny_shards):
    run = tmp_path / "run"
    before = _bytes(run)

    status, _, complaint = _ask(half, "optim.lr=2e-3", "tokenizer.quantizer.num_codes=64", "engine.zero_stage=3")
    assert status == 2
    assert f"error: the run in {run} has another config ({run}/run.yaml)" in complaint
    assert "\n  optim.lr: 0.001 -> 0.002\n" in complaint
    assert "\n  tokenizer.quantizer.num_codes: 101 -> 64\n" in complaint
    assert "zero_stage" not in complaint  # that may change
    assert "change run.folder to begin a new run, or set these keys back to continue the old one" in complaint
    assert _bytes(run) == before

    other = _shards(tiny_shards, tmp_path / "shards", lambda tar: tar[: len(tar) // 2])
    job = jobs.start(half, f"data.train.shards={other}/train-{{0..1}}.tar")
    assert job.wait() == [2]
    assert "was trained on data with fingerprint" in job.output
    assert "give the same shards, or a new run.folder" in job.output
    assert _bytes(run) == before

    (run / "run.yaml").write_text("")
    status, _, complaint = _ask(half)
    assert status == 2
    assert f"{run}/run.yaml, the config of the run in {run}, cannot be read" in complaint


@pytest.mark.slow
def test_held_out_images_may_come_later(half, tmp_path):
    """data.val changes nothing that is trained."""
    text = yaml.safe_load(half.read_text())
    del text["data"]["val"]
    path = tmp_path / "without" / "run.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(text))
    folder = f"run.folder={path.parent}/run"
    jobs.finish(path, folder, "run.steps=2")
    shutil.copy(half, path)
    run = jobs.finish(path, folder, "run.steps=4")
    assert "val/psnr" in jobs.rows(run)[-1]


def _poison(first, last, on_rank, rank):
    """From step `first` to `last` an image of one rank has a pixel that is not a number."""
    from vqscale.data.images import Stream

    original = Stream.batches

    def batches(self, *consumed):
        for number, batch in enumerate(original(self, *consumed), 1):
            if consumed and rank == on_rank and first <= number <= last:
                batch.images[0, 0, 0, 0] = math.nan
            yield batch

    Stream.batches = batches


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
    run = jobs.finish(path, PATH="/nowhere", CXX="/nowhere/c++")
    jobs.same_numbers(whole, run)
    assert json.loads((run / "summary.json").read_text())["commit"] == "unknown"  # nor is there git
