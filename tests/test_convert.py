"""Converters: small files in the exact published formats become shards that the media read back, label for label."""

from __future__ import annotations

import io
import json
import os
import runpy
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
from dense_files import CATEGORIES, CLASSES, image, painted, png, segment
from PIL import Image

from vqscale.data.config_dense import DepthConfig, PanopticConfig
from vqscale.data.made import make, nyu
from vqscale.data.samples import SampleStream

main = runpy.run_path(str(Path(__file__).parent.parent / "tools/convert.py"))["main"]
SIDES = (6, 8)


@pytest.fixture(autouse=True)
def _no_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def converted(*words):
    assert main([str(word) for word in words]) == 0


def members(*paths):
    """{key: {suffix: bytes}} of shards, by tarfile."""
    found = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, suffix = info.name.partition(".")
                found.setdefault(key, {})[suffix] = tar.extractfile(info).read()
    return found


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def metres(seed):
    depth = np.random.default_rng(seed).uniform(0.5, 9.9, SIDES).astype(np.float32)
    depth[0, seed % 8] = 0
    return depth


def fastdepth(root, train=5, val=2):
    """As FastDepth passes it on: rgb (3, H, W) uint8, depth (H, W) metres."""
    for part, scene, count in (("train", "kitchen_0028b", train - 1), ("train", "bath.2", 1), ("val", "official", val)):
        folder = root / part / scene
        folder.mkdir(parents=True)
        for number in range(1, count + 1):
            with h5py.File(folder / f"{number:05d}.h5", "w") as file:
                seed = number + 10 * len(scene)
                file["rgb"] = image(*SIDES, seed).transpose(2, 0, 1)
                file["depth"] = metres(seed)


def test_the_tree_of_fastdepth(tmp_path, capsys):
    fastdepth(tmp_path / "tree")
    converted("nyu", tmp_path / "tree", "--out", tmp_path / "out", "--shard-size", 3)
    told = capsys.readouterr().out
    assert f"5 samples; in a config:\nshards: {tmp_path}/out/train-{{0000..0001}}.tar" in told
    assert "of what was written now, 2.1% of the pixels have no label" in told
    train = members(*sorted((tmp_path / "out").glob("train-*.tar")))
    files = sorted((tmp_path / "tree/train").rglob("*.h5"))
    assert sorted(train) == [f"{number:08d}" for number in range(5)]
    assert list(train) != sorted(train), "training samples are mixed"
    for number, path in enumerate(files):
        with h5py.File(path) as file:
            found = train[f"{number:08d}"]
            assert (pixels(found["png"]) == file["rgb"][()].transpose(1, 2, 0)).all()
            assert np.abs(pixels(found["depth.png"]) / 1000 - file["depth"][()]).max() <= 0.0005 + 1e-6
            assert (pixels(found["depth.png"]) == 0).sum() == 1
    assert list(members(tmp_path / "out/val-0000.tar")) == ["00000000", "00000001"], "held-out ones keep their order"
    assert json.loads((tmp_path / "out/_info.json").read_text())["depth"] == {"unit_m": 0.001}


def test_what_is_converted_is_read_back_by_the_medium(tmp_path):
    fastdepth(tmp_path / "tree")
    converted("nyu", tmp_path / "tree", "--out", tmp_path / "out")
    config = DepthConfig(str(tmp_path / "out/val-0000.tar"), image_size=8, num_workers=0)
    (batch,) = SampleStream(config, 2, train=False).batches()
    assert batch.broken == []
    with h5py.File(tmp_path / "tree/val/official/00001.h5") as file:
        depth = file["depth"][()]
    rows = ((np.arange(8) + 0.5) * 6 / 8).astype(int)
    np.testing.assert_allclose(batch.samples[0, 3], depth[rows], atol=0.00051)


def labeled_mat(folder, count=7):
    """Matlab v7.3: HDF5 with axes reversed; splits in the older format, numbered from 1."""
    folder.mkdir()
    with h5py.File(folder / "nyu.mat", "w", userblock_size=512) as file:
        images = np.stack([image(*SIDES, seed) for seed in range(count)])
        file["images"] = images.transpose(0, 3, 2, 1)
        file["depths"] = np.stack([np.maximum(metres(seed), 1) for seed in range(count)]).transpose(0, 2, 1)
        file["rawDepths"] = np.stack([metres(seed) for seed in range(count)]).transpose(0, 2, 1)
    splits = {"trainNdxs": np.array([[2], [5], [7]], np.uint16), "testNdxs": np.array([[1], [3], [4], [6]], np.uint16)}
    scipy.io.savemat(folder / "splits.mat", splits)
    return folder / "nyu.mat", folder / "splits.mat"


