"""CIFAR-10 and GTSRB from the archives in which they are passed on, made here small in the same format; and pickles
that would do something if they were run."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqscale.data.made import archives, coco, packed
from vqscale.programs.commands import shards

rng = np.random.default_rng(0)
BATCHES = {
    name: (rng.integers(0, 256, (count, 3072), np.uint8), [int(x) for x in rng.integers(0, 10, count)])
    for name, count in (("data_batch_1", 4), ("data_batch_2", 3), ("test_batch", 2))
}


def _text(data: bytes) -> bytes:
    """A string of Python 2, as its cPickle writes it in protocol 2."""
    return b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data


def _array(pixels: np.ndarray, kind: bytes = b"u1", fortran: bool = False) -> bytes:
    """An array as the pickles of CIFAR-10 have it, opcode by opcode."""
    shape = b"".join(b"M" + struct.pack("<H", side) for side in pixels.shape)
    dtype = (
        b"cnumpy\ndtype\n"
        + _text(kind)
        + b"K\x00K\x01\x87R(K\x03"
        + _text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + _text(b"b") + b"\x87R"
    flag = b"\x88" if fortran else b"\x89"
    return made + b"(K\x01(" + shape + b"t" + dtype + flag + _text(pixels.tobytes("F" if fortran else "C")) + b"tb"


def _batch(pixels: np.ndarray, labels: list[int], **more) -> bytes:
    """A batch as cPickle of Python 2 has written those of CIFAR-10."""
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    names = b"](" + b"".join(_text(b"leptodactylus_pentadactylus_s_000004.png") for _ in labels) + b"e"
    entries = [(b"batch_label", _text(b"training batch 1 of 5")), (b"labels", numbers)]
    entries += [(b"data", _array(pixels, **more)), (b"filenames", names)]
    return b"\x80\x02}(" + b"".join(_text(key) + value for key, value in entries) + b"u."


def _tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        folder = tarfile.TarInfo(next(iter(members)).partition("/")[0])
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def _python(path: Path, **changed: bytes) -> Path:
    members = {name: _batch(*batch) for name, batch in BATCHES.items()} | changed
    others = {"batches.meta": b"not looked at", "readme.html": b"<p>"}
    return _tar(path, {f"cifar-10-batches-py/{name}": data for name, data in (others | members).items()})


def _binary(path: Path, **changed: bytes) -> Path:
    members = {
        name: b"".join(bytes([label]) + row.tobytes() for row, label in zip(*batch, strict=True))
        for name, batch in BATCHES.items()
    } | changed
    return _tar(path, {f"cifar-10-batches-bin/{name}.bin": data for name, data in members.items()})


def _samples(folder: Path, name: str) -> list[tuple[np.ndarray, int, dict]]:
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob(f"{name}-*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, suffix = info.name.partition(".")
                found.setdefault(key, {})[suffix] = tar.extractfile(info).read()
    read = []
    for _, each in sorted(found.items()):
        image = np.asarray(Image.open(io.BytesIO(each["png"]), formats=["PNG"]))
        read.append((image, int(each.get("cls", b"-1")), json.loads(each["json"])))
    return read


def test_what_the_tests_write_is_what_numpy_and_pickle_read():
    """So that the format here is the published one and not that of the reader."""
    for fortran in (False, True):
        said = pickle.loads(_batch(*BATCHES["data_batch_1"], fortran=fortran), encoding="bytes")
        assert set(said) == {b"batch_label", b"labels", b"data", b"filenames"}
        assert np.array_equal(said[b"data"], BATCHES["data_batch_1"][0])
        assert said[b"labels"] == BATCHES["data_batch_1"][1]


@pytest.mark.parametrize("write", [_python, _binary])
def test_cifar10_from_its_archives(write, tmp_path, capsys):
    path = write(tmp_path / "cifar-10.tar.gz")
    assert shards.main(["--source", str(path), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "7 samples" in said
    assert "2 samples" in said
    train, test = _samples(tmp_path / "out", "train"), _samples(tmp_path / "out", "val")
    for read, batches in ((train, ("data_batch_1", "data_batch_2")), (test, ("test_batch",))):
        rows = [(row, label) for name in batches for row, label in zip(*BATCHES[name], strict=True)]
        assert len(read) == len(rows)
        for (image, label, facts), (row, wanted) in zip(read, rows, strict=True):
            red, green, blue = (row[start : start + 1024].reshape(32, 32) for start in (0, 1024, 2048))
            assert np.array_equal(image, np.stack([red, green, blue], -1))
            assert label == wanted == facts["label"]
            assert facts["class"] == archives.CIFAR_CLASSES[wanted]
    info = json.loads((tmp_path / "out" / "_info.json").read_text())
    assert info["splits"]["train"]["num_samples"] == 7
    stamp = (tmp_path / "out" / "train-0000.tar").stat().st_mtime_ns
    assert shards.main(["--source", str(path), "--out", str(tmp_path / "out")]) == 0  # they are there
    assert (tmp_path / "out" / "train-0000.tar").stat().st_mtime_ns == stamp


def test_an_array_in_the_order_of_fortran(tmp_path):
    path = _python(tmp_path / "cifar.tar.gz", test_batch=_batch(*BATCHES["test_batch"], fortran=True))
    (_, _), (name, plan) = archives.plans(path, "train", "val")
    assert name == "val"
    image = np.asarray(Image.open(io.BytesIO(plan.sample(0)["png"])))
    assert np.array_equal(image[:, :, 0].ravel(), BATCHES["test_batch"][0][0][:1024])


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def _hostile(marker: Path) -> dict[str, bytes]:
    system = b"\x80\x02cos\nsystem\n" + _text(f"touch {marker}".encode()) + b"\x85R."
    loads = b"\x80\x02c_pickle\nloads\n" + _text(b"x") + b"\x85R."
    frombuffer = b"\x80\x02cnumpy\nload\n" + _text(str(marker).encode()) + b"\x85R."
    return {
        "system": system,
        "a class": pickle.dumps(Touch(str(marker)), 2),
        "loads": loads,
        "numpy.load": frombuffer,
        "builtins": b"\x80\x02c__builtin__\neval\n" + _text(b"1") + b"\x85R.",
        "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.",
        "objects": _batch(*BATCHES["data_batch_1"], kind=b"O8"),
        "huge": b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b".",
        "nothing": b"",
        "a number": b"\x80\x02K\x05.",
        "cut": _batch(*BATCHES["data_batch_1"])[:-100],
        "no pixels": b"\x80\x02}(" + _text(b"labels") + b"](K\x01eu.",
        "a state of the class": b"\x80\x02cnumpy\nndarray\n}b.",
    }


@pytest.mark.parametrize("name", list(_hostile(Path("x"))))
def test_a_pickle_runs_nothing_and_is_refused_by_its_name(name, tmp_path, capsys):
    marker = tmp_path / "it ran"
    path = _python(tmp_path / "cifar.tar.gz", data_batch_2=_hostile(marker)[name])
    assert shards.main(["--source", str(path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "cifar-10-batches-py/data_batch_2" in said
    assert "is no batch of CIFAR-10" in said
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_a_pickle_fills_no_memory_with_places_for_what_it_does_not_keep(tmp_path, capsys):
    far = b"\x80\x02Nr\xff\xff\xff\x00."
    path = _python(tmp_path / "cifar.tar.gz", data_batch_1=far)
    assert shards.main(["--source", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "place 16777215 of what it keeps, after 2 words" in capsys.readouterr().err
    kept = pickle.dumps({b"data": [b"x"] * 300, b"labels": [[n] for n in range(300)]}, 2)
    archives._check_places(kept)
    assert b"r\x00\x01\x00\x00" in kept, "it has long numbers of places"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data_batch_1": b"x" * 3072}, "has 3072 bytes, and a picture has 3073"),
        ({"test_batch": b""}, "has 0 bytes"),
        ({"data_batch_1": bytes([10]) + b"x" * 3072}, "1 labels, and a batch has"),
    ],
)
def test_a_binary_batch_that_is_not_whole(changed, said, tmp_path, capsys):
    assert shards.main(["--source", str(_binary(tmp_path / "a.tar.gz", **changed)), "--out", str(tmp_path / "o")]) == 2
    assert said in capsys.readouterr().err


def test_members_that_are_larger_than_a_batch_or_no_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(archives, "MOST_BYTES", 1000)
    assert shards.main(["--source", str(_binary(tmp_path / "a.tar.gz")), "--out", str(tmp_path / "o")]) == 2
    assert "bytes, and at most 1000 are read" in capsys.readouterr().err
    with tarfile.open(tmp_path / "links.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert shards.main(["--source", str(tmp_path / "links.tar.gz"), "--out", str(tmp_path / "o")]) == 2
    assert "has no data_batch_1 or no test_batch" in capsys.readouterr().err


def test_files_that_are_no_archives(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("no archive")
    assert shards.main(["--source", str(tmp_path / "a.txt"), "--out", str(tmp_path / "o")]) == 2
    assert "give cifar-10-python.tar.gz" in capsys.readouterr().err
    whole = _python(tmp_path / "cifar.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    assert shards.main(["--source", str(tmp_path / "cut.tar.gz"), "--out", str(tmp_path / "o")]) == 2
    assert "give cifar-10-python.tar.gz" in capsys.readouterr().err


def test_an_archive_with_a_wrong_byte_is_refused(tmp_path, capsys):
    """Noise is packed as it is, so that no byte of it is wrong by itself: the check sum at the end says it."""
    rows = b"".join(b"\x01" + rng.bytes(3072) for _ in range(40))
    whole = _binary(tmp_path / "whole.tar.gz", data_batch_1=rows).read_bytes()
    for place in (len(whole) // 2, len(whole) - 6):
        (tmp_path / "a.tar.gz").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert shards.main(["--source", str(tmp_path / "a.tar.gz"), "--out", str(tmp_path / "o")]) == 2
        assert "is no archive that can be read (CRC check failed" in capsys.readouterr().err
    (tmp_path / "a.tar.gz").write_bytes(whole[:200] + bytes(200) + whole[400:])
    assert shards.main(["--source", str(tmp_path / "a.tar.gz"), "--out", str(tmp_path / "o")]) == 2
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("how", ["gz", "bz2", "xz", ""])
def test_a_tar_packed_in_any_way_by_any_program(how, tmp_path):
    """A time of part of a second is in a PAX header, as Python writes it."""
    with tarfile.open(tmp_path / "a.tar", f"w:{how}", format=tarfile.PAX_FORMAT) as tar:
        for name, batch in BATCHES.items():
            data = _batch(*batch)
            info = tarfile.TarInfo(f"./cifar-10-batches-py/{name}")
            info.size, info.mtime = len(data), 1234567890.5
            tar.addfile(info, io.BytesIO(data))
    train, test = archives.plans(tmp_path / "a.tar", "train", "val")
    assert (train[1].num_samples, test[1].num_samples) == (7, 2)


def _huge(kind: bytes, size: int) -> bytes:
    """A header of a member's name or facts, so many bytes long."""
    info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.USTAR_FORMAT) + bytes(size)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE])
