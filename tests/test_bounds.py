"""What is damaged or made to harm is read in bounded time, memory and disk, and says so in bounded words."""

from __future__ import annotations

import gzip
import os

import pytest
import shard_files

from vqscale.data.shards import cache, contents, tar


def test_holes_are_looked_behind_in_steps_that_grow(tmp_path, monkeypatch):
    """20,000 holes of a block each took 20 GB of reading and as many lines of damage."""
    path = shard_files.write_tar(tmp_path / "a.tar", [(f"{n}.png", b"x" * 10) for n in range(300)])
    whole = path.read_bytes()
    holes = b"".join(b"\x01" * 512 + whole[at : at + 1024] for at in range(0, 300 * 1024, 1024))
    path.write_bytes(holes + whole[300 * 1024 :])
    read = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, at: read.append(len(found := pread(file, count, at))) or found)
    with path.open("rb") as file:
        found = contents.read_contents(file.fileno(), [("png",)])
        assert sum(read) < 20 * path.stat().st_size
        assert len(found.damage) == contents._MOST_LINES + 1
        assert found.damage[-1] == f"{300 - contents._MOST_LINES} more places are damaged"
        monkeypatch.undo()
        for hole in (1, 7, 8, 9, 5000):  # as far as it must, a block at a time
            path.write_bytes(whole[:1024] + b"\x01" * 512 * hole + whole[1024:])
            assert tar.next_header(file.fileno(), 1024, path.stat().st_size) == 1024 + 512 * hole


@pytest.mark.parametrize("prefix", ["", "pipe:cat "])
def test_a_shard_that_unpacks_to_more_than_the_cache_may_hold_is_refused_before_it_does(tmp_path, prefix):
    bomb = tmp_path / "bomb.tar.gz"
    bomb.write_bytes(gzip.compress(bytes(30 << 20)))
    kept = cache.ShardCache(tmp_path / "cache", 4 << 20)
    most = []
    write = cache._copy

    def watched(read, file, limit):
        try:
            write(read, file, limit)
        finally:
            most.append(file.tell())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "_copy", watched)
        with pytest.raises(cache.TooLarge, match=r"bomb.tar.gz has more than the 0.00419 GB that cache_gb allows"):
            kept.fetch(f"{prefix}{bomb}")
    assert max(most) <= 4 << 20
    assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")]


def test_a_command_that_gives_nothing_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache, "_SILENCE_S", 0.05)
    shard = f"pipe:sleep 0.4; cat {shard_files.write_tar(tmp_path / 'a.tar', [('a.png', b'x')])}"
    assert cache.ShardCache(tmp_path / "cache", 10**9).fetch(shard)
    assert f"nothing comes from {shard}: waiting since 0.05 s" in caplog.text