def test_the_labeled_mat_and_its_splits(tmp_path):
    mat, splits = labeled_mat(tmp_path / "mat")
    converted("nyu-labeled", mat, "--splits", splits, "--out", tmp_path / "full")
    converted("nyu-labeled", mat, "--splits", splits, "--raw", "--out", tmp_path / "raw")
    for name, missing in (("full", 0), ("raw", 1)):
        test = members(tmp_path / name / "test-0000.tar")
        assert list(test) == [f"{number:08d}" for number in range(4)]
        for found, seed in zip(test.values(), (0, 2, 3, 5), strict=True):
            assert (pixels(found["png"]) == image(*SIDES, seed)).all()
            assert (pixels(found["depth.png"]) == 0).sum() == missing
            expected = metres(seed) if missing else np.maximum(metres(seed), 1)
            assert np.abs(pixels(found["depth.png"]) / 1000 - expected).max() < 0.00051
        assert len(members(tmp_path / name / "train-0000.tar")) == 3


def sync_tree(root, scenes=("kitchen_0028b", "bath.2"), count=2):
    for scene in scenes:
        (root / scene).mkdir(parents=True)
        for number in range(count):
            steps = (metres(number) * 1000).round().astype(np.uint16)
            Image.fromarray(image(*SIDES, number)).save(root / scene / f"rgb_{number:05d}.jpg")
            (root / scene / f"sync_depth_{number:05d}.png").write_bytes(png(steps))


def test_the_sync_tree_is_taken_as_it_is(tmp_path, capsys):
    sync_tree(tmp_path / "sync")
    converted("sync", tmp_path / "sync", "--out", tmp_path / "out", "--name", "test")
    found = members(tmp_path / "out/test-0000.tar")
    assert len(found) == 4
    for sample in found.values():
        file = tmp_path / "sync" / json.loads(sample["json"])["file"]
        assert sample["jpg"] == file.read_bytes()
        depth = file.parent / file.name.replace("rgb", "sync_depth").replace("jpg", "png")
        assert sample["depth.png"] == depth.read_bytes()
    (tmp_path / "list.txt").write_text("/bath.2/rgb_00001.jpg /bath.2/sync_depth_00001.png 518.8579\n")
    converted("sync", tmp_path / "sync", "--list", tmp_path / "list.txt", "--out", tmp_path / "some")
    assert [json.loads(x["json"])["file"] for x in members(tmp_path / "some/train-0000.tar").values()] == [
        "bath.2/rgb_00001.jpg"
    ]
    (tmp_path / "sync/bath.2/sync_depth_00000.png").unlink()
    assert main(["sync", str(tmp_path / "sync"), "--out", str(tmp_path / "half")]) == 2
    assert "1 files of 4 pairs are missing, the first" in capsys.readouterr().err
    assert not (tmp_path / "half").exists()


def coco(folder, count=4, zipped=False):
    """train2017/*.jpg, the PNGs in a folder of a zip, and the JSON, as cocodataset.org has them."""
    ids = np.full(SIDES, 70_000)
    ids[:3], ids[1:3, 2:-2], ids[-1, 0] = 300, 5, 0
    segments = [segment(300, 90) | {"area": 20, "bbox": [0, 0, 8, 3]}, segment(5, 3, 1), segment(70_000, 7)]
    told = {"info": {}, "licenses": [], "images": [], "annotations": [], "categories": list(CATEGORIES)}
    (folder / "train2017").mkdir(parents=True)
    (folder / "maps").mkdir()
    for number in range(9, 9 + count):
        name = f"{number:012d}"
        Image.fromarray(image(*SIDES, number)).save(folder / f"train2017/{name}.jpg")
        (folder / f"maps/{name}.png").write_bytes(png(painted(ids)))
        told["images"].append({"id": number, "file_name": f"{name}.jpg", "height": SIDES[0], "width": SIDES[1]})
        told["annotations"].append({"image_id": number, "file_name": f"{name}.png", "segments_info": segments})
    (folder / "panoptic.json").write_text(json.dumps(told))
    if zipped:
        with zipfile.ZipFile(folder / "maps.zip", "w") as file:
            for path in sorted((folder / "maps").iterdir()):
                file.write(path, f"panoptic_train2017/{path.name}")
    maps = folder / ("maps.zip" if zipped else "maps")
    return ["coco", folder / "train2017", "--maps", maps, "--json", folder / "panoptic.json"], ids


