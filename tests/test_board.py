"""The board and the progress of a run: what is written, by whom, and what a resumed run cuts off."""

from __future__ import annotations

import io
import json
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image

from vqscale.show.board import Board
from vqscale.show.progress import Progress


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder / "tb"))
    accumulator.Reload()
    return accumulator


def test_scalars_are_rows_and_events(tmp_path):
    board = Board(tmp_path)
    board.scalars(1, {"loss": torch.tensor(0.5), "psnr": 20, "usage": 0.25})
    (row,) = rows(tmp_path)  # before close: a row is on disk when it is written
    assert row.pop("time") > 1e9
    assert row == {"step": 1, "loss": 0.5, "psnr": 20, "usage": 0.25}
    board.scalars(2, {"loss": 0.25})
    board.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    logged = events(tmp_path)
    assert [(e.step, e.value) for e in logged.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert [(e.step, e.value) for e in logged.Scalars("psnr")] == [(1, 20.0)]


def test_what_is_not_finite_becomes_null(tmp_path):
    board = Board(tmp_path)
    board.scalars(3, {"a": float("nan"), "b": torch.tensor(math.inf), "c": -math.inf, "d": 1.0})
    board.close()

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert [row[name] for name in "abcd"] == [None, None, None, 1.0]


def test_other_ranks_write_nothing(tmp_path):
    board = Board(tmp_path / "run", rank=1)
    board.scalars(1, {"loss": 0.5})
    board.images(1, "recon", np.zeros((4, 4, 3), np.uint8))
    board.images(1, "usage", lambda: pytest.fail("drawn by a rank that shows nothing"))
    board.histogram(1, "counts", [1, 2])
    board.text(1, "config", "x: 1")
    board.close()
    assert not (tmp_path / "run").exists()


def test_resume_cuts_what_will_be_done_again(tmp_path):
    board = Board(tmp_path)
    for step in (10, 20, 30, 40):
        board.scalars(step, {"loss": step / 10})
    board.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "los')  # killed while writing
    board = Board(tmp_path, resume_step=20)
    assert [row["step"] for row in rows(tmp_path)] == [10, 20]
    board.scalars(30, {"loss": 3.5})
    board.close()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(10, 1.0), (20, 2.0), (30, 3.5)]
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("loss")] == [(10, 1.0), (20, 2.0), (30, 3.5)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tb"]


def test_a_rank_that_does_not_write_does_not_cut(tmp_path):
    board = Board(tmp_path)
    board.scalars(10, {"loss": 1.0})
    board.close()
    Board(tmp_path, rank=1, resume_step=5).close()
    assert len(rows(tmp_path)) == 1


def test_a_cut_that_is_interrupted_loses_nothing(tmp_path, monkeypatch):
    board = Board(tmp_path)
    board.scalars(10, {"loss": 1.0})
    board.scalars(20, {"loss": 2.0})
    board.close()
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Board(tmp_path, resume_step=10)
    assert [row["step"] for row in rows(tmp_path)] == [10, 20]


def test_pictures_histograms_and_text(tmp_path):
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    board = Board(tmp_path)
    board.images(7, "recon", picture)
    board.images(7, "usage", lambda: torch.from_numpy(picture))
    board.histogram(7, "counts", torch.tensor([1.0, 2.0, 2.0, math.nan]))
    board.histogram(7, "nothing", [math.inf])
    board.text(7, "config", "seed: 1")
    board.close()
    for name in ("recon", "usage"):
        assert (np.asarray(Image.open(tmp_path / "samples" / name / "0000000007.png")) == picture).all()
    logged = events(tmp_path)
    (shown,) = logged.Images("recon")
    assert shown.step == 7
    assert (np.asarray(Image.open(io.BytesIO(shown.encoded_image_string))) == picture).all()
    (histogram,) = logged.Histograms("counts")
    assert histogram.histogram_value.num == 3
    assert histogram.histogram_value.sum == 5
    assert "nothing" not in logged.Tags()["histograms"]
    assert logged.Tensors("config/text_summary")[0].step == 7


def test_closed_board_takes_nothing(tmp_path):
    board = Board(tmp_path)
    board.close()
    board.close()
    board.scalars(1, {"loss": 1.0})
    assert rows(tmp_path) == []


def test_step_is_not_a_name(tmp_path):
    board = Board(tmp_path)
    with pytest.raises(AssertionError):
        board.scalars(1, {"step": 3})
    board.close()


class Clock:
    """A clock that the test moves."""

    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_in_a_file_are_bounded_in_rate():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(1000, stream=stream, every_s=10, now=clock)
    for step in range(50):
        clock.time += 1.0
        if step == 4:
            progress.show({"loss": 0.123456, "usage": 0.5})
        progress.advance(images=32, waited_s=0.25)
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/1000", "11/1000", "21/1000", "31/1000", "41/1000"]
    assert "loss" not in lines[0]
    assert lines[1] == "step 11/1000 (1.1%) | 32.0 images/s, data wait 25%, loss 0.1235, usage 0.5 | 16:29 left"
    progress.close()
    assert stream.getvalue().splitlines()[5].startswith("step 50/1000 (5.0%)")
    progress.close()
    assert len(stream.getvalue().splitlines()) == 6


def test_close_repeats_no_line():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(1, stream=stream, now=clock)
    progress.advance(images=1, waited_s=0.0)
    progress.close()
    assert len(stream.getvalue().splitlines()) == 1


def test_rates_have_their_own_window_on_every_rank():
    for rank in (0, 1):
        stream, clock = io.StringIO(), Clock()
        progress = Progress(100, start=40, rank=rank, stream=stream, every_s=0.0, now=clock)
        for _ in range(4):
            clock.time += 0.5
            progress.advance(images=16, waited_s=0.1)
        assert progress.rates() == pytest.approx({"images_per_s": 32.0, "data_wait": 0.2})
        clock.time += 4.0
        progress.advance(images=16, waited_s=1.0)
        assert progress.rates() == pytest.approx({"images_per_s": 4.0, "data_wait": 0.25})
        assert progress.step == 45
        progress.say("hello")
        progress.show({"loss": 1.0})
        progress.close()
        printed = stream.getvalue()
        assert (printed == "") == (rank == 1)


def test_resumed_progress_counts_from_its_start():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(100, start=50, stream=stream, now=clock)
    clock.time += 2.0
    progress.advance(images=8, waited_s=0.0)
    assert stream.getvalue().startswith("step 51/100 (51.0%) | 4.0 images/s")
    assert stream.getvalue().rstrip().endswith("| 01:38 left")


def test_bar_on_a_terminal():
    stream, clock = Terminal(), Clock()
    progress = Progress(3, stream=stream, now=clock)
    for _ in range(3):
        clock.time += 1.0
        progress.advance(images=5, waited_s=0.5)
    progress.show({"loss": 0.5})
    progress.say("saved")
    progress.close()
    printed = stream.getvalue()
    assert "3/3" in printed
    assert "5.0 images/s, data wait 50%, loss 0.5" in printed
    assert "saved\n" in printed
    assert "step 1/3 (" not in printed
