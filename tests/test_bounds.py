"""What is damaged or made to harm is read in bounded time, memory and disk, and says so in bounded words."""

from __future__ import annotations

import errno
import gzip
import os
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import shard_files
import torch

from vqscale.data.shards import cache, contents, tar
from vqscale.disk.owner import own
from vqscale.metrics import fid
from vqscale.nets import weights
from vqscale.programs.commands import plot, shards, study, train
from vqscale.run import processes
from vqscale.show import run_page
from vqscale.tokenizer import families, published

ROOT = Path(__file__).resolve().parents[1]


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


def _pyramid(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the sizes of a published tokenizer are read from, and more."""
    shapes = {
        "encoder.conv_in.weight": (32, 3, 3, 3),
        "encoder.conv_out.weight": (8, 32, 3, 3),
        "encoder.down.0.block.0.conv1.weight": (32, 32, 3, 3),
        "quantize.embedding.weight": (16, 8),
    }
    return {name: torch.zeros(shape) for name, shape in shapes.items()} | {
        name.replace("__", "."): x for name, x in more.items()
    }


@pytest.mark.parametrize(
    ("more", "rule"),
    [
        ({"encoder__down__999999999__block__0__conv1__weight": torch.zeros(1)}, r"are 0, 999999999, \.\.\. and not 0"),
        ({"encoder__down__0__block__9999999__conv1__weight": torch.zeros(1)}, r"are 0, 9999999, \.\.\. and not 0, 1"),
        ({"encoder__conv_in__weight": torch.zeros(0, 3, 3, 3)}, "by zero"),
        ({"encoder__conv_in__weight": torch.zeros(32)}, "values to unpack"),
        ({"encoder__conv_out__weight": torch.zeros(())}, "index out of range"),
        ({"quantize__embedding__weight": torch.zeros(16)}, "values to unpack"),
    ],
)
@pytest.mark.parametrize("family", ["ibq", "simvq"])
def test_shapes_of_no_published_tokenizer_build_none(family, more, rule):
    with pytest.raises(ValueError, match=rf"has no sizes of one \(.*{rule}.*these are other weights"):
        published.convert(_pyramid(**more), family)


def test_a_layer_of_a_published_tokenizer_of_speech_is_one_of_its_keys():
    shapes = dict.fromkeys(families.FAMILIES["simvq_audio"].needs, (1, 1, 1))
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    state["encoder.model.1000000000.lstm.weight_ih_l0"] = torch.zeros(4, 1)
    with pytest.raises(ValueError, match=r"there is a layer encoder.model.1000000000 among \d+ keys"):
        published.convert(state, "simvq_audio")


@pytest.mark.parametrize("suffix", ["pt", "ckpt"])
def test_weights_of_few_bytes_have_few_values(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    torch.save({"state_dict": {"quantize.embedding.weight": torch.zeros(1).expand(2**40, 8)}}, path)
    with pytest.raises(ValueError, match=r"has fewer values than the shape of quantize.embedding.weight says"):
        weights.read_state(path, what="it", where="there")
    tied = torch.ones(4, 4)
    torch.save({"a": tied, "b": tied.t(), "c": tied[1:]}, path)  # a part of a storage, or the same one, is no lie
    assert weights.read_state(path, what="it", where="there")["c"].shape == (3, 4)


GOOD = {"mu": np.zeros(2), "sigma": np.eye(2)}
DEEP = np.array("[" * 200_000)


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"facts": np.array("[1, 2]")}, "cannot be read"),
        ({"facts": DEEP}, "cannot be read"),
        ({"facts": np.array("3")}, "cannot be read"),
        ({"count": np.arange(3)}, "cannot be read"),
        ({"count": np.array(2.5)}, "cannot be read"),
        ({"count": np.array("many")}, "cannot be read"),
        ({"points": np.array([["a", "b"]])}, r"points is <U1 of shape \(1, 2\), and not floats of \(N, 2\)"),
        ({"points": np.zeros(())}, "points is float64 of shape"),
        ({"mu": np.zeros(2, complex)}, "mu is of complex128 and sigma of float64, and not real numbers"),
        ({"mu": np.zeros(2, "datetime64[s]")}, "not real numbers"),
        ({"sigma": np.array([["a", "b"], ["c", "d"]])}, "not real numbers"),
        ({"sigma": -np.eye(2)}, "sigma has variances below 0, to -1"),
    ],
)
def test_statistics_of_another_kind_are_refused(tmp_path, changed, rule):
    np.savez(tmp_path / "a.npz", **GOOD)
    assert fid.read(tmp_path / "a.npz").pool.dim == 2
    np.savez(tmp_path / "a.npz", **{**GOOD, **changed})
    with pytest.raises(ValueError, match=rule):
        fid.read(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "header",
    ["{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000,), }", "[" * 9000, "(" * 9000, "a", ""],
)
def test_headers_of_statistics_that_lie_are_refused(tmp_path, header):
    said = header.encode() + b"\n"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("mu.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(said)) + said)
    with pytest.raises(ValueError, match=r"a\.npz cannot be read"):
        fid.read(tmp_path / "a.npz")


def test_statistics_that_unpack_to_very_many_bytes_are_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "MOST_BYTES", 1 << 20)
    np.savez_compressed(tmp_path / "a.npz", mu=np.zeros(200_000), sigma=np.zeros(()))
    with pytest.raises(ValueError, match=r"\d+ bytes of statistics, and at most 1048576 are read"):
        fid.read(tmp_path / "a.npz")


@pytest.fixture
def plotted(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    return run


def _programs(run: Path, out: Path) -> dict[str, tuple[Callable[..., int], list[str]]]:
    return {
        "plot": (plot.main, [str(run), "--keys", "loss", "--out", f"{out}/a.png"]),
        "shards": (shards.main, ["--source", "shapes", "--num", "4", "--size", "8", "--out", f"{out}/shards"]),
        "study": (study.main, [str(ROOT / "configs/study/quantizers.yaml"), "--prepare", f"folder={out}/study"]),
        "page": (_page, [f"{out}/p"]),
    }


def _page(words: list[str]) -> int:
    return processes.status_of(lambda: 0 if run_page.write(Path(words[0]), "", []) else 1)


@pytest.mark.parametrize("name", ["plot", "shards", "study", "page"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_is_status_1_and_leaves_nothing_half(
    plotted, tmp_path, monkeypatch, capsys, name, number
):
    """The disk takes files, and refuses what is written when it is made durable."""
    main, words = _programs(plotted, tmp_path)[name]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(number, os.strerror(number))))
        assert main(words) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: [Errno {number}] ")
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".tmp", ".png", ".tar", "p"))]
    assert main(words) == 0


@pytest.mark.parametrize("name", ["plot", "shards", "study", "page"])
def test_a_file_where_a_folder_shall_be_is_status_1(plotted, tmp_path, capsys, name):
    (tmp_path / "file").write_text("mine")
    main, words = _programs(plotted, tmp_path / "file")[name]
    assert main(words) == 1
    assert re.match(r"error: \[Errno (17|20)\] ", capsys.readouterr().err)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("folder", "rule"),
    [("''", "folder is empty, and a run would lie in the working folder"), ("'  '", "folder is empty")],
)
def test_a_run_has_a_folder_of_its_own(capsys, folder, rule):
    assert train.main([str(ROOT / "configs/quickstart/tokenizer.yaml"), "--dry-run", f"run.folder={folder}"]) == 2
    assert rule in capsys.readouterr().err


@pytest.mark.parametrize("leads_to", ["nothing", "link"])
def test_a_folder_that_is_a_link_to_nothing_is_told(tmp_path, leads_to, capsys):
    (tmp_path / "link").symlink_to(tmp_path / leads_to)

    def owned():
        with own(tmp_path / "link", "the run"):
            return 0

    assert processes.status_of(owned) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: [Errno ")
    assert "Traceback" not in said
