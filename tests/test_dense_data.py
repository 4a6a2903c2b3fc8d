"""Samples of several members: where they lie, how image and labels stay one picture, and what is broken of them."""

from __future__ import annotations

import hashlib
import io
import json
import random
import struct
import zlib

import dense_files
import numpy as np
import pytest
import torch
from dense_files import CATEGORIES, CLASSES, depth_sample, image, painted, panoptic_sample, png, segment
from PIL import Image
from shard_files import read_slowly, write_shards, write_tar

from vqscale import config as configuration
from vqscale.data import dense, panoptic
from vqscale.data.config import ImagesConfig, MediumConfig
from vqscale.data.config_dense import CategoryConfig, DepthConfig, PanopticConfig
from vqscale.data.pixels import some_box
from vqscale.data.samples import SampleStream, medium
from vqscale.data.shards.index import build
from vqscale.data.views import Source

LISTED = tuple(CategoryConfig(**{**category, "isthing": bool(category["isthing"])}) for category in CATEGORIES)


def depth(path, side=8, **options):
    settings = {"image_size": side, "crop": "whole", "flip": False, "unit_m": 0.001, "num_workers": 0}
    return DepthConfig(str(path), **{**settings, "index_dir": f"{path}.index", **options})


def segments(path, side=8, **options):
    settings = {"image_size": side, "crop": "whole", "flip": False, "categories": LISTED, "num_workers": 0}
    return PanopticConfig(str(path), **{**settings, "index_dir": f"{path}.index", **options})


def evaluated(config, batch=4):
    return next(SampleStream(config, batch, train=False).batches())


def only(config):
    """The one sample of a shard, and what was said of it if it is broken."""
    batch = evaluated(config, 1)
    return batch.samples[0], batch.broken


# --- members


def test_a_sample_is_read_with_all_its_members(tmp_path):
    path = dense_files.depth_shard(tmp_path / "a.tar", 3)
    batch = evaluated(depth(path), 3)
    steps = np.arange(1000, 1640, 10).reshape(8, 8) / 1000
    steps[0, 0] = 0
    for number, sample in enumerate(batch.samples):
        pixels = torch.from_numpy(image(seed=number)).permute(2, 0, 1)
        assert torch.equal(sample[:3], pixels / 127.5 - 1)
        assert torch.allclose(sample[3].double(), torch.from_numpy(steps), atol=1e-6)
    assert batch.keys == ["000", "001", "002"]
    assert batch.broken == []


def test_indices_of_other_members_have_files_of_their_own_and_images_keep_theirs(tmp_path):
    path = dense_files.depth_shard(tmp_path / "a.tar", 2)
    as_images = ImagesConfig(path, image_size=8, index_dir=str(tmp_path / "index"))
    one, other = build(as_images), build(depth(path, index_dir=str(tmp_path / "index")))
    assert (one.samples.sizes.shape, other.samples.sizes.shape) == ((2, 1), (2, 2))
    assert one.fingerprint() != other.fingerprint()
    name = hashlib.blake2b(path.encode(), digest_size=12).hexdigest()
    files = {file.name for file in (tmp_path / "index").glob("*.npz")}
    assert len(files) == 2
    assert f"index-{name}.npz" in files


def test_the_fingerprint_of_images_is_that_of_one_place_a_sample(tmp_path):
    paths = write_shards(tmp_path, [3, 2])
    index = build(ImagesConfig(tuple(paths), image_size=8, index_dir=str(tmp_path / "index")))
    digest = hashlib.blake2b(np.array([3, 2]).tobytes(), digest_size=16)
    kinds = (np.int64, np.uint32, np.int32, np.int64, np.uint8)
    keys = [key for key, _, _ in read_slowly(paths)]
    ends, letters = np.cumsum([len(key) for key in keys]), np.frombuffer("".join(keys).encode(), np.uint8)
    places = index.samples.offsets.tolist(), index.samples.sizes.tolist()
    flat = [[row[0] for row in rows] for rows in places]
    for values, kind in zip((*flat, [number % 7 for number in range(5)], ends, letters), kinds, strict=True):
        digest.update(np.array(values, dtype=kind).tobytes())
    assert index.fingerprint() == digest.hexdigest()


