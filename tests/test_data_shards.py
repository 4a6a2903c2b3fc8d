"""What names stand for, what tar files hold, and the index that is kept."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from shard_files import SIZE, colour, member_offset, patch, png, sample, write_shards, write_tar
from test_data_order import facts

from vqscale.data.config import ImagesConfig
from vqscale.data.samples import SampleStream
from vqscale.data.shards import cache as cache_module
from vqscale.data.shards import index as index_module
from vqscale.data.shards.cache import ShardCache
from vqscale.data.shards.contents import read_contents
from vqscale.data.shards.index import build
from vqscale.data.shards.patterns import expand


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cache_module, "_PAUSE_S", 0.01)
    return tmp_path / "home" / "vqscale"


def config(shards: str | tuple[str, ...], **options: object) -> ImagesConfig:
    return ImagesConfig(shards, **{"image_size": SIZE, "num_workers": 0, "window_shards": 2, **options})


# --- names


def test_patterns_expand_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, [1, 1, 1, 1])
    names = [f"{tmp_path}/s-{n}.tar" for n in range(4)]
    assert expand([f"{tmp_path}/s-{{0..3}}.tar"]) == names
    assert expand([f"{tmp_path}/s-{{2..3}}.tar::{tmp_path}/s-0.tar"]) == [names[2], names[3], names[0]]
    assert expand([f"{tmp_path}/s-{{3,1}}.tar", names[0]]) == [names[3], names[1], names[0]]
    assert expand([f"{tmp_path}/*.tar"]) == names
    assert expand([f"file:{names[1]}"]) == [names[1]]
    assert expand(["pipe:cat a{0..1}.tar"]) == ["pipe:cat a0.tar", "pipe:cat a1.tar"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand(["s-0.tar"]) == ["s-0.tar"]
    assert expand(["~/s-0.tar"]) == [names[0]]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("s-{0..5}.tar", r"2 of 6 shards do not exist: .*s-4.tar, .*s-5.tar; named by `shards`"),
        ("t-*.tar", r"pattern '.*t-\*.tar' of `shards` matches no file"),
        ("s-0.tar::s-{0..1}.tar", r"s-0.tar comes more than once"),
        (".", r"for a folder write .*/\*.tar"),
        ("s3://bucket/{0..3}.tar", r"nothing opens s3:.*pipe:aws s3 cp"),
    ],
)
def test_names_that_stand_for_nothing_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, message: str
) -> None:
    write_shards(tmp_path, [1, 1, 1, 1])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        expand([pattern])


# --- tar files


def contents(path: Path) -> list[tuple[str, int, bytes]]:
    """(key, label, image bytes) of our reading."""
    with open(path, "rb") as file:
        found = read_contents(file.fileno(), [ImagesConfig.suffixes])
        assert found.damage == ()
        begins = [0, *found.key_ends[:-1].tolist()]
        keys = [found.key_bytes[a:b].tobytes().decode() for a, b in zip(begins, found.key_ends, strict=True)]
        rows = zip(found.offsets[:, 0].tolist(), found.sizes[:, 0].tolist(), strict=True)
        images = [os.pread(file.fileno(), size, offset) for offset, size in rows]
    return list(zip(keys, found.labels.tolist(), images, strict=True))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_is_read_as_tarfile_reads_it(tmp_path: Path, format: int) -> None:
    deep = "a_long_folder_name/" * 6
    names = ["a", "dir.with.dots/b", deep + "c", "d" * 90, "ä/ü"]
    if format != tarfile.USTAR_FORMAT:
        names.append("e" * 300)
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for number, name in enumerate(names):
            for suffix, data in (("JPG", b"image %d" % number * 100), ("cls", b"%d" % number), ("seg.png", b"no")):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(data)
                info.mtime = 1.5 if format == tarfile.PAX_FORMAT else 1  # a fraction needs a PAX header
                tar.addfile(info, io.BytesIO(data))
            folder = tarfile.TarInfo(f"{name}.dir")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            link = tarfile.TarInfo(f"{name}.png")
            link.type, link.linkname = tarfile.SYMTYPE, "elsewhere" * 20
            if format != tarfile.USTAR_FORMAT:
                tar.addfile(link)
        for name in ("__meta__", "no_suffix", "__pycache__/x.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    expected = [(name, number, b"image %d" % number * 100) for number, name in enumerate(names)]
    assert contents(path) == expected
    with tarfile.open(path) as tar:  # and tarfile sees the same
        assert [tar.extractfile(f"{name}.JPG").read() for name in names] == [image for _, _, image in expected]


def test_grouping_is_that_of_webdataset(tmp_path: Path) -> None:
    members = [
        ("a.jpg", b"1"),
        ("a.cls", b"3"),
        ("b/x.y.jpg", b"2"),
        ("b/x.jpeg", b"3"),
        ("a.PNG", b"4"),
        (".hidden.jpg", b"5"),
    ]
    path = write_tar(tmp_path / "g.tar", members)
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    images = [next((s[key] for key in ("jpg", "jpeg", "png") if key in s), b"") for s in theirs]
    assert [(key, image) for key, _, image in contents(path)] == [
        (s["__key__"], image) for s, image in zip(theirs, images, strict=True)
    ]
    assert [key for key, _, _ in contents(path)] == ["a", "b/x", "a"]


def test_shards_of_the_webdataset_writer(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
        for number in range(5):
            writer.write({"__key__": f"k{number}", "png": png(number), "cls": number, "json": {"label": 9}})
    assert contents(tmp_path / "w.tar") == [(f"k{n}", n, png(n)) for n in range(5)]


def test_a_size_in_a_pax_header_counts(tmp_path: Path) -> None:
    """As of members beyond 8 GB, whose size does not fit into the header itself."""
    blocks = b""
    for name, data in (("a.png", png(1) * 9), ("b.png", png(2))):
        info = tarfile.TarInfo(name)
        info.pax_headers = {"size": str(len(data))}
        blocks += info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512)
    (tmp_path / "p.tar").write_bytes(blocks + bytes(1024))
    assert contents(tmp_path / "p.tar") == [("a", -1, png(1) * 9), ("b", -1, png(2))]


def test_a_member_that_comes_twice_is_reported(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "d.tar", [("a.png", png(1)), ("a.PNG", png(2)), ("b.png", png(3))])
    stream = SampleStream(config(str(path)), batch=2, train=False)
    assert stream.damage == [f"{path}: 'a.PNG' comes twice: the first is used"]
    assert [pixel for _, _, pixel in facts(list(stream.batches(0)))] == [colour(1), colour(3)]


# --- the kept index


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that are read from now on."""
    read: list[str] = []
    original = index_module._read_part

    def read_part(cache: ShardCache, shard: str, *wanted: object) -> object:
        read.append(os.path.basename(shard))
        return original(cache, shard, *wanted)

    monkeypatch.setattr(index_module, "_read_part", read_part)
    return read


