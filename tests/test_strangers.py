"""What comes from strangers (runs, caches, shards, notes) starts nothing and deletes nothing of the user."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import stat
import tarfile
from pathlib import Path

import numpy as np
import pytest
import token_caches
import torch
import zarr
from saved_runs import small, write_run
from shard_files import png, write_tar

from vqscale import Tokenizer
from vqscale.data.config import ImagesConfig, ShapesConfig
from vqscale.data.made import make
from vqscale.data.samples import SampleStream
from vqscale.data.tokens import write as writing
from vqscale.data.tokens.stream import Cache
from vqscale.disk import manifest
from vqscale.disk.arrays import open_array
from vqscale.metrics import fid
from vqscale.nets.weights import read_state
from vqscale.programs.commands import train
from vqscale.programs.sampling import folder as sample_folder

V2 = {"zarr_format": 2, "dtype": "|O", "compressor": None, "fill_value": "", "order": "C"}
V2 |= {"filters": [{"id": "vlen-utf8"}, {"id": "pickle"}]}


class Command:
    """What runs when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def plant(array: Path, marker: Path) -> None:
    """Put an array of zarr v2, whose chunk is a pickle that makes `marker`, in the place of one of ours."""
    shape = list(zarr.open_array(str(array), mode="r").shape)
    shutil.rmtree(array)
    array.mkdir()
    (array / ".zarray").write_text(json.dumps({**V2, "shape": shape, "chunks": shape}))
    (array / ".".join("0" * len(shape))).write_bytes(pickle.dumps(Command(marker)))


def reseal(folder: Path, **others) -> None:
    """Write the manifest again, as anybody can: it has no key."""
    old = manifest.read(folder)
    files = {p.relative_to(folder).as_posix(): manifest.seal(p) for p in folder.rglob("*") if p.is_file()}
    files.pop(manifest.NAME)
    manifest.write(folder, {**old, "files": files, **others})


@pytest.fixture
def taken_for_new_enough(monkeypatch):
    """numcodecs' pickle as it was before 0.16.6, which unpickles without a word."""
    from numcodecs import pickles

    monkeypatch.setattr(pickles.Pickle, "decode", lambda self, data, out=None: pickle.loads(bytes(data)))


def test_arrays_of_zarr_v2_in_a_checkpoint_or_a_cache_run_nothing(tmp_path, taken_for_new_enough):
    marker = tmp_path / "ran"
    run = write_run(tmp_path / "run", small())
    step = run / "checkpoints" / "0000000007"
    plant(next((step / "rows" / "parameter").glob("*rows/*")), marker)
    reseal(step)
    with pytest.raises(ValueError, match=r"is no array of numbers in zarr v3 as it was written here"):
        Tokenizer.load(run)
    for name in ("labels", "key_bytes", "key_ends", "ids"):
        cache = tmp_path / name
        token_caches.write(cache)
        plant(cache / name, marker)
        reseal(cache)
        with pytest.raises(ValueError, match=rf"{name} is no array of numbers in zarr v3"):
            Cache(cache)
    assert not marker.exists()


def test_an_array_is_of_numbers_and_of_the_shape_that_is_asked_for(tmp_path):
    zarr.create_array(str(tmp_path / "texts"), shape=(3,), dtype=str)
    with pytest.raises(ValueError, match="which is none of numbers"):
        open_array(tmp_path / "texts")
    zarr.create_array(str(tmp_path / "wide"), shape=(10**15,), dtype="int64", chunks=(1,))
    with pytest.raises(ValueError, match=r"it has the shape \(1000000000000000,\), and expected is \(4,\)"):
        open_array(tmp_path / "wide", (4,))
    with pytest.raises(ValueError, match="is no array of numbers"):
        open_array(tmp_path / "nothing")


