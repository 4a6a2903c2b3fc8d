"""tools/bench save: its forms, what they write, and its table. No time asserted."""

from __future__ import annotations

import json

import forks
import pytest

from vqscale.disk import checkpoint

SMALL = (
    "--width",
    "16",
    "--layers",
    "2",
    "--batch",
    "4",
    "--codes",
    "33",
    "--dim",
    "4",
    "--steps",
    "4",
    "--every",
    "2",
)
NUMBERS = 2 * (16 * 16 + 16) + 33 * 4


@pytest.fixture
def save(tool):
    return tool("save")


def test_every_form_takes_the_same_steps_and_those_that_save_write_them_all(save, tmp_path, monkeypatch):
    setting = save.Saving(16, 2, 4, 33, 4, 4, 2, 2, str(tmp_path), 1, "cpu", 1)
    saved, usual = [], save._save

    def noted(setting, engine, writing, form, step):
        usual(setting, engine, writing, form, step)
        saved.append((form, step, writing.state()[0] if form == "foreground" else 0.0))

    monkeypatch.setattr(save, "_save", noted)
    seconds, waited, size = save.measure(setting)
    begin, *rounds = saved
    assert begin == ("foreground", 0, 0.0)
    assert rounds == 2 * [(form, step, 0.0) for form in ("background", "foreground") for step in (0, 2)]
    assert {name: len(each) for name, each in seconds.items()} == dict.fromkeys(save.FORMS, 2)
    assert min(min(each) for each in seconds.values()) > 0
    assert waited["unsaved"] == [0.0, 0.0]
    read = checkpoint.read(tmp_path / "0000000002")
    assert read.rows["parameter/codes"]["shape"] == [33, 4]
    assert size > 3 * 4 * NUMBERS  # parameters and two moments


def test_its_table_has_the_shares(save):
    rows = {"unsaved": (0.1, 0.0, 0.0), "background": (0.125, 0.2, 0.05), "foreground": (0.2, 0.5, 1.0)}
    report = {
        "save": {name: dict(zip(("seconds", "lost", "waited_s"), row, strict=True)) for name, row in rows.items()}
    }
    config = {"layers": 2, "width": 16, "codes": 33, "dim": 4, "every": 2, "processes": 1, "threads": 1}
    report |= {"bytes": 2**20, "config": config, "machine": {"cpu": "one", "cores": 2, "torch": "2"}, "commit": "c"}
    lines = save.table(report).splitlines()
    assert "a checkpoint of 1.0 MiB every 2 steps" in lines[0]
    assert [line.split() for line in lines[-2:]] == [
        ["background", "0.1250", "20.0%", "0.0500"],
        ["foreground", "0.2000", "50.0%", "1.0000"],
    ]


@pytest.mark.slow
@pytest.mark.dist
def test_it_runs_on_two_processes_and_leaves_nothing(tmp_path):
    words = (*SMALL, "--repeats", "1", "--threads", "1", "--folder", str(tmp_path), "--processes", "2", "--json")
    done = forks.program("tools/bench", "save", *words)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert list(report["save"]) == ["unsaved", "background", "foreground"]
    assert report["save"]["unsaved"]["lost"] == 0.0
    assert report["bytes"] > 3 * 4 * NUMBERS
    assert list(tmp_path.iterdir()) == []
