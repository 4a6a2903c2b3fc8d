"""The trace of a run: where it is written, by whom, that its shares are shares, and that it changes nothing."""

from __future__ import annotations

import json
import re

import jobs
import pytest

from vqscale.run import profile


def _shares(text):
    return {name.strip(): float(share) for name, share in re.findall(r"^  (\D+?) +[\d.]+ ms +([\d.]+)%", text, re.M)}


@pytest.mark.slow
def test_rank_0_traces_what_was_asked_for_and_nothing_changes(tmp_path, tiny_shards):
    plain = jobs.finish(jobs.write_config(tmp_path / "plain", tiny_shards), world=2)
    assert not (plain / "profile").exists()
    run = jobs.finish(jobs.write_config(tmp_path / "traced", tiny_shards, "run.profile_steps=2"), world=2)
    assert sorted(path.name for path in (run / "profile").iterdir()) == ["rank0.json", "summary.txt"]
    names = [event.get("name") for event in json.loads((run / "profile" / "rank0.json").read_text())["traceEvents"]]
    for name in ("data", "codes", "forward", "backward", "step", "communication"):
        assert name in names, name
    text = (run / "profile" / "summary.txt").read_text()
    assert text.startswith("2 steps of ")
    assert "self cpu time total" in text
    shares = _shares(text)
    assert sum(list(shares.values())[:5]) == pytest.approx(100, abs=0.5)
    assert shares["code axis"] > 0 < shares["of it communication"]
    assert f"profile: {run}/profile/summary.txt" in (tmp_path / "traced" / "log.txt").read_text()
    jobs.same_bits(plain, run, 8)


@pytest.mark.slow
def test_the_shorthand_traces_three_steps_of_this_start(tmp_path, tiny_shards):
    run = jobs.finish(jobs.write_config(tmp_path, tiny_shards), "--profile")
    assert (run / "profile" / "summary.txt").read_text().startswith("3 steps of ")


@pytest.mark.slow
def test_a_run_that_ends_before_its_trace_ends_well(tmp_path, tiny_shards):
    run = jobs.finish(jobs.write_config(tmp_path, tiny_shards, "run.steps=2", "run.profile_steps=1"))
    assert not (run / "profile").exists()


@pytest.mark.slow
def test_a_run_that_ends_in_its_trace_writes_the_steps_it_has(tmp_path, tiny_shards):
    run = jobs.finish(jobs.write_config(tmp_path, tiny_shards, "run.steps=4", "run.profile_steps=3"), world=2)
    assert (run / "profile" / "summary.txt").read_text().startswith("1 steps of ")


def test_points_of_time_are_counted_once():
    assert profile.union([(5, 7), (0, 2), (1, 3)]) == [(0, 3), (5, 7)]
    assert profile.overlap([(0, 3), (5, 7)], [(2, 6)]) == [(2, 3), (5, 6)]
    by_name = {
        profile.STEP: [(0, 100)],
        "data": [(0, 10)],
        "forward": [(10, 40)],
        "backward": [(40, 80)],
        "codes": [(20, 30), (22, 25), (50, 60)],
        "step": [(80, 95)],
        "communication": [(24, 26), (82, 84), (150, 160)],
    }
    found = {name: micros for name, micros, _ in profile.shares(by_name)}
    assert list(found.values()) == [10, 50, 20, 15, 5, 4]