@pytest.mark.parametrize("zipped", [False, True])
def test_coco_panoptic_from_a_folder_or_a_zip(tmp_path, zipped):
    words, ids = coco(tmp_path / "coco", zipped=zipped)
    converted(*words, "--out", tmp_path / "out", "--name", "val")
    found = members(tmp_path / "out/val-0000.tar")
    assert sorted(found) == [f"{number:012d}" for number in range(9, 13)]
    for key, sample in found.items():
        assert sample["jpg"] == (tmp_path / f"coco/train2017/{key}.jpg").read_bytes()
        assert sample["panoptic.png"] == (tmp_path / f"coco/maps/{key}.png").read_bytes()
        facts = json.loads(sample["panoptic.json"])
        assert (facts["image_id"], [x["id"] for x in facts["segments_info"]]) == (int(key), [300, 5, 70_000])
    assert json.loads((tmp_path / "out/_info.json").read_text())["categories"] == list(CATEGORIES)
    config = PanopticConfig(str(tmp_path / "out/val-0000.tar"), image_size=8, num_workers=0)
    (batch,) = SampleStream(config, 4, train=False).batches()
    assert batch.broken == []
    rows = ((np.arange(8) + 0.5) * 6 / 8).astype(int)
    table = {0: 0, 300: CLASSES[90], 5: CLASSES[3], 70_000: CLASSES[7]}
    assert (batch.samples[0, 3].numpy() == np.vectorize(table.get)(ids)[rows]).all()
    assert (batch.samples[0, 5].numpy() == (ids == 5)[rows]).all()


def pairs(folder, count=3):
    ids = np.where(np.arange(48).reshape(SIDES) % 2, 5, 300)
    (folder / "deep").mkdir(parents=True)
    for number in range(count):
        stem = folder / ("deep" if number else ".") / f"a{number}"
        steps = (metres(number) * 256).round().astype(np.uint16)
        for suffix, data in (
            ("jpg" if number else "png", png(image(*SIDES, number))),
            ("depth.png", png(steps)),
            ("panoptic.png", png(painted(ids))),
            ("panoptic.json", json.dumps({"segments_info": [segment(5, 3), segment(300, 7)]}).encode()),
        ):
            stem.with_name(f"{stem.name}.{suffix}").write_bytes(data)
    (folder.parent / "categories.json").write_text(json.dumps(list(CATEGORIES)))
    return ["pairs", folder, "--unit-m", 1 / 256, "--categories", folder.parent / "categories.json"]


def test_a_plain_folder_of_images_and_labels(tmp_path):
    converted(*pairs(tmp_path / "mine"), "--out", tmp_path / "out")
    found = members(tmp_path / "out/train-0000.tar")
    assert len(found) == 3
    for sample in found.values():
        file = tmp_path / "mine" / json.loads(sample["json"])["file"]
        for suffix in ("depth.png", "panoptic.png", "panoptic.json"):
            assert sample[suffix] == file.with_name(f"{file.stem}.{suffix}").read_bytes()
    info = json.loads((tmp_path / "out/_info.json").read_text())
    assert (info["depth"], info["categories"]) == ({"unit_m": 1 / 256}, list(CATEGORIES))


def test_a_plain_folder_of_images_and_categories_of_pixels(tmp_path, capsys):
    words, ids = pairs(tmp_path / "mine"), np.where(np.arange(48).reshape(SIDES) % 2, 90, 255).astype(np.uint8)
    images = [path for path in (tmp_path / "mine").rglob("a*") if path.name.count(".") == 1]
    for path in images:
        path.with_name(f"{path.stem}.seg.png").write_bytes(png(ids))
    assert main([*map(str, words), "--out", str(tmp_path / "out")]) == 2
    assert "has panoptic.png and seg.png, two labels of the same pixels" in capsys.readouterr().err
    for path in (tmp_path / "mine").rglob("*.panoptic.*"):
        path.unlink()
    assert main([*map(str, words[:4]), "--out", str(tmp_path / "out")]) == 2
    assert "has seg.png, and nothing says the categories" in capsys.readouterr().err
    converted(*words, "--out", tmp_path / "out")
    config = PanopticConfig(str(tmp_path / "out/train-0000.tar"), image_size=8, num_workers=0)
    (batch,) = SampleStream(config, 3, train=False).batches()
    assert (len(images), batch.broken) == (3, [])
    rows = ((np.arange(8) + 0.5) * 6 / 8).astype(int)
    assert (batch.samples[:, 3].numpy() == np.where(ids == 90, CLASSES[90], 0)[rows]).all()
    images[0].with_name(f"{images[0].stem}.seg.png").write_bytes(png(ids + 1))
    assert main([*map(str, words), "--out", str(tmp_path / "again")]) == 2
    assert "its seg.png has the numbers [91]" in capsys.readouterr().err