def test_headers_of_a_tar_take_no_memory(kind, tmp_path, capsys):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(_huge(kind, 1 << 26)))
    tracemalloc.start()
    assert shards.main(["--source", str(tmp_path / "a.tar.gz"), "--out", str(tmp_path / "o")]) == 2
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "is no archive that can be read (damaged header at byte 0 (a sparse file or a wrong size)" in (
        capsys.readouterr().err
    )
    assert most < 1 << 24


def test_a_tar_unpacks_to_no_more_than_a_bound(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packed, "MOST_UNPACKED", 1 << 12)
    assert shards.main(["--source", str(_python(tmp_path / "a.tar.gz")), "--out", str(tmp_path / "o")]) == 2
    assert "is no archive that can be read (it unpacks to more than 4096 bytes): give" in capsys.readouterr().err


SIDES = {"00000/00000_00000": (29, 30), "00000/00000_00001": (15, 17), "00014/00002_00029": (40, 44)}
SIDES |= {"00042/00007_00011": (20, 20)}
SIGNS = {name: rng.integers(0, 256, (*sides, 3), np.uint8) for name, sides in SIDES.items()}


def _ppm(pixels: np.ndarray) -> bytes:
    return b"P6\n%d %d\n255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


def _zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def _training(path: Path, place: str = "GTSRB/Final_Training/Images", **changed: bytes) -> Path:
    members = {f"{place}/{name}.ppm": _ppm(pixels) for name, pixels in SIGNS.items()}
    members[f"{place}/00000/GT-00000.csv"] = b"Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
    members["GTSRB/Readme-Images.txt"] = b"read me"
    return _zip(path, members | changed)


