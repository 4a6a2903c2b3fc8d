"""Curves of several runs: what is read, how lines are called, what is drawn, and what is said when there is nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqscale.programs.commands import plot

TOOL = Path(__file__).parent.parent / "tools" / "plot.py"
tool = vars(plot)
main = plot.main


def _run(folder, name="ibq", steps=40, usage=0.5, more=""):
    """A run folder: training rows, evaluations every 10 steps, one value that was not finite."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        loss = None if step == 3 else 1 / step
        lines.append({"step": step, "time": 1.0, "loss": loss, "codes/usage": usage, "codes/perplexity": usage * step})
        if step % 10 == 0:
            lines.append({"step": step, "time": 1.0, "val/psnr": 20 + step / 10})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + more)
    (folder / "run.yaml").write_text(f"tokenizer: {{quantizer: {{name: {name}}}}}\n")
    return folder


def _picture(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_a_panel_for_each_key_and_a_line_for_each_run(tmp_path, capsys):
    runs = [_run(tmp_path / "a"), _run(tmp_path / "b", "vq", usage=0.25)]
    out = tmp_path / "pictures" / "usage.png"
    assert main([*map(str, runs), "--keys", "codes/usage,codes/perplexity,val/psnr", "--out", str(out)]) == 0
    assert capsys.readouterr() == (f"{out}\n", "")
    three = _picture(out)
    assert main([str(runs[0]), "--keys", "codes/usage", "--out", str(tmp_path / "one.png")]) == 0
    one = _picture(tmp_path / "one.png")
    assert three.shape == (one.shape[0], 3 * one.shape[1], 3)
    blue, orange = (np.array(colour) for colour in ((31, 119, 180), (255, 127, 14)))  # the first two lines
    for panel in np.split(three[:, : 3 * one.shape[1]], 3, axis=1)[:2]:
        assert (panel == blue).all(axis=-1).sum() > 100
    assert (three == orange).all(axis=-1).sum() > 100
    assert (one == orange).all(axis=-1).sum() == 0


def test_the_values_are_those_of_the_rows(tmp_path):
    found = tool["rows"](_run(tmp_path / "a", more='{"step": 41, "los'))
    assert len(found) == 44
    steps, values = tool["curve"](found, "loss")
    assert steps == list(range(1, 41))
    assert math.isnan(values[2])
    assert [v for n, v in enumerate(values) if n != 2] == [1 / step for step in steps if step != 3]
    assert tool["curve"](found, "val/psnr") == ([10, 20, 30, 40], [21.0, 22.0, 23.0, 24.0])
    assert tool["curve"](found, "nothing") == ([], [])


def test_lines_are_called_by_quantizer_and_folder(tmp_path):
    labels = tool["labels"]
    a, b = _run(tmp_path / "x" / "k4096"), _run(tmp_path / "y" / "k4096", "ema")
    assert labels([a]) == ["ibq k4096"]
    assert labels([a, b]) == ["ibq x/k4096", "ema y/k4096"]
    (a / "run.yaml").unlink()
    assert labels([a]) == ["k4096"]


def test_a_key_that_only_some_runs_have_is_drawn_and_said(tmp_path, capsys):
    runs = [_run(tmp_path / "a"), _run(tmp_path / "b", steps=5)]
    assert main([*map(str, runs), "--keys", "val/psnr", "--out", str(tmp_path / "p.svg")]) == 0
    assert "val/psnr is not there, or has no row yet, in ibq b" in capsys.readouterr().err
    assert "<svg" in (tmp_path / "p.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["{a}", "--keys", "codes/usge"], "no row of ibq a has the key codes/usge: did you mean codes/usage? change"),
        (["{a}", "--keys", "codes/usge"], "there are codes/perplexity, codes/usage, loss, time, val/psnr"),
        (
            ["{a}/nowhere"],
            "nowhere is no run folder, it has no metrics.jsonl: give what run.folder",
        ),
        (["{a}", "{a}/"], "the same run is given twice"),
        (["{a}", "--keys", ","], "names no key: give some, such as --keys codes/usage"),
        (["{a}", "--out", "curves.jpeg2"], "--out curves.jpeg2 has no suffix of a picture: use one of "),
        (["{torn}"], "torn/metrics.jsonl:2 is no row of metrics"),
    ],
)
def test_errors_say_what_there_is(tmp_path, capsys, arguments, rule):
    a, torn = _run(tmp_path / "a"), _run(tmp_path / "torn")
    lines = (torn / "metrics.jsonl").read_text().splitlines()
    (torn / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:20], *lines[2:], ""]))
    before = sorted(tmp_path.rglob("*"))
    assert main([argument.replace("{a}", str(a)).replace("{torn}", str(torn)) for argument in arguments]) == 2
    out, complaint = capsys.readouterr()
    assert not out
    assert complaint.startswith("error: ")
    assert rule in complaint
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_explains_itself_without_matplotlib():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(TOOL), "--help"], capture_output=True, text=True, check=True
    )
    assert "--keys codes/usage,codes/perplexity,val/psnr --out usage.png" in done.stdout
    assert "matplotlib" not in done.stderr
    assert "torch" not in done.stderr


