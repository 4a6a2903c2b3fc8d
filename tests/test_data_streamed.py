"""Shards that come from commands, URLs and compressed files, through a folder of bounded size."""

from __future__ import annotations

import bz2
import gzip
import http.server
import lzma
import os
import shutil
import threading
from itertools import islice
from pathlib import Path

import pytest
from shard_files import SIZE, read_slowly, write_shards
from test_data_order import facts, same, take

from vqscale.data.config import ImagesConfig
from vqscale.data.samples import BrokenData, SampleStream
from vqscale.data.shards import cache as cache_module
from vqscale.data.shards.cache import ShardCache


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cache_module, "_PAUSE_S", 0.01)
    return tmp_path / "home" / "vqscale"


def config(shards: str | tuple[str, ...], **options: object) -> ImagesConfig:
    return ImagesConfig(shards, **{"image_size": SIZE, "num_workers": 0, "window_shards": 2, **options})


def test_a_command_gives_the_same_batches_as_the_files(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", [5, 9, 0, 7])
    files = take(config(f"{tmp_path}/data/s-{{0..3}}.tar"), 8)
    piped = config(f"pipe:cat {tmp_path}/data/s-{{0..3}}.tar", cache_dir=str(tmp_path / "cache"))
    assert same(take(piped, 8), files)
    assert same(take(config(piped.shards, cache_dir=piped.cache_dir, num_workers=2), 8, world=2), files)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 4
    shutil.rmtree(tmp_path / "data")  # all is in the cache now
    assert same(take(piped, 8), files)


def test_a_web_server_gives_the_same_batches_as_the_files(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("webdataset fetches http with curl, which is not here")
    write_shards(tmp_path, [5, 9])
    handler = lambda *args: http.server.SimpleHTTPRequestHandler(*args, directory=str(tmp_path))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/s-{{0..1}}.tar"
        assert same(take(config(url), 4), take(config(f"{tmp_path}/s-{{0..1}}.tar"), 4))
        server.shutdown()


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
@pytest.mark.parametrize("prefix", ["", "pipe:cat "])
def test_compressed_shards_are_unpacked(tmp_path: Path, prefix: str, suffix: str, pack: object) -> None:
    paths = write_shards(tmp_path, [5, 9])
    files = take(config(tuple(paths)), 4)
    for path in paths:
        Path(f"{path}.{suffix}").write_bytes(pack(Path(path).read_bytes()))
    packed = tuple(f"{prefix}{path}.{suffix}" for path in paths)
    assert same(take(config(packed), 4), files)
    cut = Path(f"{paths[1]}.{suffix}")
    cut.write_bytes(cut.read_bytes()[: os.path.getsize(cut) // 2])
    if not prefix:  # a local one that changed is unpacked again, as far as it goes
        stream = SampleStream(config(packed), batch=2, train=False)
        assert 5 <= stream.num_samples < 14
        assert len(stream.damage) == 1


def test_a_command_that_fails_is_tried_again_and_then_an_error(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, [4])
    tried = tmp_path / "tried"
    late = f"pipe:echo >> {tried}; test $(wc -l < {tried}) -ge 3 && cat {path}"
    assert SampleStream(config(late), batch=2).num_samples == 4
    assert tried.read_text().count("\n") == 3
    half = f"pipe:head -c 2000 {path}; exit 1"  # gives something, then fails: not a short shard, but no shard
    with pytest.raises(OSError, match=r"cannot fetch pipe:head.*attempt 3 of 3.*exit 1"):
        SampleStream(config(half), batch=2)
    assert not list((tmp_path / "home" / "vqscale").glob("*.tmp"))


def test_a_source_that_dries_up_under_the_run_is_broken_samples(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", [6, 6])
    piped = config(
        f"pipe:cat {tmp_path}/data/s-{{0..1}}.tar",
        cache_dir=str(tmp_path / "cache"),
        index_dir=str(tmp_path / "i"),
        max_broken=15,
    )
    stream = SampleStream(piped, batch=4)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "data/s-0.tar").unlink()
    found = list(islice(stream.batches(0), 6))
    assert {int(key) for batch in found for key in batch.keys} == set(range(6, 12))
    assert all("cannot fetch pipe:cat" in reason for batch in found for reason in batch.broken)
    (tmp_path / "data/s-1.tar").unlink()
    for path in (tmp_path / "cache").glob("*.tar"):  # the folder is in use: something is still fetched ahead
        path.unlink()
    with pytest.raises(BrokenData, match=r"16 samples in a row.*pipe:cat"):
        next(SampleStream(piped, batch=4).batches(0))


def test_the_cache_stays_within_its_limit_and_keeps_what_is_used_last(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "data", [4] * 6)
    size = os.path.getsize(paths[0])
    cache = ShardCache(tmp_path / "cache", 3 * size)
    names = [f"pipe:cat {path}" for path in paths]
    for step, name in enumerate(names[:3]):
        os.close(cache.open(name))
        os.utime(cache.path(name), (step, step))
    os.close(cache.open(names[0]))  # used again: 1 is the oldest now
    os.close(cache.open(names[3]))
    there = [number for number, name in enumerate(names) if os.path.exists(cache.path(name))]
    assert there == [0, 2, 3]
    held = cache.open(names[0])
    for step, number in enumerate((2, 3, 0)):
        os.utime(cache.path(names[number]), (step, step))
    os.close(cache.open(names[4], keep=names[2:4]))
    there = [number for number, name in enumerate(names) if os.path.exists(cache.path(name))]
    assert there == [2, 3, 4]  # 0 went, the others being kept; whoever reads it still can
    assert os.pread(held, size, 0) == Path(paths[0]).read_bytes()
    os.close(held)


def test_a_run_through_a_small_cache_sees_every_sample(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "data", [4] * 8)
    size = os.path.getsize(paths[0])
    piped = config(
        tuple(f"pipe:cat {path}" for path in paths),
        window_shards=2,
        cache_dir=str(tmp_path / "cache"),
        cache_gb=4 * size / 1e9,
    )
    found = facts(take(piped, 12, batch=8))
    assert sorted(found[:32]) == sorted(found[32:64]) == sorted(found[64:]) == read_slowly(paths)
    kept = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar"))
    assert kept <= 5 * size  # one may just have come
    with pytest.raises(ValueError, match=r"2 windows of 3 streamed shards.*cache_gb.*lower window_shards"):
        SampleStream(config(piped.shards, window_shards=3, cache_dir=piped.cache_dir, cache_gb=piped.cache_gb), batch=8)


def test_shards_of_the_next_window_are_fetched_ahead(tmp_path: Path) -> None:
    paths = write_shards(tmp_path / "data", [4] * 6)
    piped = config(
        tuple(f"pipe:cat {path}" for path in paths),
        cache_dir=str(tmp_path / "cache"),
        index_dir=str(tmp_path / "index"),
    )
    stream = SampleStream(piped, batch=4)
    shutil.rmtree(tmp_path / "cache")
    batches = stream.batches(0)
    next(batches)
    ahead = stream._samples.reader._ahead
    assert ahead is not None
    ahead.join(timeout=20)
    cache = stream._samples.reader.cache
    there = {shard for shard, name in enumerate(piped.patterns) if os.path.exists(cache.path(name))}
    assert there == {*stream.order.shards_of(0), *stream.order.shards_of(0, ahead=1)}
    assert len(there) == 4


def test_what_several_ask_for_at_once_is_fetched_once(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, [4])
    log = tmp_path / "log"
    cache = ShardCache(tmp_path / "cache", 10**9)
    name = f"pipe:echo >> {log}; sleep 0.3; cat {path}"
    threads = [threading.Thread(target=lambda: os.close(cache.open(name))) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert cache.fetch(name, wait=False) in ("", cache.path(name))
    for thread in threads:
        thread.join()
    assert log.read_text() == "\n"