@pytest.mark.parametrize("lacking", ["depth.png", "png"])
def test_a_sample_that_lacks_a_member_is_a_broken_one(tmp_path, lacking):
    members = [m for n in range(4) for m in depth_sample(f"{n}", image(seed=n), np.ones((8, 8), np.uint16))]
    path = write_tar(tmp_path / "a.tar", [m for m in members if m[0] != f"2.{lacking}"])
    batch = evaluated(depth(path))
    assert batch.valid.tolist() == [True, True, False, True]
    assert not batch.samples[2].any()
    (told,) = batch.broken
    wanted = {"depth.png": "no depth.png among", "png": "no jpg/jpeg/png/webp among"}[lacking]
    assert f"a.tar 2: ValueError: {wanted} its members, which images with depth need" in told
    taken = next(SampleStream(depth(path), 8).batches())
    assert taken.valid.all()
    assert "2" not in taken.keys
    (views,) = Source(depth(path), "flip").batches([[0, 2]])
    assert views.valid.tolist() == [True, False]
    assert views.broken[0][:2] == (2, "2")
    assert torch.equal(views.samples[0, 1], views.samples[0, 0].flip(-1))


def test_shards_without_labels_are_an_error_that_names_the_members(tmp_path):
    paths = write_shards(tmp_path, [2])
    with pytest.raises(ValueError, match=r"no images with depth in 1 shards.*and a member depth\.png"):
        build(depth(paths[0]))


# --- one box and flip


def test_image_and_labels_are_cut_and_mirrored_as_one(tmp_path):
    """The picture is its own label: red and green say the pixel, which the depth says again."""
    rows, columns = np.mgrid[:40, :60]
    pixels = np.stack([rows * 4, columns * 4, 0 * rows], -1).astype(np.uint8)
    path = write_tar(tmp_path / "a.tar", depth_sample("0", pixels, (1 + rows * 60 + columns).astype(np.uint16)))
    config = depth(path, side=16, crop="resized", flip=True, min_area=0.2, unit_m=1.0)
    mirrored = 0
    for seed, batch in zip(range(40), SampleStream(config, 1).batches(), strict=False):
        sample = batch.samples[0].double()
        number = sample[3] - 1
        row, column = number // 60, number % 60
        assert ((sample[0] + 1) * 127.5 / 4 - row).abs().max() <= 1.1, seed
        assert ((sample[1] + 1) * 127.5 / 4 - column).abs().max() <= 1.1, seed
        mirrored += int(column[0, 0] > column[0, -1])
        assert (row[0] == row[0, 0]).all()
        assert (column[:, 0] == column[0, 0]).all()
    assert 10 < mirrored < 30


def test_a_box_is_the_one_of_the_seed_and_labels_are_of_the_nearest_pixel():
    box = some_box((61, 47), 0.05, random.Random(5), 100)
    maps = np.random.default_rng(0).integers(0, 9, (2, 47, 61))
    found = dense.nearest(maps, box, 9)
    left, top, right, bottom = box
    for y in range(9):
        for x in range(9):
            row, column = int((y + 0.5) * (bottom - top) / 9), int((x + 0.5) * (right - left) / 9)
            assert (found[:, y, x] == maps[:, top + row, left + column]).all()


def test_a_sample_depends_on_its_bytes_the_config_and_the_seed_alone(tmp_path):
    config = segments(dense_files.panoptic_shard(tmp_path / "a.tar", 6), side=5, crop="resized", flip=True)
    alone = [batch.samples[0] for _, batch in zip(range(12), SampleStream(config, 1, seed=3).batches(), strict=False)]
    workers = segments(config.shards, side=5, crop="resized", flip=True, num_workers=2)
    parts = [SampleStream(workers, 4, rank, 2, seed=3).batches() for rank in range(2)]
    for first in range(0, 12, 4):
        together = torch.cat([next(part).samples for part in parts])
        assert torch.equal(together, torch.stack(alone[first : first + 4]))
    for part in parts:
        part.close()