def test_the_index_is_kept_and_only_changed_shards_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path, [4, 0, 5, 3])
    read = counted(monkeypatch)
    made = config(f"{tmp_path}/s-{{0..3}}.tar", index_dir=str(tmp_path / "index"))
    first = build(made)
    assert sorted(read) == ["s-0.tar", "s-1.tar", "s-2.tar", "s-3.tar"]
    assert [first.key(n) for n in range(len(first))] == [f"{n:05d}" for n in range(12)]
    again = build(made)
    assert len(read) == 4
    assert again.fingerprint() == first.fingerprint()
    assert [again.key(n) for n in range(len(again))] == [f"{n:05d}" for n in range(12)]
    assert again.counts.tolist() == [4, 0, 5, 3]
    write_tar(tmp_path / "s-2.tar", [m for n in range(50, 57) for m in sample(n)])
    changed = build(made)
    assert read[4:] == ["s-2.tar"]
    assert [changed.key(n) for n in range(4, 11)] == [f"{n:05d}" for n in range(50, 57)]
    assert [changed.key(n) for n in range(11, 14)] == ["00009", "00010", "00011"]
    build(config(f"{tmp_path}/s-{{0..2}}.tar", index_dir=str(tmp_path / "index")))  # another list is another index
    assert len(read) == 8


@pytest.mark.parametrize("content", [b"", b"junk" * 100, None])
def test_a_damaged_index_is_made_again(tmp_path: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, [4, 5])
    made = config(f"{tmp_path}/s-{{0..1}}.tar", index_dir=str(tmp_path / "index"))
    first = build(made).fingerprint()
    (file,) = (tmp_path / "index").glob("*.npz")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    read = counted(monkeypatch)
    assert build(made).fingerprint() == first
    assert len(read) == 2
    assert file.read_bytes() == whole


def test_an_interrupted_index_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, [2] * 6)
    made = config(f"{tmp_path}/s-{{0..5}}.tar")
    monkeypatch.setattr(index_module, "_SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(index_module, "_THREADS", 1)
    original = index_module._read_part

    def read_part(cache: ShardCache, shard: str, *wanted: object) -> object:
        if shard.endswith("s-4.tar"):
            raise OSError("the disk went away")
        return original(cache, shard, *wanted)

    monkeypatch.setattr(index_module, "_read_part", read_part)
    with pytest.raises(OSError, match="went away"):
        build(made)
    monkeypatch.setattr(index_module, "_read_part", original)
    read = counted(monkeypatch)
    assert len(build(made)) == 12
    assert "s-0.tar" not in read
    assert "s-4.tar" in read


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    write_shards(tmp_path, [3])
    (tmp_path / "file").write_text("")
    assert len(build(config(f"{tmp_path}/s-0.tar", index_dir=str(tmp_path / "file" / "below")))) == 3


def test_an_index_takes_tens_of_bytes_for_a_sample(tmp_path: Path) -> None:
    """Arrays, not objects: a million samples of an index take tens of bytes each."""
    write_shards(tmp_path, [200] * 3)
    index = build(config(f"{tmp_path}/s-{{0..2}}.tar"))
    arrays = [getattr(index.samples, name) for name in ("offsets", "sizes", "labels", "key_ends", "key_bytes")]
    assert all(isinstance(array, np.ndarray) for array in arrays)
    assert sum(array.nbytes for array in arrays) / 600 < 32


def test_a_patch_of_a_shard_shows_in_its_index_by_its_time(tmp_path: Path) -> None:
    """A changed shard of the same size is noticed by its time."""
    path = Path(write_shards(tmp_path, [4])[0])
    made = config(str(path))
    before = build(made).fingerprint()
    _, data = member_offset(path, "00002.cls")
    patch(path, data, b"6")
    os.utime(path, (1, 1))
    after = build(made)
    assert after.samples.labels[2] == 6
    assert after.fingerprint() != before