def _line(folder, values):
    folder.mkdir(parents=True)
    rows = [{"step": step, "time": 1.0, "loss": value} for step, value in values.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_a_run_is_compared_with_kept_curves_by_the_means_of_quarters(tmp_path, capsys):
    file, out = str(tmp_path / "kept" / "curves.csv"), str(tmp_path / "both.png")
    values = dict.fromkeys(range(10, 90, 10), 1.0)
    like = {**values, 20: 1.04, 70: 0.96}
    unlike = {**values, 70: 0.9, 80: 0.9}
    assert main([_line(tmp_path / "first", values), "--keys", "loss", "--keep", file]) == 0
    assert Path(file).read_text().splitlines()[:2] == ["step,loss", "10,1.0"]

    assert main([_line(tmp_path / "like", like), "--against", file, "--out", out]) == 0
    assert "loss: alike, at most 2.0% apart; to step 27: 1.02 (1), to step 45: 1 (1)" in capsys.readouterr().out
    assert (_picture(out) == np.array((31, 119, 180))).all(axis=-1).sum() > 100
    assert (_picture(out) == np.array((255, 127, 14))).all(axis=-1).sum() > 100

    assert main([_line(tmp_path / "unlike", unlike), "--against", file, "--out", out]) == 1
    assert "loss: DIFFERENT, at most 10.0% apart" in capsys.readouterr().out
    assert main([str(tmp_path / "unlike"), "--against", file, "--out", out, "--within", "0.11"]) == 0

    begun = dict(list(unlike.items())[:5])
    assert main([_line(tmp_path / "begun", begun), "--against", file, "--out", out]) == 0, "what is there is alike"
    assert capsys.readouterr().out.splitlines()[-2].endswith("to step 27: 1 (1), to step 45: 1 (1)")
    assert main([_line(tmp_path / "broken", {**values, 40: None}), "--against", file, "--out", out]) == 1
    assert "loss: DIFFERENT, at most nan% apart" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--against", "notes.csv"], "notes.csv is no file of kept curves"),
        (["--against", "empty.csv"], "empty.csv has no curves"),
        (["--against", "other.csv"], "has the key val/psnr"),
        (["--against", "none.csv"], "there is no file none.csv: give one that --keep has written"),
        (["--against", "other.csv", "--within", "-1"], "--within is -1.0"),
        (["b", "--keep", "other.csv"], "--keep and --against are about one run, and 2 are given"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    _line(Path("a"), {1: 1.0}), _line(Path("b"), {1: 1.0})
    Path("notes.csv").write_text("step,loss\nfirst,1\n")
    Path("empty.csv").write_text("step\n")
    Path("other.csv").write_text("step,val/psnr\n1,20\n")
    assert main(["a", *words]) == 2
    assert message in capsys.readouterr().err
