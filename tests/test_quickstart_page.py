"""tools/page.py: the page tells what the runs have written, has every picture in it, and says what it lacks."""

from __future__ import annotations

import base64
import io
import json
import re
import runpy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqscale import config as configuration
from vqscale.data.made import shapes
from vqscale.nets.config.classifiers import ShapesClassifierConfig
from vqscale.parallel.mesh import Mesh
from vqscale.plan.tokenizer import planned_mesh
from vqscale.show import run_page
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.classifiers import SHAPES
from vqscale.train.config import Run

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "page.py"
QUICKSTART = ROOT / "configs" / "quickstart"
TOKENIZERS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "task: tokenizer" in path.read_text()]
OF_IMAGES = [path for path in TOKENIZERS if configuration.load(Run, path).tokenizer.signal.name == "images"]
SIDE = 16


def write_run(folder: Path, config: Run, summary: dict, rows: list[dict]) -> Path:
    """The folder of a run as a training leaves it."""
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(configuration.dump(config))
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_shards):
    """What write_runs writes. Not to be changed."""
    return write_runs(tmp_path_factory.mktemp("page"), tiny_shards)


def write_runs(folder: Path, tiny_shards: Path) -> Path:
    """Folders of a tokenizer, a prior and samples of classes 3 and 1: run, prior, samples."""
    source = f"{{shards: {tiny_shards}/val.tar, image_size: {SIDE}, num_workers: 0, index_dir: {tiny_shards}/index}}"
    sources = [f"data.train={source}", f"data.val={source}"]
    tokenizer = ["tokenizer.net.patch=2", "tokenizer.net.multipliers=[1,2]", "tokenizer.quantizer.dim=6"]
    config = configuration.load(Run, QUICKSTART / "tokenizer.yaml", [*sources, *tokenizer])
    rows = [{"step": s, "codes/usage": 0.1 * s, "codes/perplexity": 9.0 * s, "val/psnr": None} for s in range(1, 6)]
    rows.append({"step": 5, "val/psnr": 21.0, "val/usage": 0.4})
    summary = {"num_codes": 4096, "steps": 5, "processes": 2, "psnr": 21.5, "usage": 0.998}
    run = write_run(folder / "run", config, summary, rows)
    (run / "samples" / "reconstructions").mkdir(parents=True)
    for step, value in ((1, 10), (5, 77)):
        picture = np.full((8, 8, 3), value, np.uint8)
        Image.fromarray(picture).save(run / "samples" / "reconstructions" / f"{step:010d}.png")
    net = [
        "prior.num_codes=4096",
        "prior.grid=[4,4]",
        "prior.net.num_layers=3",
        "prior.net.width=32",
        "prior.net.num_heads=2",
    ]
    config = configuration.load(Run, QUICKSTART / "prior.yaml", net)
    summary = {"steps": 9, "processes": 2, "loss": 6.25, "unigram": 8.125, "uniform": 8.318, "perplexity": 518.0}
    rows = [{"step": step, "loss": 8.0 / step} for step in range(1, 10)]
    write_run(folder / "prior", config, summary, rows)
    settings = {"classes": [3, 1], "guidance": 2.5, "schedule": "constant", "temperature": 0.8, "top_k": 0}
    settings |= {"top_p": 1.0, "seed": 4, "num_images": 6}
    (folder / "samples").mkdir()
    (folder / "samples" / "sample.json").write_text(json.dumps({"state": "done", "settings": settings}))
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, SIDE, SIDE, 3), np.uint8)
    np.savez(folder / "samples" / "samples.npz", images, np.array([3, 1] * 3))
    return folder


def main(*words: object) -> int:
    status: int = runpy.run_path(str(TOOL))["main"]([str(word) for word in words])
    return status


def page(run: Path, place: Path, out: Path) -> str:
    assert main(run, place / "prior", place / "samples", "--out", out) == 0
    return out.read_text()


def pictures(text: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data in found]


def test_the_page_says_what_the_runs_have_written(place, tmp_path):
    text = page(place / "run", place, tmp_path / "new" / "page.html")
    for said in ("16 x 16 pixels become 4 x 4 ids out of K = 4,096 codes", "<b>ibq</b>, 6 numbers each", "21.50"):
        assert said in text
    for said in ("99.8%", "3 blocks of width 32", "6.250", "8.125", "8.318", "guidance 2.5, temperature 0.8, seed 4"):
        assert said in text
    headings = re.findall("<h2>(.*?)</h2>", text)
    assert headings == ["The tokenizer", "Reconstructions", "The prior", "Samples", "To go on"]
    assert "vqscale train" in text.partition("To go on")[2]


@pytest.mark.slow
@pytest.mark.parametrize("path", OF_IMAGES, ids=lambda path: path.stem)
def test_the_page_tells_of_every_tokenizer_of_images_that_is_shipped(place, path, tmp_path):
    held_out = configuration.load(Run, place / "run" / "run.yaml").data.val
    config = configuration.load(Run, path)
    held_out = replace(held_out, image_size=config.data.train.sides[0])
    config = replace(config, data=replace(config.data, val=held_out))
    summary = {"num_codes": 7, "steps": 1, "processes": 1}
    write_run(tmp_path / "run", config, summary, [])
    with torch.device("meta"):
        tokenizer = Tokenizer.from_config(config.tokenizer, planned_mesh(1, 1), 0)
        latents = tokenizer.encoder(torch.empty(1, 3, *config.data.train.sides))
    (size, _), (h, w) = config.data.train.sides, latents.shape[2:]
    text = page(tmp_path / "run", place, tmp_path / "page.html")
    most = "up to " if config.data.train.medium == "buckets" else ""
    assert f"Pictures of {most}{size} x {size} pixels become {h} x {w} ids out of K = 7 codes" in text
    assert f"(quantizer <b>{config.tokenizer.quantizer.name}</b>" in text


