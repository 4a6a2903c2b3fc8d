"""Making shards: contents against the drawing itself, going on after an interruption, several makers, image folders."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_files import png

from vqscale.data import samples
from vqscale.data.config import ImagesConfig, ShapesConfig
from vqscale.data.made import make
from vqscale.data.made.shapes import CLASS_NAMES, draw

TOOL = Path(__file__).parent.parent / "tools/make_shards.py"
main = runpy.run_path(str(TOOL))["main"]


@pytest.fixture(autouse=True)
def _no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}


def shapes(folder: Path, **options: int) -> ImagesConfig:
    made = ShapesConfig(**{"num_images": 10, "size": 16, **options})
    return ImagesConfig(f"{folder}/train-{{00..02}}.tar", image_size=16, num_workers=0, make=made)


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}


def test_prepare_makes_the_drawn_shapes_and_then_nothing(tmp_path: Path) -> None:
    config = shapes(tmp_path / "d", first_index=100, seed=3)
    samples.prepare(config)
    found = [members(tmp_path / "d" / f"train-{n:02d}.tar") for n in range(3)]
    assert [len(shard) for shard in found] == [9, 9, 12]  # 3, 3 and 4 samples of three members
    together = {name: data for shard in found for name, data in shard.items()}
    for index in range(100, 110):
        picture, label = draw(index, 16, 3)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(together[f"{index:08d}.png"]))), picture)
        assert int(together[f"{index:08d}.cls"]) == label
        assert json.loads(together[f"{index:08d}.json"]) == {"label": label, "class": CLASS_NAMES[label]}
    info = json.loads((tmp_path / "d" / "_info.json").read_text())["splits"]["train"]
    assert info["shard_lengths"] == [3, 3, 4]
    assert (tmp_path / "d" / "classes.txt").read_text().split() == list(CLASS_NAMES)
    before = times(tmp_path / "d")
    samples.prepare(config)
    assert times(tmp_path / "d") == before
    (batch,) = samples.SampleStream(config, batch=10, train=False).batches(0)
    assert batch.keys == [f"{index:08d}" for index in range(100, 110)]
    assert batch.broken == []
    again = tmp_path / "again"
    samples.prepare(shapes(again, first_index=100, seed=3))
    for path in again.glob("*.tar"):  # the same bytes, whenever they are made
        assert path.read_bytes() == (tmp_path / "d" / path.name).read_bytes()


def test_prepare_without_make_asks_for_the_shards(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 of 3 shards do not exist"):
        samples.prepare(ImagesConfig(f"{tmp_path}/train-{{00..02}}.tar"))


def test_two_sets_live_in_one_folder(tmp_path: Path) -> None:
    samples.prepare(shapes(tmp_path))
    held_out = ImagesConfig(f"{tmp_path}/val-0.tar", image_size=16, make=ShapesConfig(4, 16, first_index=10))
    samples.prepare(held_out)
    samples.prepare(shapes(tmp_path))
    assert set(json.loads((tmp_path / "_info.json").read_text())["splits"]) == {"train", "val"}
    assert [name[:8] for name in members(tmp_path / "val-0.tar") if name.endswith("cls")] == [
        f"{n:08d}" for n in range(10, 14)
    ]


def test_other_shapes_in_the_same_place_are_an_error_that_says_what_differs(tmp_path: Path) -> None:
    samples.prepare(shapes(tmp_path))
    with pytest.raises(ValueError, match=r"made with size = 16, but now asked for is size = 32: take another folder"):
        samples.prepare(shapes(tmp_path, size=32))


def test_shards_of_somebody_else_are_used_but_not_completed(tmp_path: Path) -> None:
    samples.prepare(shapes(tmp_path))
    (tmp_path / "_info.json").unlink()
    before = times(tmp_path)
    samples.prepare(shapes(tmp_path, size=32))  # all are there: whatever they are, they are the user's
    assert times(tmp_path) == before
    (tmp_path / "train-01.tar").unlink()
    with pytest.raises(ValueError, match=r"2 of the 3 train shards to be made are in .* already, and nothing says"):
        samples.prepare(shapes(tmp_path))


def test_an_interrupted_making_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def stop(index: int, size: int, seed: int) -> object:
        drawn.append(index)
        if len(drawn) == 5:
            raise KeyboardInterrupt
        return draw(index, size, seed)

    monkeypatch.setattr(make, "draw", stop)
    with pytest.raises(KeyboardInterrupt):
        samples.prepare(shapes(tmp_path))
    assert [path.name for path in tmp_path.glob("*.tar")] == ["train-00.tar"]
    assert not (tmp_path / "_info.json").exists()
    assert not list(tmp_path.glob(".*.tar.tmp"))
    (tmp_path / ".train-01.tar.tmp").write_bytes(b"half")  # as by a process that was killed
    before = times(tmp_path)
    samples.prepare(shapes(tmp_path))
    assert drawn[5:] == list(range(3, 10))  # what was finished is kept
    assert times(tmp_path)["train-00.tar"] == before["train-00.tar"]
    assert not list(tmp_path.glob(".*.tmp"))
    (tmp_path / "train-02.tar").unlink()  # a shard that is lost later is made again
    samples.prepare(shapes(tmp_path))
    assert drawn[12:] == [6, 7, 8, 9]


def test_an_interrupted_making_of_something_else_is_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(index: int, size: int, seed: int) -> object:
        if index == 4:
            raise KeyboardInterrupt
        return draw(index, size, seed)

    with monkeypatch.context() as patched:
        patched.setattr(make, "draw", stop)
        with pytest.raises(KeyboardInterrupt):
            samples.prepare(shapes(tmp_path))
    samples.prepare(shapes(tmp_path, size=32))
    assert Image.open(io.BytesIO(members(tmp_path / "train-00.tar")["00000000.png"])).size == (32, 32)


def _prepare(folder: Path, begin: object) -> None:
    begin.wait()
    samples.prepare(shapes(folder, num_images=60))


def test_several_processes_may_prepare_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    begin = context.Barrier(3)
    processes = [context.Process(target=_prepare, args=(tmp_path, begin)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sum(len(members(path)) for path in tmp_path.glob("*.tar")) == 180
    assert not list(tmp_path.glob(".*.tmp"))


def image_folder(root: Path) -> dict[str, bytes]:
    """Three classes, several endings, folders below classes, and a file that is no image by its name."""
    files = {f"{name}/{n}.png": png(10 * c + n) for c, name in enumerate(("ant", "bee", "cat")) for n in range(5)}
    files |= {"bee/deep/er/x.y.PNG": png(99), "cat/readme.txt": b"hello"}
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return files


def test_a_folder_of_classes_is_packed_unchanged_and_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = image_folder(tmp_path / "in")
    command = [
        "--source",
        str(tmp_path / "in"),
        "--out",
        str(tmp_path / "out"),
        "--name",
        "in1k-train",
        "--shard-size",
        "6",
    ]
    assert main(command) == 0
    assert f"shards: {tmp_path}/out/in1k-train-{{0000..0002}}.tar" in capsys.readouterr().out
    found = [members(tmp_path / f"out/in1k-train-000{n}.tar") for n in range(3)]
    assert sorted(len(shard) // 3 for shard in found) == [5, 5, 6]
    together = {name: data for shard in found for name, data in shard.items()}
    seen = {}
    for name, data in together.items():
        if name.endswith(".json"):
            facts = json.loads(data)
            key = name.removesuffix(".json")
            seen[facts["file"]] = together[f"{key}.png"]
            assert facts["class"] == facts["file"].split("/")[0]
            assert ["ant", "bee", "cat"][facts["label"]] == facts["class"]
            assert int(together[f"{key}.cls"]) == facts["label"]
    assert seen == {name: data for name, data in files.items() if not name.endswith("txt")}
    classes = [[json.loads(data)["class"] for name, data in shard.items() if name.endswith("json")] for shard in found]
    assert all(len(set(names)) > 1 for names in classes)
    assert (tmp_path / "out/classes.txt").read_text() == "ant\nbee\ncat\n"
    before = times(tmp_path / "out")
    assert main(command) == 0
    assert times(tmp_path / "out") == before
    (tmp_path / "in/ant/new.png").write_bytes(png(1))
    assert main(command) == 2
    assert "take another folder" in capsys.readouterr().err


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for n in range(3):
        (tmp_path / f"in/{n}.png").write_bytes(png(n))
    assert main(["--source", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    config = ImagesConfig(f"{tmp_path}/out/train-0000.tar", image_size=8, num_workers=0)
    (batch,) = samples.SampleStream(config, batch=3, train=False).batches(0)
    assert batch.labels.tolist() == [-1, -1, -1]
    assert batch.valid.all()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not a folder"), ({}, "no images and no sounds in"), ({"a/x.png": b"junk"}, "a/x.png is not whole")],
)
def test_folders_of_which_nothing_can_be_made(tmp_path: Path, content: object, message: str, capsys: object) -> None:
    if content is not None:
        (tmp_path / "in/a").mkdir(parents=True)
        for name, data in content.items():
            (tmp_path / "in" / name).write_bytes(data)
    assert main(["--source", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.tar"))


def test_shapes_by_the_command_line_and_help_without_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--source", "shapes", "--num", "5", "--size", "16", "--shard-size", "2", "--out", str(tmp_path)]) == 0
    assert sorted(times(tmp_path)) == ["train-0000.tar", "train-0001.tar", "train-0002.tar"]
    assert main(["--source", "shapes", "--size", "4", "--out", str(tmp_path / "small")]) == 2
    assert "8" in capsys.readouterr().err
    code = (
        f"import runpy, sys; sys.argv = ['make_shards', '--help']\n"
        f"try: runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"}
    )
    assert done.returncode == 0, done.stderr
    assert "--shard-size" in done.stdout


def test_what_a_plan_states_of_the_set_is_told_once_and_not_contradicted(tmp_path: Path) -> None:
    def plan(unit: float, number: int = 1) -> make.Plan:
        facts = {"source": "x", "number": number, "classes": []}
        return make.Plan(1, facts, lambda n: {"__key__": f"{n}", "png": b"x"}, {"depth": {"unit_m": unit}})

    make.write(plan(0.001), [tmp_path / "train-0.tar"], "train")
    make.write(plan(0.001), [tmp_path / "val-0.tar"], "val")
    info = json.loads((tmp_path / "_info.json").read_text())
    assert (info["depth"], set(info["splits"])) == ({"unit_m": 0.001}, {"train", "val"})
    with pytest.raises(ValueError, match=r"says depth = \{'unit_m': 0.001\}, but of the test shards it is depth = "):
        make.write(plan(0.002), [tmp_path / "test-0.tar"], "test")
