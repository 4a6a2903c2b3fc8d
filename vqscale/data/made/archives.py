"""CIFAR-10 and GTSRB in the archives in which they are passed on, to plans of shards; every picture becomes PNG.

    cifar-10-python.tar.gz    cifar-10-batches-py/data_batch_1 to _5, test_batch: pickles of Python 2
    cifar-10-binary.tar.gz    cifar-10-batches-bin/data_batch_1.bin to _5.bin, test_batch.bin: a label, then R, G, B
    GTSRB_Final_Training_Images.zip    GTSRB/Final_Training/Images/00014/00002_00029.ppm, 14 being the class
    GTSRB_Final_Test_Images.zip        GTSRB/Final_Test/Images/00007.ppm, whose classes it does not say

A pickle is read without running anything of it: it may name three things of numpy, in whose place stand records of
bytes (`_Pickle`). Archives are a stranger's: names of members are never paths, and what is larger than it should be is
refused before it is read (packed.py).
"""

from __future__ import annotations

import hashlib
import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vqscale.data.made import packed
from vqscale.data.made.make import Plan, Sample, classes_of, digest_of, labelled
from vqscale.data.order import permutation
from vqscale.disk import png
from vqscale.seed import derive

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR = re.compile(r"(?:\./)?cifar-10-batches-(?:py|bin)/(data_batch_[1-5]|test_batch)(?:\.bin)?")
GTSRB = re.compile(r"(?:.*/)?(?:Final_)?(?:Training|Test)/(?:Images/)?(?:(\d{5})/)?(\d{5}(?:_\d{5})?\.ppm)")
SIDE, PIXELS = 32, 3 * 32 * 32
MOST_BYTES = 64 * 2**20  # of a member; a batch of CIFAR-10 has 31 MB
MOST_SIDE = 4096  # of a sign, of which the largest has some 250 pixels

Batch = tuple[NDArray[np.uint8], NDArray[np.int64]]  # (N, 3072), (N,)