def test_the_page_is_of_images_alone(place, tmp_path, capsys):
    config = configuration.load(Run, QUICKSTART / "sound.yaml")
    write_run(tmp_path / "run", config, {"num_codes": 7, "steps": 1, "processes": 1}, [])
    assert main(tmp_path / "run", place / "prior", place / "samples", "--out", tmp_path / "page.html") == 2
    assert "this page is of images" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_everything_is_in_the_file(place, tmp_path):
    text = page(place / "run", place, tmp_path / "page.html")
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    curves, recon, loss, *strips = pictures(text)
    assert curves.shape[1] > loss.shape[1]  # three panels and one
    assert (recon == 77).all()  # the last
    assert len(strips) == 4


def test_samples_stand_beside_real_images_of_their_class(place, tmp_path):
    strips = pictures(page(place / "run", place, tmp_path / "page.html"))[3:]
    for (drawn, real), numbers, label in zip((strips[:2], strips[2:]), ((0, 2, 4), (1, 3, 5)), (3, 1), strict=True):
        assert drawn.shape == (64, 3 * (64 + 3), 3)
        assert [int(drawn[0, 67 * at, 0]) for at in range(3)] == list(numbers)
        assert (drawn[:, 64:67] == 255).all()
        picture, _ = shapes.draw(100 + label, SIDE, 0)  # of the ten held-out pictures the only one of this class
        np.testing.assert_array_equal(real[::4, :64:4], picture)


@pytest.mark.slow
def test_the_page_tells_what_the_classifier_says_of_the_samples(place, tmp_path):
    config = ShapesClassifierConfig(image_size=SIDE, width=8, steps=1, batch=2, num_images=2, num_held_out=8)
    SHAPES.save(tmp_path / "judge", SHAPES.train(config, Mesh()), Mesh(), {})
    folders = (place / "run", place / "prior", place / "samples")
    assert main(*folders, "--classifier", tmp_path / "judge", "--out", tmp_path / "page.html") == 0
    told = (tmp_path / "page.html").read_text().partition("<h2>The samples before a judge</h2>")[2].partition("<h2>")[0]
    assert "the 6 samples" in told
    assert told.count("%</td>") == 2
    assert "it is not FID" in told


def test_what_is_lacking_is_said(place, tmp_path, capsys):
    words = ("--out", tmp_path / "page.html")
    assert main(place / "run", place / "samples", place / "samples", *words) == 2
    assert "samples has no run.yaml, summary.json, metrics.jsonl, which a finished run has" in capsys.readouterr().err
    assert main(place / "prior", place / "run", place / "samples", *words) == 2
    assert "prior is a run of task prior: give one of task tokenizer in its place" in capsys.readouterr().err
    assert main(place / "run", place / "prior", place / "run", *words) == 2
    assert "run has no finished samples: make them with `vqscale sample`" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_run_folder_starts_no_command_unless_it_is_trusted(place, tmp_path, capsys):
    marker, folders = tmp_path / "ran", (tmp_path / "run", place / "prior", place / "samples")
    shutil.copytree(place / "run", tmp_path / "run")
    text = (tmp_path / "run" / "run.yaml").read_text()
    shards = configuration.load(Run, tmp_path / "run" / "run.yaml").data.val.shards
    for given in (f"pipe:touch {marker}; cat {shards}", f"{{a,pipe:touch {marker}; cat {shards}}}"):
        (tmp_path / "run" / "run.yaml").write_text(text.replace(shards, f'"{given}"'))
        assert main(*folders, "--out", tmp_path / "page.html") == 2
        assert "nothing is fetched or started that a run folder names: give --fetch" in capsys.readouterr().err
        assert not marker.exists()
    kept = text.replace("cache_dir: null", f"cache_dir: {tmp_path}")
    (tmp_path / "run" / "run.yaml").write_text(kept.replace(shards, f'"pipe:touch {marker}; cat {shards}"'))
    assert main(*folders, "--fetch", "--out", tmp_path / "page.html") == 0
    assert marker.exists()


@pytest.mark.parametrize("key", ["steps", "processes"])
def test_what_a_run_says_is_numbers_or_is_refused(place, tmp_path, capsys, key):
    shutil.copytree(place / "run", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "run" / "summary.json").write_text(json.dumps({**summary, key: "<script>"}))
    words = (tmp_path / "run", place / "prior", place / "samples", "--out", tmp_path / "page.html")
    assert main(*words) == 2
    assert f"summary.json has no whole number as {key}: train the run again" in capsys.readouterr().err
    text = (place / "run" / "run.yaml").read_text()
    (tmp_path / "run" / "run.yaml").write_text(text.replace("dim: 6", 'dim: "<script>"'))
    assert main(*words) == 2
    assert "expected int, found the text '<script>'" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_points_are_those_that_are_finite_numbers():
    rows = [
        {"step": 1, "a": 1.5},
        {"step": 2, "a": None},
        {"step": 3},
        {"step": 4, "a": float("nan")},
        {"step": 5, "a": 2},
    ]
    assert run_page.points(rows, "a") == [(1, 1.5), (5, 2.0)]
    assert run_page.chart({"a": {"b": []}}, "nothing") == ""