@pytest.mark.parametrize("place", ["GTSRB/Final_Training/Images", "GTSRB/Training"])
def test_signs_from_their_zip(place, tmp_path):
    path = _training(tmp_path / "gtsrb.zip", place)
    assert shards.main(["--source", str(path), "--out", str(tmp_path / "out")]) == 0
    read = _samples(tmp_path / "out", "train")
    assert len(read) == 4
    for (image, label, facts), (name, pixels) in zip(read, SIGNS.items(), strict=True):
        assert np.array_equal(image, pixels)
        assert facts["class"] == name.partition("/")[0]
        assert label == facts["label"] == ["00000", "00014", "00042"].index(facts["class"])
    assert (tmp_path / "out" / "classes.txt").read_text().split() == ["00000", "00014", "00042"]


def test_signs_of_the_test_have_no_class(tmp_path):
    members = {f"GTSRB/Final_Test/Images/{n:05d}.ppm": _ppm(pixels) for n, pixels in enumerate(SIGNS.values())}
    path = _zip(tmp_path / "test.zip", members)
    assert shards.main(["--source", str(path), "--out", str(tmp_path / "out"), "--name", "test"]) == 0
    read = _samples(tmp_path / "out", "test")
    assert [(label, facts["class"]) for _, label, facts in read] == [(-1, None)] * 4