@pytest.mark.parametrize(
    ("crop", "size", "box"),
    [
        ("eigen", (480, 640), (41, 45, 601, 471)),
        ("uvim", (480, 640), (41, 54, 601, 480)),
        ("whole", (480, 640), (0, 0, 640, 480)),
        ("eigen", (240, 320), (0, 0, 320, 240)),
    ],
)
def test_evaluation_crops_are_those_of_the_field(tmp_path, crop, size, box):
    height, width = size
    steps = (np.arange(height * width) % 65521).reshape(size).astype(np.uint16)
    path = write_tar(tmp_path / "a.tar", depth_sample("0", image(height, width), steps))
    sample, _ = only(depth(path, side=4, evaluation_crop=crop, unit_m=1.0))
    assert torch.equal(sample[3].double(), torch.from_numpy(dense.nearest(steps[None].astype(float), box, 4)[0]))


# --- depth


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.ones((8, 8), np.uint8), "mode L, of 8 bits and 1 channels"),
        (np.ones((8, 8, 3), np.uint8), "mode RGB, of 8 bits and 3 channels"),
        (np.ones((8, 9), np.uint16), "its image is 8 x 8 and its depth.png 9 x 8"),
    ],
)
def test_what_is_no_depth_is_a_broken_sample(tmp_path, label, message):
    path = write_tar(tmp_path / "a.tar", depth_sample("0", image(), label))
    sample, broken = only(depth(path))
    assert not sample.any()
    assert message in broken[0]


def test_the_unit_of_depth_is_the_configs_or_that_of_info_json_or_an_error(tmp_path):
    steps = np.full((8, 8), 512, np.uint16)
    path = write_tar(tmp_path / "a.tar", depth_sample("0", image(), steps))
    with pytest.raises(ValueError, match=r"unit_m \(val\.\) is None.*no depth\.unit_m above 0: set unit_m"):
        medium(depth(path, unit_m=None))
    (tmp_path / "_info.json").write_text(json.dumps({"depth": {"unit_m": 1 / 256}}))
    assert only(depth(path, unit_m=None))[0][3].unique().tolist() == [2.0]
    assert only(depth(path, unit_m=0.5))[0][3].unique().tolist() == [256.0]
    with pytest.raises(configuration.ConfigError, match="above 0 metres"):
        configuration.parse(MediumConfig, {"medium": "depth", "shards": "x.tar", "unit_m": 0.0})


# --- segments


def test_segments_become_classes_and_instances_and_crowds(tmp_path):
    ids = np.array([[0, 300, 300, 5], [70_000, 300, 300, 5]])
    listed = [segment(70_000, 7), segment(5, 40, iscrowd=1), segment(300, 3)]
    path = write_tar(tmp_path / "a.tar", panoptic_sample("0", image(2, 4), ids, listed))
    sample, broken = only(segments(path, side=4))
    assert broken == []
    # rows are doubled, so the mean row of 70,000 is 2.5, and of the others 1.5
    of = {0: (0, 0, 0), 300: (CLASSES[3], 1, 0), 5: (CLASSES[40], 2, 1), 70_000: (CLASSES[7], 3, 0)}
    for channel in range(3):
        expected = torch.tensor([[float(of[int(id)][channel]) for id in row] for row in ids.repeat(2, 0)])
        assert torch.equal(sample[3 + channel], expected)


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_instances_is_that_of_the_definition(seed):
    draw = np.random.default_rng(seed)
    found = draw.integers(0 if seed % 2 else 1, 12, (draw.integers(1, 9), draw.integers(1, 9))) * 3
    height = found.shape[0]
    places = {}
    for number in set(found.ravel().tolist()) - {0}:
        where = [(y, x) for y, row in enumerate(found.tolist()) for x, value in enumerate(row) if value == number]
        means = [sum(part) / len(where) for part in zip(*where, strict=True)]
        places[number] = (means[1] + height * means[0], number)
    order = {number: place for place, number in enumerate(sorted(places, key=places.get), 1)} | {0: 0}
    assert panoptic.canonical(found).tolist() == [[order[value] for value in row] for row in found.tolist()]