def plans(path: Path, name: str, held_out: str, seed: int = 0) -> list[tuple[str, Plan]]:
    """(name, what to make) of each set of shards: of CIFAR-10 the training pictures under `name` and the test pictures
    under `held_out`, of GTSRB what the archive has under `name`. ValueError for another file."""
    try:
        if zipfile.is_zipfile(path):
            return [(name, _gtsrb(path, seed))]
        batches = _cifar(path)
    except (packed.DamagedError, zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is no archive that can be read ({error}): {_GIVE}") from error
    train, test = ([batches[each] for each in sorted(batches) if each.startswith(begin)] for begin in ("data", "test"))
    if not train or not test:
        raise ValueError(f"{path} has no data_batch_1 or no test_batch of CIFAR-10: {_GIVE}")
    return [(name, _pictures(path, "train", train, seed)), (held_out, _pictures(path, "test", test, None))]


_GIVE = "give cifar-10-python.tar.gz, cifar-10-binary.tar.gz, or a GTSRB zip of pictures, as they are passed on"


def _cifar(path: Path) -> dict[str, Batch]:
    """{data_batch_1: its pictures and labels, ...} of all batches in the archive."""
    found = {}
    for named, data in packed.of_tar(path, CIFAR, MOST_BYTES):
        read = _binary if named[0].endswith(".bin") else _pickled
        found[named[1]] = read(data, f"{named[0]} in {path}")
    return found


def _binary(data: bytes, where: str) -> Batch:
    if not data or len(data) % (1 + PIXELS):
        raise ValueError(f"{where} has {len(data)} bytes, and a picture has {1 + PIXELS}: it is not whole")
    rows = np.frombuffer(data, np.uint8).reshape(-1, 1 + PIXELS)
    return _checked(rows[:, 1:], rows[:, 0].astype(np.int64), where)


def _pickled(data: bytes, where: str) -> Batch:
    try:
        _check_places(data)
        said = _Pickle(io.BytesIO(data), encoding="bytes").load()
        array, labels = said[b"data"], said[b"labels"]
        pixels = np.frombuffer(array.data, np.uint8).reshape(array.shape, order="F" if array.fortran else "C")
        numbers = np.array([int(label) for label in labels], np.int64)
    except Exception as error:  # bytes that are no such pickle raise many kinds
        raise ValueError(f"{where} is no batch of CIFAR-10 ({type(error).__name__}: {error}): {_GIVE}") from error
    return _checked(pixels, numbers, where)


def _check_places(data: bytes) -> None:
    """UnpicklingError where a pickle keeps something in a place beyond those that it can have filled: the unpickler
    makes as many as the number says, which are more than there is memory for."""
    for number, (code, place, _) in enumerate(pickletools.genops(data)):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(place or 0) > number:
            raise pickle.UnpicklingError(f"place {place} of what it keeps, after {number} words")


def _checked(pixels: NDArray[np.uint8], labels: NDArray[np.int64], where: str) -> Batch:
    if pixels.shape != (len(labels), PIXELS) or not len(labels) or not 0 <= labels.min() <= labels.max() < 10:
        raise ValueError(
            f"{where} has pixels {pixels.shape} and {len(labels)} labels, and a batch has (N, {PIXELS}) and N of 0 to "
            f"9: {_GIVE}"
        )
    return pixels, labels


class _Array:
    """In place of an array of numpy: what its bytes are, and its shape."""

    data: bytes
    shape: tuple[int, ...]
    fortran: bool

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, data = state
        if not isinstance(kind, _Kind) or kind.name not in (b"u1", "u1") or not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array that is not of bytes")
        self.data, self.shape, self.fortran = data, tuple(int(side) for side in shape), bool(fortran)


class _Kind:
    """In place of a dtype."""

    def __init__(self, name: Any, *others: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass


def _array(*how: Any) -> _Array:
    return _Array()


class _Pickle(pickle.Unpickler):
    """Lists, dicts, numbers and bytes, and arrays of bytes: whatever else is named is refused, and nothing is run."""

    def find_class(self, module: str, name: str) -> Any:
        known = {"_reconstruct": _array, "ndarray": _Array, "dtype": _Kind}
        place = ("numpy.core.multiarray", "numpy._core.multiarray") if name == "_reconstruct" else ("numpy",)
        if name not in known or module not in place:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not run")
        return known[name]


def _pictures(path: Path, part: str, batches: Sequence[Batch], seed: int | None) -> Plan:
    """Pictures of all batches; mixed where there is a seed."""
    pixels, labels = (np.ascontiguousarray(np.concatenate(each)) for each in zip(*batches, strict=True))
    order = np.arange(len(labels)) if seed is None else permutation(len(labels), derive("make", seed))
    classes = {name: number for number, name in enumerate(CIFAR_CLASSES)}

    def sample(number: int) -> Sample:
        chosen = int(order[number])
        picture = pixels[chosen].reshape(3, SIDE, SIDE).transpose(1, 2, 0)
        where = PurePath(CIFAR_CLASSES[labels[chosen]], f"{part}-{chosen:05d}.png")
        encoded = png.encoded(np.ascontiguousarray(picture))
        return {"__key__": f"{chosen:08d}", "png": encoded, **labelled(where, classes)}

    digest = hashlib.blake2b(pixels.data, digest_size=16).hexdigest()
    facts = {"source": f"cifar-10 {part}", "pixels": digest, "seed": seed, "classes": list(CIFAR_CLASSES)}
    return Plan(len(labels), facts, sample)


def _gtsrb(path: Path, seed: int) -> Plan:
    archive = zipfile.ZipFile(path)
    found = {entry: named for entry in archive.infolist() if (named := GTSRB.fullmatch(entry.filename))}
    if not found:
        raise ValueError(f"{path} has no picture of GTSRB, as Final_Training/Images/00000/00000_00000.ppm: {_GIVE}")
    entries = sorted(found, key=lambda entry: entry.filename)
    paths = {entry: PurePath(*filter(None, named.groups())) for entry, named in found.items()}
    classes = classes_of([*paths.values()])
    order = permutation(len(entries), derive("make", seed))

    def sample(number: int) -> Sample:
        chosen = int(order[number])
        entry = entries[chosen]
        picture = _sign(archive, entry, path)
        return {"__key__": f"{chosen:08d}", "png": png.encoded(picture), **labelled(paths[entry], classes)}

    listing = digest_of((entry.filename, entry.CRC) for entry in entries)
    facts = {"source": "gtsrb", "listing": listing, "seed": seed, "classes": list(classes)}
    return Plan(len(entries), facts, sample)


def _sign(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> NDArray[np.uint8]:
    """The pixels of one PPM, uint8 (H, W, 3)."""
    try:
        data = io.BytesIO(packed.of_zip(archive, entry, MOST_BYTES))
        with Image.open(data, formats=["PPM"]) as image:
            if max(image.size) > MOST_SIDE:
                raise ValueError(f"{image.width} x {image.height} pixels")
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # of zip, of Pillow
        raise ValueError(f"{entry.filename} in {path} is no whole picture ({error}): get the archive anew") from error