def test_everything_opens_arrays_in_the_one_place():
    package = Path(writing.__file__).parents[2]
    opening = {p.relative_to(package).as_posix() for p in package.rglob("*.py") if "zarr.open_array" in p.read_text()}
    assert opening == {"disk/arrays.py"}


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin"])
def test_weights_and_statistics_that_are_pickles_run_nothing(tmp_path, suffix):
    marker, weights, arrays = tmp_path / "ran", tmp_path / f"a.{suffix}", tmp_path / "a.npz"
    for save in (lambda x: torch.save(x, weights), lambda x: weights.write_bytes(pickle.dumps(x, protocol=2))):
        save({"state_dict": {"a": Command(marker)}})
        with pytest.raises(ValueError, match="cannot be read as weights"):
            read_state(weights, what="it", where="there")
    np.savez(arrays, mu=np.array([Command(marker)], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="cannot be read"):
        fid.read(arrays)
    arrays.write_bytes(pickle.dumps(Command(marker)))
    with pytest.raises(ValueError, match="cannot be read"):
        fid.read(arrays)
    assert not marker.exists()


def test_nothing_of_a_file_is_unpickled():
    """Every call that could says that it does not."""
    package, unpickling = Path(writing.__file__).parents[2], re.compile(r"(torch\.load|pickle\.loads?)\(.*")
    calls = [found[0] for path in package.rglob("*.py") for found in unpickling.finditer(path.read_text())]
    assert calls
    assert [call for call in calls if "weights_only=True" not in call] == []
    assert not [path for path in package.rglob("*.py") if re.search(r"allow_pickle=(?!False)", path.read_text())]


def test_a_plan_runs_no_command_of_its_config(tmp_path):
    changes = [f"data.{split}.shards='pipe:touch {tmp_path / 'ran'}'" for split in ("train", "val")]
    config = Path(__file__).parents[1] / "configs" / "quickstart" / "tokenizer.yaml"
    assert train.main([str(config), "--dry-run", *changes, "data.train.make=null", "data.val.make=null"]) == 0
    assert not (tmp_path / "ran").exists()


def eps(marker: Path) -> bytes:
    return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n({marker}) (w) file closefile\n".encode()


def test_an_image_starts_no_program(tmp_path, monkeypatch):
    """`gs` here is a stand-in that would leave a file; Pillow asks whether there is one, and then starts it."""
    from PIL import EpsImagePlugin

    marker, programs = tmp_path / "ran", tmp_path / "bin"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {marker}\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    tar = write_tar(tmp_path / "a.tar", [("a.jpg", eps(marker)), ("b.png", png(1))])
    config = ImagesConfig(str(tar), image_size=8, num_workers=0, index_dir=str(tmp_path))
    (batch,) = SampleStream(config, 2, train=False).batches(0)
    assert batch.valid.tolist() == [False, True]
    assert "are no image in a format that is read (JPEG, PNG" in batch.broken[0]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(eps(marker))
    with pytest.raises(ValueError, match="is not whole"):
        make.folder(tmp_path / "images").sample(0)
    assert not marker.exists()


@pytest.mark.parametrize("named", ["../thesis.txt", "{absolute}", "train-0.txt", "mine.tar", 7])
def test_a_note_of_an_interrupted_making_deletes_shards_of_its_split_alone(tmp_path, named):
    """The note may be planted; what it names is deleted only where a making would have put it."""
    place = tmp_path / "shards"
    place.mkdir()
    kept = [tmp_path / "thesis.txt", place / "train-0.txt", place / "mine.tar"]
    for path in kept:
        path.write_text("mine")
    (place / "train-9.tar").write_text("of an interrupted making")
    name = named.format(absolute=kept[0]) if isinstance(named, str) else named
    (place / ".train.making.json").write_text(json.dumps({"shards": [name, "train-9.tar"]}))
    made = ShapesConfig(num_images=2, size=8)
    make.make_missing(ImagesConfig(f"{place}/train-{{0..1}}.tar", image_size=8, num_workers=0, make=made))
    assert [path.read_text() for path in kept] == ["mine"] * 3
    assert not (place / "train-9.tar").exists()
    assert tarfile.is_tarfile(place / "train-0.tar")


@pytest.mark.parametrize("note", ["[1, 2]", '"text"', "{", "[" * 100_000])
def test_a_note_that_is_none_is_passed_over(tmp_path, note):
    (tmp_path / ".train.making.json").write_text(note)
    made = ShapesConfig(num_images=1, size=8)
    make.make_missing(ImagesConfig(f"{tmp_path}/train-0.tar", image_size=8, num_workers=0, make=made))
    assert tarfile.is_tarfile(tmp_path / "train-0.tar")


@pytest.mark.parametrize("name", ["labels", "ids", "ledger", "key_bytes", "key_ends"])
def test_folders_that_are_called_like_those_of_a_cache_are_kept(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "annot.txt").write_text("mine")
    for work in (writing.check, lambda *words: writing.begin(*words, token_caches.index(5).samples)):
        with pytest.raises(ValueError, match=rf"holds {name} and no card.json, so it is no token cache"):
            work(tmp_path, token_caches.card(5))
    assert (tmp_path / name / "annot.txt").read_text() == "mine"


SETTINGS = {"num_images": 2, "batch": 1}


def facts(seed: int) -> dict:
    return {"settings": {**SETTINGS, "seed": seed}, "prior": {"fingerprint": "a"}, "tokenizer": {"fingerprint": "b"}}


@pytest.mark.parametrize("name", ["parts/arm.step", "grid.png", "samples.npz"])
def test_overwriting_samples_removes_nothing_where_there_are_none(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"and no sample.json that says that they are samples"):
        sample_folder.begin(tmp_path, facts(0), overwrite=True)
    assert path.read_text() == "mine"


def test_overwriting_samples_removes_what_sampling_writes_and_nothing_else(tmp_path):
    sample_folder.begin(tmp_path, facts(0))
    ours = [tmp_path / name for name in ("parts/000000.npz", "parts/000001.npz.tmp", "000001.wav", "samples.npz")]
    theirs = [tmp_path / name for name in ("parts/arm.step", "2024.wav", "1-song.wav", "note.txt")]
    for path in (*ours, *theirs):
        path.write_bytes(np.zeros(1).tobytes())
    assert sample_folder.begin(tmp_path, facts(1), overwrite=True) == [0, 1]
    assert [path.exists() for path in (*ours, *theirs)] == [False] * len(ours) + [True] * len(theirs)
    assert stat.S_ISREG((tmp_path / "sample.json").stat().st_mode)
