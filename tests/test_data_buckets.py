"""Images of several shapes: which bucket each is in, batches of one bucket on all ranks, resume, what is cut off."""

from __future__ import annotations

import io
import math
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import prior_runs
import pytest
import torch
from PIL import Image
from shard_files import colour, write_tar

from vqscale import config as configuration
from vqscale.data import samples
from vqscale.data.buckets import BucketPictures
from vqscale.data.config import ImagesConfig
from vqscale.data.config_buckets import BucketsConfig, images_as_trained
from vqscale.data.order_buckets import BucketOrder
from vqscale.data.pixels import Pictures, sides_of
from vqscale.data.samples import SampleBatch, SampleStream
from vqscale.data.shards.index import build
from vqscale.train.config import PriorRun

BUCKETS = ((8, 8), (8, 12), (12, 8))
SIDES = ((10, 10), (9, 16), (20, 11), (40, 41), (8, 11), (100, 40), (16, 20))  # (height, width) of pictures in turn
COUNTS = [11, 17, 0, 14]  # 42 pictures


@pytest.fixture(autouse=True)
def _no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def picture(sides: tuple[int, int], number: int, **how: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", sides[::-1], colour(number)).save(file, "PNG", **how)
    return file.getvalue()


@pytest.fixture
def config(tmp_path: Path) -> BucketsConfig:
    number = 0
    for shard, count in enumerate(COUNTS):
        members = [(f"{n:03d}.png", picture(SIDES[n % 7], n)) for n in range(number, number + count)]
        write_tar(tmp_path / f"s-{shard}.tar", members)
        number += count
    return BucketsConfig(f"{tmp_path}/s-{{0..3}}.tar", buckets=BUCKETS, window_shards=2, num_workers=0)


def nearest(sides: tuple[int, int]) -> int:
    """The bucket of a picture, slowly: the least ratio of aspects."""
    ratios = [(sides[1] / sides[0]) / (width / height) for height, width in BUCKETS]
    return min(range(len(BUCKETS)), key=lambda b: (max(ratios[b], 1 / ratios[b]), BUCKETS[b][1] / BUCKETS[b][0]))


WHERE = [nearest(SIDES[n % 7]) for n in range(42)]


def take(
    config: BucketsConfig, count: int, consumed: int = 0, world: int = 1, batch: int = 6, **how: int
) -> list[list[SampleBatch]]:
    """For each of the next `count` steps the batches of all ranks."""
    streams = [SampleStream(config, batch, rank, world, seed=3, **how) for rank in range(world)]
    return [list(parts) for parts in zip(*(islice(s.batches(consumed), count) for s in streams), strict=True)]


def numbers(steps: list[list[SampleBatch]]) -> list[list[int]]:
    return [[number for part in parts for number in part.numbers.tolist()] for parts in steps]


def test_a_picture_is_in_the_bucket_of_the_nearest_aspect_and_comes_in_its_shape(config: BucketsConfig) -> None:
    for parts in take(config, 30):
        (batch,) = parts
        (bucket,) = {WHERE[number] for number in batch.numbers.tolist()}
        assert batch.samples.shape == (6, 3, *BUCKETS[bucket])
        for number, sample in zip(batch.numbers.tolist(), batch.samples, strict=True):
            assert ((sample[:, 0, 0] + 1) * 127.5).round().tolist() == list(colour(number))
        assert batch.enlarged == sum(
            SIDES[n % 7][0] < BUCKETS[bucket][0] or SIDES[n % 7][1] < BUCKETS[bucket][1] for n in batch.numbers.tolist()
        )


@pytest.mark.parametrize("consumed", [0, 6, 42, 42 * 9 // 6 * 6 + 24])
def test_a_resumed_stream_goes_on_with_the_next_step_on_any_number_of_ranks_and_workers(
    config: BucketsConfig, consumed: int
) -> None:
    line = take(config, consumed // 6 + 9)[consumed // 6 :]
    again = {
        "ranks": take(config, 9, consumed, world=2),
        "more ranks": take(config, 9, consumed, world=3),
        "workers": take(BucketsConfig(**{**vars(config), "num_workers": 2}), 9, consumed),
    }
    for steps in again.values():
        assert numbers(steps) == numbers(line)
        for parts, (whole,) in zip(steps, line, strict=True):
            assert len({part.samples.shape for part in parts}) == 1
            assert torch.equal(torch.cat([part.samples for part in parts]), whole.samples)
    cut = take(config, 27, consumed, batch=2, accumulation=3)
    assert [n for step in numbers(cut) for n in step] == [n for step in numbers(line) for n in step]


def test_no_picture_is_left_out_and_every_bucket_has_its_share_of_steps() -> None:
    """Of buckets of 37, 12 and 5 samples and steps of 4: after each of its own epochs every sample came as often."""
    bucket_N = np.random.default_rng(0).permutation([0] * 37 + [1] * 12 + [2] * 5)
    order = BucketOrder(np.array([20, 0, 34]), bucket_N, 3, step=4, seed=1, window=1)
    drawn = [order[number] for number in range(54 * 20)]
    for bucket, size in enumerate((37, 12, 5)):
        mine = [sample for _, sample in drawn if bucket_N[sample] == bucket]
        assert abs(len(mine) - 20 * size) < 2 * 4
        for epoch in range(len(mine) // size):
            part = mine[epoch * size : (epoch + 1) * size]
            assert sorted(part) == np.flatnonzero(bucket_N == bucket).tolist()
    for step in range(0, 270, 7):
        assert len({int(bucket_N[order[step * 4 + within][1]]) for within in range(4)}) == 1
    fresh = BucketOrder(np.array([20, 0, 34]), bucket_N, 3, step=4, seed=1, window=1)
    assert [fresh[number] for number in (1000, 3, 517)] == [drawn[number] for number in (1000, 3, 517)]
    other = BucketOrder(np.array([20, 0, 34]), bucket_N, 3, step=4, seed=2, window=1)
    assert [other[number] for number in range(200)] != drawn[:200]
    shard_of = np.repeat([0, 2], [20, 34])
    for number in range(0, 600, 4):
        assert shard_of[order[number][1]] in order.shards_of(number)


@pytest.mark.parametrize(("world", "batch"), [(1, 4), (2, 8), (3, 9), (2, 100)])
def test_evaluation_sees_every_picture_once_in_batches_of_one_shape(
    config: BucketsConfig, world: int, batch: int
) -> None:
    streams = [SampleStream(config, batch, rank, world, train=False) for rank in range(world)]
    steps = [list(parts) for parts in zip(*(list(s.batches()) for s in streams), strict=True)]
    assert len(steps) == sum(-(-count // batch) for count in Counter(WHERE).values())
    for parts in steps:
        assert len({part.samples.shape for part in parts}) == 1
        assert all(torch.equal(part.numbers == -1, ~part.valid) for part in parts)
    assert sorted(number for step in numbers(steps) for number in step if number >= 0) == list(range(42))


def test_a_broken_picture_is_met_and_replaced_by_one_of_its_bucket(config: BucketsConfig, tmp_path: Path) -> None:
    members = [(f"{n:03d}.png", picture(SIDES[n % 7], n)) for n in range(42)]
    for at in (1, 8):  # (9, 16): its head says the bucket, and its end is missing
        members[at] = (members[at][0], members[at][1][:45])
    members[3] = (members[3][0], b"no picture")
    write_tar(tmp_path / "broken.tar", members)
    broken = BucketsConfig(str(tmp_path / "broken.tar"), buckets=BUCKETS, num_workers=0)
    met = [line for (batch,) in take(broken, 14) for line in batch.broken]
    assert {line.split()[1].rstrip(":") for line in met} == {"001", "008", "003"}
    for (batch,) in take(broken, 14):
        assert batch.valid.all()
        assert not {1, 3, 8} & set(batch.numbers.tolist())
        assert len({WHERE[number] for number in batch.numbers.tolist()}) == 1


def test_what_is_cut_off_is_drawn_and_a_square_is_what_the_medium_images_makes_of_it() -> None:
    ramp = np.arange(8 * 24 * 3, dtype=np.uint8).reshape(8, 24, 3)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    reads, out = BucketPictures(BucketsConfig("x", buckets=((8, 8),), flip=True)), torch.empty(3, 8, 8)
    seen = set()
    for seed in range(40):
        assert not reads.sample([file.getvalue()], seed, out)
        seen.add(tuple(out[0, 0].tolist()))
    assert len(seen) > 30
    reads.sample([file.getvalue()], None, out)
    expected = torch.empty(3, 8, 8)
    Pictures(ImagesConfig("x", image_size=8)).sample([file.getvalue()], None, expected)
    assert torch.equal(out, expected)
    wide = torch.empty(3, 16, 40)
    assert reads.sample([file.getvalue()], None, wide)  # enlarged by 2, 4 of 24 columns are cut off
    assert math.isclose(wide.mean().item(), (ramp[:, 2:22].mean() / 127.5) - 1, abs_tol=0.02)


def test_sides_are_those_of_the_upright_picture_and_the_index_keeps_them(config: BucketsConfig) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert sides_of(picture((3, 5), 0, exif=exif)) == (5, 3)
    file = io.BytesIO()
    Image.new("RGB", (70, 50)).save(file, "JPEG", exif=exif, icc_profile=b"p" * 200_000)
    index = build(config)
    assert index.samples.sides.tolist() == [list(SIDES[n % 7]) for n in range(42)]
    again = build(config)  # from its file
    assert np.array_equal(again.samples.sides, index.samples.sides)
    assert again.fingerprint() == index.fingerprint()
    plain = build(ImagesConfig(config.shards))
    assert plain.samples.sides.shape == (42, 0)
    assert plain.fingerprint() != index.fingerprint()
    write_tar(Path(config.patterns[0]).parent / "long.tar", [("a.jpg", file.getvalue())])
    long = build(BucketsConfig(str(Path(config.patterns[0]).parent / "long.tar")))
    assert long.samples.sides.tolist() == [[70, 50]], "a profile longer than the head that is read first"


def test_a_bucket_with_too_few_pictures_is_refused_before_processes_meet(config: BucketsConfig) -> None:
    samples.prepare(config, 6)
    few = min(Counter(WHERE).values())
    with pytest.raises(
        ValueError, match=rf"a batch takes {few + 1} images of one bucket.* 8 x 8: \d+, 8 x 12: .*lower"
    ):
        samples.prepare(config, few + 1)
    with pytest.raises(ValueError, match="of one bucket"):
        SampleStream(config, few, accumulation=2)
    assert [key for key, _ in BucketsConfig("x", buckets=((8, 8), (16, 16))).problems()] == ["buckets"]
    assert [key for key, _ in BucketsConfig("x", buckets=()).problems()] == ["buckets"]
    assert [key for key, _ in BucketsConfig("x", buckets=((0, 8),)).problems()] == ["buckets"]


def test_a_prior_refuses_samples_of_several_shapes(tmp_path: Path) -> None:
    shards = "data.train={medium: buckets, shards: x.tar, buckets: [[8, 8], [4, 16]]}"
    path = prior_runs.write_config(tmp_path, tmp_path, shards, "data.val=null", "tokenizer=somewhere")
    with pytest.raises(configuration.ConfigError, match="train has images of 2 shapes, and a prior has one grid"):
        configuration.load(PriorRun, path)


def test_a_look_takes_the_buckets_of_the_card_unless_it_asks_for_others() -> None:
    card = {"buckets": [[8, 8], [8, 12]], "interpolation": "sampled"}
    trained = images_as_trained("x", 0, card, None, None, None)
    assert (trained.shapes, trained.interpolation) == (((3, 8, 8), (3, 8, 12)), "sampled")
    assert images_as_trained("x", 0, card, None, [(16, 8)], None).shapes == ((3, 16, 8),)
    assert images_as_trained("x", 0, card, 32, None, None).shapes == ((3, 32, 32),)
    for stranger in (5, "8x8", [8, 8], [[8]], [["8", 8]]):
        with pytest.raises(ValueError, match="pairs of a height and a width in pixels: give --image-size"):
            images_as_trained("x", 0, {"buckets": stranger}, None, None, None)
