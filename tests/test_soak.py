"""A soak: its schedule follows from the seed, its disk is full when it is, it finds what differs and nothing else."""

from __future__ import annotations

import errno
import json
import shutil
from collections import Counter
from pathlib import Path

import forks
import jobs
import prior_runs
import pytest

from vqscale.disk import manifest
from vqscale.programs.commands import soak as command
from vqscale.programs.soak import compare
from vqscale.programs.soak.disk import mounted
from vqscale.programs.soak.schedule import KINDS, schedule


def _schedule(seed=0, place="round 0 tokenizer", number=18, processes=(2,)):
    return schedule(seed, place, number, 1000, 50, processes)


def test_a_schedule_follows_from_the_seed_and_the_training():
    assert _schedule() == _schedule()
    others = [_schedule(1), _schedule(place="round 0 prior"), _schedule(place="round 1 tokenizer")]
    assert all(other != _schedule() for other in others)


def test_every_kind_is_there_before_any_is_there_again():
    for seed in range(20):
        kinds = [attack.kind for attack in _schedule(seed)]
        assert Counter(kinds[:9]) == Counter(kinds[9:]) == Counter(KINDS)


def test_attacks_come_one_after_the_other_within_the_training():
    for seed in range(20):
        attacks = _schedule(seed, number=40, processes=(1, 2, 4))
        steps = [attack.step for attack in attacks if attack.moment == "a step"]
        assert steps == sorted(steps)
        assert all(0 < step < 1000 for step in steps)
        assert all(attack.step % 50 == 0 for attack in attacks if attack.moment == "a save")
        assert {attack.processes for attack in attacks} == {1, 2, 4}
        assert all(0 <= attack.one_of(3) <= 2 for attack in attacks)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--attacks", "-1"], "argument --attacks: -1 is below 0: give 0 or more"),
        (["--attacks", "two"], "argument --attacks: invalid number value: 'two'"),
        (["--first-round", "-2"], "argument --first-round: -2 is below 0"),
        (["--minutes", "-1"], "argument --minutes: -1 is no time: give a number, 0 or more"),
        (["--minutes", "nan"], "argument --minutes: nan is no time"),
        (["--minutes", "inf"], "argument --minutes: inf is no time"),
        (["--steps", "0"], "argument --steps: 0 is not a number of things"),
        (["--processes", "0"], "argument --processes: 0 is not a number of things"),
    ],
)
def test_numbers_of_a_soak_that_mean_nothing(given, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        command.main([*given, "--out", str(tmp_path / "soak")])
    assert left.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "soak").exists()


def test_a_disk_takes_no_byte_when_it_is_full_and_does_when_it_is_empty(tmp_path):
    with mounted(tmp_path / "disk", 1 << 20) as disk:
        if disk.lacking:
            pytest.skip(disk.lacking)
        file = tmp_path / "disk" / "file"
        file.write_bytes(b"before")
        disk.fill()
        with pytest.raises(OSError) as full, (tmp_path / "disk" / "other").open("wb") as other:
            other.write(b"0")
        assert full.value.errno == errno.ENOSPC
        disk.empty()
        file.write_bytes(b"1" * (1 << 19))
    assert not file.exists()


def test_without_a_mount_it_says_why_no_disk_is_filled(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with mounted(tmp_path / "disk", 1 << 20) as disk:
        assert disk.lacking.startswith("no disk can be mounted: ")
        assert disk.folder.is_dir()


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_shards):
    """Two undisturbed runs of one config."""
    configs = [jobs.write_config(tmp_path_factory.mktemp(name), tiny_shards, "run.steps=4") for name in ("one", "two")]
    return [jobs.finish(config) for config in configs]


def _change_a_row(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    place = next(number for number, line in enumerate(lines) if '"step": 3' in line)
    row = json.loads(lines[place])
    lines[place] = json.dumps(row | {"loss": row["loss"] + 1e-12})
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def _change_a_score(run):
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [row | {"val/psnr": row["val/psnr"] + 0.31} if "val/psnr" in row else row for row in lines]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in lines))


def _change_a_tensor(run):
    """One bit of the last checkpoint, which stays whole."""
    folder = run / "checkpoints" / "0000000004"
    file = next(iter(sorted((folder / "rows").rglob("c.*"))))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    known = manifest.read(folder)
    known["files"][file.relative_to(folder).as_posix()] = manifest.seal(file)
    manifest.write(folder, known)


@pytest.mark.slow
def test_two_undisturbed_runs_are_the_same_and_a_planted_difference_is_found(tmp_path, two):
    one, other = two
    assert compare.bits(one, other, 4) == []
    assert compare.within(one, other, compare.BOUNDS) == []
    for change, told in ((_change_a_row, "step 3, loss: "), (_change_a_tensor, "step 4, the tensor rows/")):
        changed = shutil.copytree(other, tmp_path / change.__name__)
        change(changed)
        (found,) = compare.bits(one, changed, 4)
        assert found.startswith(told)
        assert compare.within(one, changed, compare.BOUNDS) == []
    changed = shutil.copytree(other, tmp_path / "score")
    _change_a_score(changed)
    (found,) = compare.within(one, changed, compare.BOUNDS)
    assert found.startswith("val/psnr: ")


@pytest.fixture
def soak(tmp_path, tiny_shards):
    """soak(*words): a soak of tiny trainings on one process, in OUT; (status, what it printed)."""
    tokenizer = jobs.write_config(tmp_path / "tokenizer", tiny_shards, "run.keep=2")
    prior = prior_runs.write_config(
        tmp_path / "prior", Path("nothing"), "prior.num_codes=null", "prior.grid=null", "prior.num_classes=10"
    )
    words = ["--out", tmp_path / "out", "--tokenizer", tokenizer, "--prior", prior, "--minutes", "0"]

    def run(*more):
        done = forks.program("tools/soak.py", *words, "--processes", "1", *more, timeout_s=1200.0)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_soak_ends_like_the_undisturbed_and_finds_what_does_not(tmp_path, soak):
    status, told = soak("--attacks", "2")
    assert status == 0, told
    assert told.count("equal in every bit") == 2
    lines = [json.loads(line) for line in (tmp_path / "out" / "soak.jsonl").read_text().splitlines()]
    verdicts = [line for line in lines if "asked" in line]
    assert [verdict["attacked"] for verdict in verdicts] == [verdict["undisturbed"] for verdict in verdicts]
    starts = [line for line in lines if "start" in line]
    done = [attack for start in starts for attack in start["attacks"]]
    for name in ("tokenizer", "prior"):
        asked = schedule(0, f"round 0 {name}", 2, 8, 1, (1,))
        mine = [a["kind"] for line in starts if line["place"] == f"round 0 {name}" for a in line["attacks"]]
        assert mine == [attack.kind for attack in asked]
    assert len(starts) > 2
    assert len(done) == 4
    assert "| round 0 tokenizer | 2 | " in (tmp_path / "out" / "soak.md").read_text()

    _change_a_row(tmp_path / "out" / "undisturbed" / "prior")
    status, told = soak("--attacks", "0")
    assert status == 1, told
    assert "round 0 tokenizer: equal in every bit" in told
    assert "round 0 prior: step 3, loss: " in told

    status, told = soak("--steps", "9")
    assert status == 2
    assert "was made with other configs or --steps" in told