@pytest.mark.parametrize(
    ("ids", "listed", "message"),
    [
        ([[1, 2]], [segment(1, 3)], r"its panoptic.png has segments that its panoptic.json lacks: [2]"),
        ([[1, 1]], [segment(1, 3), segment(9, 3)], r"its panoptic.json has segments that its panoptic.png lacks: [9]"),
        ([[1, 1]], [segment(1, 3), segment(1, 7)], r"its panoptic.json lists segments twice: [1]"),
        ([[1, 1]], [segment(1, 5)], "names the categories [5], which are none of the 4"),
        ([[1, 1], [1, 1]], [segment(1, 3)], "its image is 2 x 1 and its panoptic.png/seg.png 2 x 2"),
    ],
)
def test_labels_that_contradict_themselves_are_broken_samples(tmp_path, ids, listed, message):
    path = write_tar(tmp_path / "a.tar", panoptic_sample("0", image(1, 2), np.array(ids), listed))
    assert message in only(segments(path))[1][0]


def test_a_gray_panoptic_png_is_a_broken_sample(tmp_path):
    members = [("0.png", png(image())), ("0.panoptic.png", png(np.ones((8, 8), np.uint8)))]
    path = write_tar(tmp_path / "a.tar", [*members, ("0.panoptic.json", b'{"segments_info": []}')])
    assert "has the mode L, but ids of segments are in RGB" in only(segments(path))[1][0]


# --- the category of each pixel alone


def gray_of_4_bits(pixels):
    """A PNG that Pillow reads but does not write."""
    rows = b"".join(b"\0" + bytes(row[::2] << 4 | row[1::2]) for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 4, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x)) for name, x in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def by_palette(pixels):
    file = io.BytesIO()
    found = Image.fromarray(pixels.astype(np.uint8), "L")
    painted_P = Image.new("P", found.size)
    painted_P.putdata(list(pixels.ravel().tolist()))
    painted_P.putpalette([value * 7 % 256 for value in range(768)])
    painted_P.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("written", "void"),
    [
        (lambda ids: png(ids.astype(np.uint8)), 255),
        (by_palette, 255),
        (by_palette, 0),
        (lambda ids: png(ids.astype(np.uint16)), 65535),
        (lambda ids: png(ids.astype(np.uint16)), 0),
    ],
)
def test_categories_of_pixels_become_one_segment_a_class(tmp_path, written, void):
    ids = np.array([[90, 3, 90, 3], [7, void, void, 3], [7, 40, 7, 7], [40, 7, 7, 40]])
    path = write_tar(tmp_path / "a.tar", [("0.png", png(image(4, 4))), ("0.seg.png", written(ids))])
    sample, broken = only(segments(path, side=4))
    assert broken == []
    of = {void: (0, 0), 90: (CLASSES[90], 1), 3: (CLASSES[3], 2), 7: (CLASSES[7], 3), 40: (CLASSES[40], 4)}
    assert sample[3:5].tolist() == [
        [[float(of[id][channel]) for id in row] for row in ids.tolist()] for channel in (0, 1)
    ]
    assert not sample[5].any()


def test_a_category_may_have_the_number_0_and_then_0_is_not_void(tmp_path):
    ids = np.array([[0, 255], [0, 300]])
    path = write_tar(tmp_path / "a.tar", [("0.png", png(image(2, 2))), ("0.seg.png", png(ids.astype(np.uint16)))])
    known = tuple(CategoryConfig(number, str(number), isthing=False) for number in (300, 0, 255))
    assert only(segments(path, side=2, categories=known))[0][3].tolist() == [[2, 3], [2, 1]]


def test_the_categories_of_pixels_are_cut_and_mirrored_with_the_image(tmp_path):
    """Red says the category again, by the pixels below."""
    rows, columns = np.mgrid[:40, :60]
    ids = rows // 10 * 6 + columns // 10
    pixels = np.stack([ids * 10] * 3, -1).astype(np.uint8)
    path = write_tar(tmp_path / "a.tar", [("0.png", png(pixels)), ("0.seg.png", png(ids.astype(np.uint8)))])
    known = tuple(CategoryConfig(number, str(number), isthing=False) for number in range(24))
    config = segments(path, side=16, crop="resized", flip=True, min_area=0.2, categories=known)
    mirrored = 0
    for _, batch in zip(range(40), SampleStream(config, 1).batches(), strict=False):
        sample = batch.samples[0]
        numbers = sample[3] - 1
        shown = (sample[0] + 1) * 127.5 / 10
        assert ((shown - numbers).abs() < 0.05).float().mean() > 0.6, "image and labels agree but at borders"
        assert torch.equal(numbers, numbers.round())
        assert len(sample[4].unique()) == len(numbers.unique()) == sample[4].max()
        mirrored += int(numbers[0, 0] > numbers[0, -1])
    assert 10 < mirrored < 30