def test_an_interrupted_conversion_goes_on(tmp_path, monkeypatch):
    fastdepth(tmp_path / "tree")
    words, opened = ["nyu", tmp_path / "tree", "--out", tmp_path / "out", "--shard-size", 2], list[str]()
    real = nyu.steps_of

    def stop(depth, what):
        opened.append(str(what))
        if len(opened) == 4:
            raise KeyboardInterrupt
        return real(depth, what)

    monkeypatch.setattr(nyu, "steps_of", stop)
    assert main([str(word) for word in words]) != 0
    first = tmp_path / "out/train-0000.tar"
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [first.name, "train-0001.tar"]
    before = first.stat().st_mtime_ns
    converted(*words)
    assert first.stat().st_mtime_ns == before
    assert len(opened) == 4 + (5 - 3) + 2, "of the five and the two, what had been written is not read again"
    assert len(members(*(tmp_path / "out").glob("train-*.tar"))) == 5


def _spoil_depth(folder, data):
    (folder / "a0.depth.png").write_bytes(data)


BAD = [
    (lambda f: _spoil_depth(f, png(np.zeros(SIDES, np.uint8))), "a0.png and its labels: its depth.png has the mode L"),
    (lambda f: _spoil_depth(f, png(np.zeros((3, 8), np.uint16))), "the image is 8 x 6 and its label 8 x 3"),
    (lambda f: _spoil_depth(f, b"no png"), "a0.png and its labels: cannot identify"),
    (lambda f: (f / "a0.depth.png").unlink(), "1 labels of 3 images are missing, the first"),
    (lambda f: (f / "a0.panoptic.json").unlink(), "1 labels of 3 images are missing, the first"),
    (lambda f: (f / "a0.panoptic.json").write_text('{"segments_info": []}'), "its panoptic.png has segments that"),
    (lambda f: (f.parent / "categories.json").write_text("[]"), "nothing says the categories: give --categories"),
    (lambda f: (f.parent / "categories.json").write_text("[7]"), "has no categories (TypeError"),
]


@pytest.mark.parametrize(("spoil", "complaint"), BAD, ids=[complaint[:40] for _, complaint in BAD])
def test_a_damaged_folder_is_told_by_the_name_of_the_file(tmp_path, capsys, spoil, complaint):
    words = pairs(tmp_path / "mine")
    spoil(tmp_path / "mine")
    assert main([*map(str, words), "--out", str(tmp_path / "out")]) == 2
    assert complaint in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.tar"))


def test_what_is_not_of_a_form_is_refused(tmp_path, capsys, monkeypatch):
    outs = (tmp_path / f"out{number}" for number in range(99))

    def refused(*words, part):
        assert main([*map(str, words), "--out", str(next(outs))]) == 2
        complaint = capsys.readouterr().err
        assert part in complaint, complaint

    fastdepth(tmp_path / "tree", train=2, val=1)
    (tmp_path / "x").write_bytes(b"x")
    refused("nyu", tmp_path, part="no .h5 file in")
    with h5py.File(tmp_path / "tree/val/official/00001.h5", "r+") as file:
        file["depth"][0, 0] = np.nan
    refused("nyu", tmp_path / "tree", part="00001.h5 has depths from nan to nan m")
    mat, splits = labeled_mat(tmp_path / "mat")
    refused("nyu-labeled", splits, "--splits", splits, part="cannot be read")
    refused("nyu-labeled", mat, "--splits", tmp_path / "none.mat", part="none.mat is no file: give splits.mat")
    refused("sync", tmp_path / "mat", part="no rgb_*.jpg in")
    words, _ = coco(tmp_path / "coco")
    refused(*words[:3], tmp_path / "x", *words[4:], part="neither a folder nor a zip of PNGs")
    refused(*words[:5], tmp_path / "x", part="x is no JSON of panoptic annotations")
    refused("coco", tmp_path, *words[2:], part="4 of 4 images are not in")
    told = json.loads((tmp_path / "coco/panoptic.json").read_text())
    told["annotations"][0]["file_name"] = "../x"
    (tmp_path / "coco/panoptic.json").write_text(json.dumps(told))
    refused(*words, part="names of files are without a folder")
    refused("pairs", tmp_path / "home", part="has 0 images")
    refused("pairs", tmp_path, "--unit-m", 0, part="a step of depth is above 0 metres")
    refused(*pairs(tmp_path / "mine")[:2], part="nothing says what a step is in metres: give --unit-m")
    monkeypatch.setitem(os.sys.modules, "h5py", None)
    refused("nyu", tmp_path / "tree", part="read by h5py, which is not installed: pip install 'vqscale[convert]'")


def test_all_sets_are_looked_at_before_one_is_written(tmp_path):
    fastdepth(tmp_path / "tree")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/val-0000.tar").write_bytes(b"")
    plans = [(part, nyu.tree(tmp_path / "tree", part)) for part in ("train", "val")]
    make.write_all(plans, tmp_path / "out", 1000)
    assert (tmp_path / "out/val-0000.tar").read_bytes() == b"", "shards that somebody brought are nobody else's"
