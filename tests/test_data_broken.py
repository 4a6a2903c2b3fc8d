"""Damaged samples and shards: what is whole is kept; what is broken is replaced, the same everywhere, and reported."""

from __future__ import annotations

import multiprocessing
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
from shard_files import SIZE, colour, member_offset, patch, png, sample, write_shards, write_tar
from test_data_order import facts, join, same, take

from vqscale.data.config import ImagesConfig
from vqscale.data.samples import BrokenData, SampleStream

BLOCK = 512


@pytest.fixture(autouse=True)
def _no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Three shards of ten samples: 0..9, 10..19, 20..29."""
    return [Path(path) for path in write_shards(tmp_path / "data", [10, 10, 10])]


def config(shards: list[Path], **options: object) -> ImagesConfig:
    settings = {"image_size": SIZE, "num_workers": 0, "window_shards": 2, **options}
    return ImagesConfig(tuple(map(str, shards)), **settings)


def keys_of(shards: list[Path]) -> list[int]:
    """The samples of an evaluation, checked to be what their keys say."""
    found = facts(list(SampleStream(config(shards), batch=4, train=False).batches(0)))
    for key, label, pixel in found:
        assert (label, pixel) == (int(key) % 7, colour(int(key)))
    return [int(key) for key, _, _ in found]


def damage(shards: list[Path]) -> list[str]:
    stream = SampleStream(config(shards), batch=4, train=False)
    assert next(stream.batches(0)).broken[: len(stream.damage)] == stream.damage
    return stream.damage


def cut(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize("inside", ["header", "data", "between the members of a sample"])
def test_a_truncated_shard_gives_its_whole_samples(shards: list[Path], inside: str) -> None:
    header, data = member_offset(shards[1], "00014.png")
    cut(shards[1], {"header": header + 100, "data": data + 20}.get(inside, header))
    assert keys_of(shards) == [*range(14), *range(20, 30)]
    (line,) = damage(shards)
    assert str(shards[1]) in line
    assert "truncated" in line


def test_a_shard_without_the_mark_of_its_end_is_whole(shards: list[Path]) -> None:
    header, _ = member_offset(shards[1], "00019.png")
    cut(shards[1], header + 2 * BLOCK)
    assert keys_of(shards) == list(range(30))
    assert damage(shards) == []


@pytest.mark.parametrize("content", [b"", b"not a tar at all, but long enough to hold a header" * 40])
def test_a_shard_that_is_no_tar_gives_nothing(shards: list[Path], content: bytes) -> None:
    shards[1].write_bytes(content)
    assert keys_of(shards) == [*range(10), *range(20, 30)]
    (line,) = damage(shards)
    assert str(shards[1]) in line
    assert ("empty" in line) == (content == b"")


@pytest.mark.parametrize("member", ["00014.cls", "00014.png"])
def test_a_damaged_header_costs_one_sample(shards: list[Path], member: str) -> None:
    header, _ = member_offset(shards[1], member)
    patch(shards[1], header + 30, b"\xff\x00\xff")
    assert keys_of(shards) == [n for n in range(30) if n != 14]
    (line,) = damage(shards)
    assert f"damaged header at byte {header}" in line


def test_a_hole_of_zeros_is_not_the_end(shards: list[Path]) -> None:
    begin, _ = member_offset(shards[1], "00013.cls")
    end, _ = member_offset(shards[1], "00016.png")
    patch(shards[1], begin, bytes(end - begin))
    assert keys_of(shards) == [n for n in range(30) if n not in (13, 14, 15, 16)]
    (line,) = damage(shards)
    assert f"damaged header at byte {begin}" in line


def test_a_count_that_info_json_states_is_checked(shards: list[Path]) -> None:
    names = '["s-0.tar", "s-1.tar", "s-2.tar"]'
    text = f'{{"splits": {{"train": {{"filenames": {names}, "shard_lengths": [10, 12, 10]}}}}}}'
    (shards[0].parent / "_info.json").write_text(text)
    assert damage(shards) == [f"{shards[1]}: 10 whole samples, but _info.json states 12"]


def broken_members(kind: str) -> list[tuple[str, bytes]]:
    """Sample 13, broken in one way."""
    whole = png(13)
    label = ("00013.cls", b"6")
    flipped = whole[:50] + bytes(byte ^ 255 for byte in whole[50:60]) + whole[60:]
    return {
        "no image": [label],
        "another member": [label, ("00013.seg.png", whole)],
        "empty image": [label, ("00013.png", b"")],
        "cut image": [label, ("00013.png", whole[: len(whole) // 2])],
        "flipped bytes": [label, ("00013.png", flipped)],
        "not an image": [label, ("00013.png", b"<html>not found</html>")],
    }[kind]


KINDS = ["no image", "another member", "empty image", "cut image", "flipped bytes", "not an image"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_sample_is_replaced_by_the_next_of_the_order(shards: list[Path], kind: str) -> None:
    good = take(config(shards), 12, batch=8)
    members = [m for n in range(10, 20) for m in (broken_members(kind) if n == 13 else sample(n))]
    write_tar(shards[1], members)
    found = take(config(shards), 12, batch=8)
    expected = [int(key) for batch in good for key in batch.keys]
    ahead = [int(key) for batch in take(config(shards), 1, consumed=96, batch=8) for key in batch.keys]
    replaced = [n if n != 13 else after for n, after in zip(expected, [*expected[1:], ahead[0]], strict=True)]
    assert expected.count(13) == 3  # 96 samples, three epochs of thirty and a bit
    assert [int(key) for batch in found for key in batch.keys] == replaced
    assert facts(found) == [(f"{n:05d}", n % 7, colour(n)) for n in replaced]
    reasons = [reason for batch in found for reason in batch.broken]
    assert len(reasons) == 3
    assert len(set(reasons)) == 1
    assert reasons[0].startswith(f"{shards[1]} 00013: ")
    assert all(batch.valid.all() for batch in found)
    # the same on other ranks, with workers, and after a resume
    assert same(take(config(shards), 12, batch=8, world=4), found)
    assert same(take(config(shards, num_workers=2), 12, batch=8, world=2), found)
    assert same(take(config(shards), 5, consumed=56, batch=8), found[7:])
    split = take(config(shards), 12, batch=8, world=4)
    assert [reason for batch in split for reason in batch.broken] == reasons


@pytest.mark.parametrize("world", [1, 4])
def test_evaluation_leaves_a_broken_sample_out(shards: list[Path], world: int) -> None:
    members = [m for n in range(10, 20) for m in (broken_members("cut image") if n == 13 else sample(n))]
    write_tar(shards[1], members)
    streams = [SampleStream(config(shards), batch=8, rank=rank, world=world, train=False) for rank in range(world)]
    steps = [join(parts) for parts in zip(*(stream.batches(0) for stream in streams), strict=True)]
    assert [int(key) for key, _, _ in facts(steps)] == [n for n in range(30) if n != 13]
    assert steps[1].valid.tolist() == [True] * 5 + [False] + [True] * 2
    assert steps[1].keys[5] == "00013"
    assert not steps[1].samples[5].any()
    assert [len(step.broken) for step in steps] == [0, 1, 0, 0]


def test_a_chain_of_broken_samples_is_an_error_that_names_the_shard(shards: list[Path]) -> None:
    members = [m for n in range(10, 20) for m in [(f"{n:05d}.cls", b"0"), (f"{n:05d}.png", b"junk")]]
    write_tar(shards[1], members)
    only = [shards[1], shards[2]]
    others = set(multiprocessing.active_children())
    message = rf"4 samples in a row are broken.*{shards[1]} 0001\d.*max_broken = 3"
    for workers in (0, 1):
        stream = SampleStream(config(only, window_shards=1, max_broken=3, num_workers=workers), batch=4)
        with pytest.raises(BrokenData, match=message) as raised:
            list(islice(stream.batches(0), 9))
        assert raised.tb  # which holds the frames of the stream
        assert set(multiprocessing.active_children()) <= others
    healed = take(config(only, window_shards=1, max_broken=25), 9, batch=4)
    assert {int(key) for batch in healed for key in batch.keys} <= set(range(20, 30))


def test_a_shard_that_shrinks_under_the_run_is_broken_samples(shards: list[Path]) -> None:
    stream = SampleStream(config(shards, max_broken=30), batch=8)
    cut(shards[1], 5 * BLOCK)
    found = list(islice(stream.batches(0), 8))
    lost = {int(key) for batch in found for key in batch.keys} & set(range(10, 20))
    assert not lost
    assert all("when its index was made" in reason for batch in found for reason in batch.broken)


def test_a_shard_that_disappears_under_the_run_is_broken_samples(shards: list[Path]) -> None:
    stream = SampleStream(config(shards, max_broken=30), batch=8)
    shards[1].unlink()
    found = list(islice(stream.batches(0), 8))
    wanted = [stream.order[number][1] for number in range(64)]
    assert sum(len(batch.broken) for batch in found) == sum(
        sample in range(10, 20) for sample in wanted
    )  # each place once
    assert not {int(key) for batch in found for key in batch.keys} & set(range(10, 20))


def test_no_image_at_all_is_an_error(tmp_path: Path) -> None:
    texts = write_tar(tmp_path / "texts.tar", [(f"{n}.txt", b"a caption") for n in range(3)])
    with pytest.raises(ValueError, match=r"no images in 1 shards.*3 samples.*jpg, jpeg, png, webp"):
        SampleStream(config([texts]), batch=2)
    empty = write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(ValueError, match=r"no images in 1 shards.*0 samples"):
        SampleStream(config([empty]), batch=2)


def test_labels_come_from_cls_class_txt_or_json(tmp_path: Path) -> None:
    rows = [
        ("cls", b"5", 5),
        ("class", b" 6\n", 6),
        ("txt", b"7", 7),
        ("txt", b"a dog on a beach", -1),
        ("json", b'{"label": 8, "w": 3}', 8),
        ("json", b'{"cls": 9}', 9),
        ("json", b'{"label": "dog"}', -1),
        ("json", b"{oops", -1),
        ("json", b"[1]", -1),
        ("cls", b"-3", -1),
        ("bin", b"1", -1),
    ]
    members = [m for n, (suffix, data, _) in enumerate(rows) for m in [(f"{n}.{suffix}", data), (f"{n}.PNG", png(n))]]
    path = write_tar(tmp_path / "labels.tar", members)
    (batch,) = SampleStream(config([path]), batch=len(rows), train=False).batches(0)
    assert batch.labels.tolist() == [label for _, _, label in rows]
    assert batch.labels.dtype == torch.int64
    assert batch.valid.all()


def test_a_copy_elsewhere_has_the_same_fingerprint_and_another_content_has_not(
    shards: list[Path], tmp_path: Path
) -> None:
    moved = [Path(shutil.copy(shard, tmp_path)) for shard in shards]
    one = SampleStream(config(shards), batch=2).fingerprint
    assert SampleStream(config(moved), batch=2).fingerprint == one
    assert SampleStream(config(moved[:2]), batch=2).fingerprint != one
    write_tar(moved[0], [m for n in (*range(9), 99) for m in sample(n)])
    assert SampleStream(config(moved), batch=2).fingerprint != one
