"""The order of samples: each once an epoch, the same global batch on any number of ranks and workers, exact resume."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_files import SIZE, colour, read_slowly, write_shards, write_tar
from torch.utils.data import Dataset

from vqscale.data.config import ImagesConfig
from vqscale.data.order import Order, permutation
from vqscale.data.samples import SampleBatch, SampleStream
from vqscale.data.shards.workers import read, room

COUNTS = [5, 9, 0, 7, 10]  # 31 samples, a prime


@pytest.fixture(autouse=True)
def _no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def config(tmp_path: Path) -> ImagesConfig:
    write_shards(tmp_path / "data", COUNTS)
    shards = str(tmp_path / "data/s-{0..4}.tar")
    return ImagesConfig(shards, image_size=SIZE - 2, resize=SIZE, window_shards=2, num_workers=0)


def with_workers(config: ImagesConfig, workers: int) -> ImagesConfig:
    return ImagesConfig(**{**vars(config), "num_workers": workers})


def take(
    config: ImagesConfig, count: int, consumed: int = 0, world: int = 1, batch: int = 8, seed: int = 3
) -> list[SampleBatch]:
    """The next `count` global batches: those of all ranks, joined."""
    streams = [SampleStream(config, batch=batch, rank=rank, world=world, seed=seed) for rank in range(world)]
    steps = zip(*(islice(stream.batches(consumed), count) for stream in streams), strict=True)
    return [join(parts) for parts in steps]


def join(parts: tuple[SampleBatch, ...]) -> SampleBatch:
    tensors = ("samples", "labels", "valid", "numbers")
    lists = {name: [entry for part in parts for entry in getattr(part, name)] for name in ("keys", "broken")}
    return SampleBatch(**{name: torch.cat([getattr(part, name) for part in parts]) for name in tensors}, **lists)


def same(one: list[SampleBatch], other: list[SampleBatch]) -> bool:
    """Bit for bit, but for `broken`."""
    return len(one) == len(other) and all(
        torch.equal(a.samples, b.samples)
        and torch.equal(a.labels, b.labels)
        and torch.equal(a.valid, b.valid)
        and torch.equal(a.numbers, b.numbers)
        and a.keys == b.keys
        for a, b in zip(one, other, strict=True)
    )


def facts(batches: list[SampleBatch]) -> list[tuple[str, int, tuple[int, ...]]]:
    """(key, label, colour) of every sample, to compare with read_slowly."""
    found = []
    for batch in batches:
        pixels = ((batch.samples[:, :, 0, 0] + 1) * 127.5).round().int().tolist()
        for key, label, pixel, valid in zip(
            batch.keys, batch.labels.tolist(), pixels, batch.valid.tolist(), strict=True
        ):
            if valid:
                found.append((key, label, tuple(pixel)))
    return found


def test_permutation_is_frozen_and_a_permutation() -> None:
    assert permutation(8, 5).tolist() == [7, 4, 3, 5, 6, 2, 0, 1]
    assert sorted(permutation(1000, 3).tolist()) == list(range(1000))


@pytest.mark.parametrize("window", [0, 1, 2, 3, 100])
@pytest.mark.parametrize("counts", [[5], [3, 0, 4], [0, 7, 0, 0, 2, 5, 1], [10] * 7])
def test_order_has_each_sample_once_an_epoch_and_windows_of_shards(counts: list[int], window: int) -> None:
    order = Order(np.array(counts), seed=1, window_shards=window)
    total = sum(counts)
    shard_of = np.repeat(np.arange(len(counts)), counts)
    for epoch in range(3):
        drawn = [order[number] for number in range(epoch * total, (epoch + 1) * total)]
        assert [when for when, _ in drawn] == [epoch] * total
        assert sorted(sample for _, sample in drawn) == list(range(total))
        for number, (_, sample) in enumerate(drawn, start=epoch * total):
            near = order.shards_of(number)
            assert shard_of[sample] in near
            assert len(near) <= (window or len(counts))
    if total > 10:
        assert [order[n][1] for n in range(total)] != [order[n][1] for n in range(total, 2 * total)]
        assert [order[n][1] for n in range(total)] != [Order(np.array(counts), 2, window)[n][1] for n in range(total)]


def test_samples_of_one_shard_come_in_another_order_every_epoch() -> None:
    order = Order(np.array([30]), seed=1, window_shards=1)
    epochs = [tuple(order[number][1] for number in range(e * 30, (e + 1) * 30)) for e in range(4)]
    assert len(set(epochs)) == 4
    assert tuple(range(30)) not in epochs


def test_the_next_window_is_the_one_that_comes() -> None:
    order = Order(np.array([4] * 7), seed=0, window_shards=3)
    windows = [order.shards_of(number) for number in range(60)]
    for number in range(40):
        later = next(window for window in windows[number:] if window != windows[number])
        assert order.shards_of(number, ahead=1) == later


def test_random_access_to_the_order_equals_going_through_it() -> None:
    order = Order(np.array(COUNTS), seed=5, window_shards=2)
    line = [order[number] for number in range(200)]
    jumping = Order(np.array(COUNTS), seed=5, window_shards=2)
    for number in permutation(200, 1):
        assert jumping[int(number)] == line[number]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_every_sample_with_its_key_label_and_pixels(config: ImagesConfig, workers: int) -> None:
    config = with_workers(config, workers)
    expected = read_slowly([str(Path(config.patterns[0]).parent / f"s-{shard}.tar") for shard in range(len(COUNTS))])
    assert expected[30] == ("00030", 30 % 7, colour(30))
    found = facts(take(config, 31, world=2, batch=4))  # 124 samples: four epochs
    for epoch in range(4):
        assert sorted(found[epoch * 31 : (epoch + 1) * 31]) == expected
    assert found[:31] != expected
    assert found[:31] != found[31:62]


def test_the_global_batch_is_the_same_on_any_number_of_ranks_and_workers(config: ImagesConfig) -> None:
    alone = take(config, 9)
    assert alone[0].samples.shape == (8, 3, SIZE - 2, SIZE - 2)
    assert alone[0].samples.dtype == torch.float32
    assert same(take(config, 9, world=2), alone)
    assert same(take(config, 9, world=4), alone)
    assert same(take(with_workers(config, 2), 9, world=2), alone)
    assert not same(take(config, 9, seed=4), alone)


@pytest.mark.parametrize("step", [1, 3, 4, 11])  # before, across and far beyond the end of an epoch
def test_a_resumed_stream_goes_on_at_the_exact_next_sample(config: ImagesConfig, step: int) -> None:
    uninterrupted = take(config, step + 5)
    assert same(take(config, 5, consumed=step * 8), uninterrupted[step:])
    assert same(take(with_workers(config, 2), 5, consumed=step * 8, world=2), uninterrupted[step:])
    other_batch = take(config, 10, consumed=step * 8, batch=4)  # the order goes by samples, not by steps
    assert [key for b in other_batch for key in b.keys] == [key for b in uninterrupted[step:] for key in b.keys]


def test_augmentation_depends_on_epoch_and_sample_alone(tmp_path: Path) -> None:
    """A gradient image, so that the place of the crop shows in the pixels."""

    ramp = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    write_tar(tmp_path / "one.tar", [("a.png", file.getvalue())])
    config = ImagesConfig(str(tmp_path / "one.tar"), image_size=8, resize=16, num_workers=0)
    crops = take(config, 3, batch=8)
    corners = {tuple(image[:, 0, 0].tolist()) for batch in crops for image in batch.samples}
    assert len(corners) > 15  # 24 epochs of one sample at 81 places
    assert same(take(config, 6, batch=4, consumed=0)[:1], take(config, 1, batch=4))
    again = torch.cat([batch.samples for batch in take(config, 6, batch=4)])
    assert torch.equal(again, torch.cat([batch.samples for batch in crops]))


@pytest.mark.parametrize(("world", "batch"), [(1, 8), (2, 8), (4, 8), (3, 12), (1, 31), (2, 100)])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_sample_once_in_order(config: ImagesConfig, world: int, batch: int, workers: int) -> None:
    config = with_workers(config, workers if world < 3 else 0)
    streams = [SampleStream(config, batch=batch, rank=rank, world=world, train=False) for rank in range(world)]
    parts = [list(stream.batches(0)) for stream in streams]
    assert {len(part) for part in parts} == {-(-31 // batch)}  # the same number of steps on every rank
    assert {len(b.keys) for part in parts for b in part} == {batch // world}
    joined = [join(step) for step in zip(*parts, strict=True)]
    shards = [str(Path(config.patterns[0]).parent / f"s-{shard}.tar") for shard in range(len(COUNTS))]
    assert facts(joined) == read_slowly(shards)
    last = joined[-1]
    assert torch.equal(last.numbers == -1, ~last.valid)
    assert not last.samples[~last.valid].any()
    assert set(last.labels[~last.valid].tolist()) <= {-1}


def test_a_stream_leaves_the_random_numbers_of_the_run_alone(config: ImagesConfig) -> None:
    before = torch.get_rng_state()
    next(SampleStream(config, batch=8).batches(0))
    next(SampleStream(with_workers(config, 1), batch=8).batches(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_that_does_not_divide_says_what_would(config: ImagesConfig) -> None:
    with pytest.raises(ValueError, match=r"batch of 10 samples does not divide by 4 processes.*8 or 12"):
        SampleStream(config, batch=10, rank=0, world=4)


class Rooms(Dataset[tuple[bool, torch.Tensor]]):
    """For a list of numbers: whether the memory was shared before it was handed over, and the numbers."""

    def __getitems__(self, numbers: list[int]) -> tuple[bool, torch.Tensor]:
        out = room(2, len(numbers))
        out[:] = torch.tensor(numbers)
        return out.is_shared(), out


@pytest.mark.parametrize("count", [0, 2])
def test_what_a_worker_makes_is_shared_and_not_copied(count: int) -> None:
    found = list(read(Rooms(), [[3, 4, 5], [6], [7, 8]], count, rank=0, key="data.num_workers"))
    assert [shared for shared, _ in found] == [count > 0] * 3
    assert [out.tolist() for _, out in found] == [[[3, 4, 5]] * 2, [[6]] * 2, [[7, 8]] * 2]


def test_workers_outlive_the_signals_of_the_run_and_end_with_the_stream(config: ImagesConfig) -> None:
    others = set(multiprocessing.active_children())
    batches = SampleStream(with_workers(config, 2), batch=8, seed=3).batches(0)
    first = [next(batches), next(batches)]  # one of each worker: both have begun, and know what to do with signals
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        for worker in workers:
            os.kill(worker.pid, number)
    assert same(first + list(islice(batches, 19)), take(config, 21))
    assert all(worker.is_alive() for worker in workers)
    batches.close()
    del batches
    deadline = time.monotonic() + 10
    while set(multiprocessing.active_children()) - others and time.monotonic() < deadline:
        time.sleep(0.05)
    assert set(multiprocessing.active_children()) <= others


def test_a_worker_that_is_killed_is_an_error_that_says_so(config: ImagesConfig) -> None:
    others = set(multiprocessing.active_children())
    batches = SampleStream(with_workers(config, 1), batch=8).batches(0)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    os.kill(worker.pid, signal.SIGKILL)
    # torch raises where the main process is when it hears of the death: in the stream, or in whoever reads from it
    told = r"rank 0 lost one of its 1 reading processes.*num_workers|DataLoader worker \(pid \d+\) is killed by signal"
    with pytest.raises(RuntimeError, match=told):
        list(islice(batches, 50))