GRAY = png(np.full((8, 8), 7, np.uint8))
PAINTED = png(painted(np.ones((8, 8), np.int64)))
FACTS = json.dumps({"segments_info": [segment(1, 3)]}).encode()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"seg.png": png(np.full((8, 8), 5, np.uint8))}, "its seg.png has the numbers [5], which are none of the 4 of"),
        ({"seg.png": png(np.full((8, 8), 255, np.uint16))}, "has the numbers [255], which are none of the 4"),
        ({"seg.png": png(np.full((9, 8), 7, np.uint8))}, "its image is 8 x 8 and its panoptic.png/seg.png 8 x 9"),
        ({"seg.png": PAINTED}, "its seg.png has the mode RGB, of 8 bits and 3 channels"),
        ({"seg.png": gray_of_4_bits(np.full((8, 8), 7, np.uint8))}, "its seg.png has the mode L, of 4 bits"),
        ({"seg.png": GRAY, "panoptic.png": PAINTED, "panoptic.json": FACTS}, "it has seg.png and panoptic.png, two"),
        ({"seg.png": GRAY, "panoptic.png": PAINTED}, "it has seg.png and panoptic.png, two labels"),
        ({"panoptic.png": PAINTED}, "no seg.png/panoptic.json among its members, which images with segments need"),
        ({}, "no panoptic.png/seg.png and no seg.png/panoptic.json among its members"),
    ],
)
def test_a_sample_whose_categories_cannot_be_read_is_a_broken_one(tmp_path, labels, message):
    """Between one of categories and one of segments, which are read."""
    spoilt = [("1.png", png(image())), *((f"1.{suffix}", data) for suffix, data in labels.items())]
    whole = [("2.png", png(image())), ("2.panoptic.png", PAINTED), ("2.panoptic.json", FACTS)]
    path = write_tar(tmp_path / "a.tar", [("0.png", png(image())), ("0.seg.png", GRAY), *spoilt, *whole])
    batch = evaluated(segments(path), 3)
    assert batch.valid.tolist() == [True, False, True]
    (told,) = batch.broken
    assert message in told
    assert batch.samples[[0, 2], 3].flatten(1).unique(dim=1).tolist() == [[CLASSES[7]], [CLASSES[3]]]
    taken = next(SampleStream(segments(path), 8).batches())
    assert taken.valid.all()
    assert "1" not in taken.keys


# --- categories


def test_categories_are_a_list_or_a_file_or_those_of_info_json(tmp_path):
    path = dense_files.panoptic_shard(tmp_path / "a.tar", 1)
    expected = only(segments(path))[0]
    with pytest.raises(ValueError, match=r"categories of the segments cannot be had from `_info\.json` beside"):
        medium(segments(path, categories=None))
    for name, content in (("coco.json", CATEGORIES), ("_info.json", {"categories": CATEGORIES})):
        (tmp_path / name).write_text(json.dumps(content))
        asked = None if name == "_info.json" else str(tmp_path / name)
        config = segments(path, categories=asked)
        assert torch.equal(only(config)[0], expected)
        assert config.counts() == (2, 2)
    with pytest.raises(ValueError, match=r"4 categories .* with 3 different ids"):
        medium(segments(path, categories=(*LISTED[:3], LISTED[0])))
    asked = {"medium": "panoptic", "shards": path, "categories": [*CATEGORIES]}
    for category in asked["categories"]:
        category["isthing"] = bool(category["isthing"])
    assert configuration.parse(MediumConfig, asked).categories == LISTED


def test_ids_of_segments_are_those_of_coco():
    ids = np.array([[0, 255, 256, 65535], [65536, 16_777_215, 70_000, 1]])
    assert (panoptic.segment_ids(png(painted(ids))) == ids).all()