@pytest.mark.parametrize(
    "data", [b"", b"P6\n4 4\n255\nxx", b"P6\n99999 2\n255\n" + b"x" * 599994, b"P3\n1 1\n255\n1 2", b"\x89PNG"]
)
def test_a_sign_that_is_no_whole_picture(data, tmp_path, capsys):
    name = "GTSRB/Final_Training/Images/00014/00002_00029.ppm"
    path = _training(tmp_path / "gtsrb.zip", **{name: data})
    assert shards.main(["--source", str(path), "--out", str(tmp_path / "out")]) == 2
    assert f"{name} in {path} is no whole picture" in capsys.readouterr().err


SIGN = "GTSRB/Final_Training/Images/00000/00000_00000.ppm"


def _sign(path: Path) -> None:
    ((_, plan),) = archives.plans(path, "train", "val")
    plan.sample(0)


def _segments(path: Path) -> None:
    coco._reader(path)(Path(SIGN).name)


@pytest.mark.parametrize("read", [_sign, _segments])
def test_a_member_that_unpacks_to_more_than_the_zip_says(read, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(SIGN, b"P6\n2 2\n255\n" + bytes(1 << 25))
    data = bytearray((tmp_path / "a.zip").read_bytes())
    size = data.rindex(b"PK\x01\x02") + 24
    data[size : size + 4] = struct.pack("<I", 23)
    (tmp_path / "a.zip").write_bytes(data)
    tracemalloc.start()
    with pytest.raises((ValueError, zipfile.BadZipFile), match="Bad CRC-32"):
        read(tmp_path / "a.zip")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 22


@pytest.mark.parametrize("read", [_sign, _segments])
@pytest.mark.parametrize(
    ("method", "most", "said"), [(zipfile.ZIP_BZIP2, 1 << 20, "method 12"), (zipfile.ZIP_STORED, 9, "at most 9 are")]
)
def test_a_member_that_is_not_unpacked_within_a_bound(read, method, most, said, tmp_path, monkeypatch):
    for each in (archives, coco):
        monkeypatch.setattr(each, "MOST_BYTES", most)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr(SIGN, b"P6\n2 2\n255\n" + bytes(12))
    with pytest.raises(ValueError, match=said):
        read(tmp_path / "a.zip")


def test_a_zip_without_its_directory(tmp_path, capsys):
    data = _training(tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(data.replace(b"PK\x01\x02", b"PK\x01\x00"))
    assert shards.main(["--source", str(tmp_path / "a.zip"), "--out", str(tmp_path / "out")]) == 2
    assert "is no archive that can be read (Bad magic number" in capsys.readouterr().err


def test_a_zip_of_something_else(tmp_path, capsys):
    path = _zip(tmp_path / "other.zip", {"a.ppm": b"", "../../GTSRB/x.ppm": b""})
    assert shards.main(["--source", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "has no picture of GTSRB" in capsys.readouterr().err
    path = _training(tmp_path / "more.zip")
    assert shards.main(["--source", str(path), "--crops", "2", "--out", str(tmp_path / "out")]) == 2
