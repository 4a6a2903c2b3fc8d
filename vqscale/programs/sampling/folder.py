"""The folder of samples: what was asked for, batches as they are finished, and at the end one file for evaluators.

OUT/sample.json       settings, prior, tokenizer, commit, speed; "state" is begun or done
OUT/parts/000012.npz  images, labels and ids of batch 12, until all are there
OUT/samples.npz       arr_0 uint8 (N, height, width, 3), arr_1 int64 labels (N,), as ADM's evaluator reads them; and ids
                      (of sounds arr_0 is int16 (N, samples))
OUT/grid.png          the first images of every class, a row each
OUT/000012.wav        of sounds: each as a file
OUT/cache/            where ids alone are asked for, in place of these three: a token cache (drawn_cache.py)

Every file appears by a rename when it is on the disk (disk/files.py), so whatever is there is whole. Nothing here knows
ranks or networks.
"""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from vqscale.data.tokens import write as cached
from vqscale.disk import files, manifest
from vqscale.run.folder import RunError
from vqscale.show import pictures
from vqscale.signals import Signal

FACTS, FILE, GRID, PARTS, CACHE = "sample.json", "samples.npz", "grid.png", "parts", "cache"
GRID_ROWS, GRID_COLUMNS = 16, 8
_NUMBER = re.compile(r"\d{6,}")  # of a batch or a sample, as files are named
_EPOCH = (1980, 1, 1, 0, 0, 0)  # equal samples are equal files, whenever they are written


def begin(
    folder: Path, facts: Mapping[str, Any], overwrite: bool = False, before: Mapping[str, Any] | None = None
) -> list[int] | None:
    """Batches that are missing in the folder; None where all is done. ValueError if it holds other samples, unless they
    may be overwritten.

    facts["settings"], facts["prior"] and facts["tokenizer"] say what the samples follow from; settings that are not
    among those of the folder, for it is older than they are, were as `before` says.
    """
    old = read(folder)
    if old is not None:
        old = {**old, "settings": {**(before or {}), **old.get("settings", {})}}
    if overwrite and old is not None and differences(old, facts):
        _remove_samples(folder)
        return _begin_anew(folder, facts)
    if old is None:
        there = [name for name in (FILE, GRID, PARTS, CACHE) if (folder / name).exists()]
        if there:
            raise ValueError(
                f"{folder} has {' and '.join(there)} and no {FACTS} that says that they are samples of this program, "
                "so they are not written over: give another folder, or remove them"
            )
        return _begin_anew(folder, facts)
    lines = differences(old, facts)
    if lines:
        raise ValueError(
            f"{folder} holds other samples than are asked for:\n  " + "\n  ".join(lines) + "\ngive another folder, set "
            "these back to go on with the old ones, or --overwrite to throw them away"
        )
    made = f"{CACHE}/{manifest.NAME}" if facts["settings"].get("ids_only") else FILE
    if old.get("state") == "done" and (folder / made).exists():
        _remove_parts(folder)  # of a process that was killed before its last step
        return None
    (folder / PARTS).mkdir(exist_ok=True)
    return [batch for batch in range(num_batches(facts["settings"])) if not part(folder, batch).exists()]


def _begin_anew(folder: Path, facts: Mapping[str, Any]) -> list[int]:
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, {"state": "begun", **facts})  # first: it says whose the others are
    (folder / PARTS).mkdir(exist_ok=True)
    return list(range(num_batches(facts["settings"])))


def _remove_samples(folder: Path) -> None:
    """Remove what `write`, `write_part` and `finish` write, and nothing that somebody laid beside it."""
    _remove_parts(folder)
    cached.remove(folder / CACHE)
    for path in (folder / FILE, folder / GRID, *folder.glob("*.wav")):
        if path.suffix != ".wav" or _NUMBER.fullmatch(path.stem):
            path.unlink(missing_ok=True)


def _remove_parts(folder: Path) -> None:
    for path in (folder / PARTS).glob("*.npz*"):
        if _NUMBER.fullmatch(path.name.removesuffix(".tmp").removesuffix(".npz")):
            path.unlink()
    with contextlib.suppress(OSError):  # there is none, or something else lies in it
        (folder / PARTS).rmdir()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What of two facts would give other images, a line each."""
    found = []
    for what, key in (("settings", ""), ("prior", "fingerprint"), ("tokenizer", "fingerprint")):
        before, now = json.loads(json.dumps(old.get(what, {}))), json.loads(json.dumps(new[what]))
        for name in [key] if key else list(dict.fromkeys([*before, *now])):
            if before.get(name) != now.get(name):
                found.append(f"{what}.{name} is {_short(now.get(name))}, and was {_short(before.get(name))}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:76] + " ..."


def num_batches(settings: Mapping[str, Any]) -> int:
    return -(-int(settings["num_images"]) // int(settings["batch"]))


def read(folder: Path) -> dict[str, Any] | None:
    """What sample.json says; None without one. ValueError where it cannot be read."""
    path = folder / FACTS
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): remove the folder, or give another") from None


def settings(folder: Path) -> dict[str, Any] | None:
    """The settings of samples that were begun in the folder, as they were written; None without any."""
    found = read(folder)
    return None if found is None else dict(found.get("settings", {}))


def write(folder: Path, facts: Mapping[str, Any]) -> None:
    files.write_json(folder / FACTS, facts)


def part(folder: Path, batch: int) -> Path:
    return folder / PARTS / f"{batch:06d}.npz"


def write_part(folder: Path, batch: int, **arrays: NDArray[Any]) -> None:
    """Images (b, height, width, 3) or what else a signal keeps, labels (b,) and ids (b, *grid) of a batch."""
    with files.writing(part(folder, batch)) as file:
        np.savez(file, allow_pickle=False, **arrays)


def parts(folder: Path, settings: Mapping[str, Any], key: str) -> Iterator[NDArray[Any]]:
    """What all batches have under a key, one after the other."""
    return (_load(part(folder, batch), key) for batch in range(num_batches(settings)))


def close(folder: Path, facts: Mapping[str, Any]) -> None:
    """The last step, when all that was asked for is on the disk."""
    write(folder, {"state": "done", **facts})
    _remove_parts(folder)


def finish(folder: Path, facts: Mapping[str, Any], signal: Signal) -> None:
    """Put the parts together, a part at a time, draw the grid, and remove them when the rest is durable."""
    settings, count = facts["settings"], int(facts["settings"]["num_images"])
    with files.writing(folder / FILE) as whole, zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as outer:
        for name, key in (("arr_0", "images"), ("arr_1", "labels"), ("ids", "ids")):
            with outer.open(zipfile.ZipInfo(f"{name}.npy", _EPOCH), "w", force_zip64=True) as file:
                _append(file, count, parts(folder, settings, key))
    every = [part(folder, batch) for batch in range(num_batches(settings))]
    pictures.save(folder / GRID, grid(every, settings, signal))
    _write_each(folder, parts(folder, settings, "images"), signal)
    close(folder, facts)


def _write_each(folder: Path, arrays: Iterator[NDArray[Any]], signal: Signal) -> None:
    """A file for each sample, where the signal has such."""
    for number, kept in enumerate(sample for array in arrays for sample in array):
        found = signal.file(kept)
        if found is None:
            return
        files.write(folder / f"{number:06d}.{found[0]}", found[1])


def _append(file: IO[bytes], count: int, arrays: Iterator[NDArray[Any]]) -> None:
    """Write a .npy of `count` rows from arrays that follow each other."""
    written = 0
    for array in arrays:
        if not written:
            kind = np.lib.format.dtype_to_descr(array.dtype)
            header = {"descr": kind, "fortran_order": False, "shape": (count, *array.shape[1:])}
            np.lib.format.write_array_header_1_0(file, header)
        file.write(np.ascontiguousarray(array).tobytes())
        written += len(array)
    assert written == count, f"{written} of {count} samples"


def _load(path: Path, key: str) -> NDArray[Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            array: NDArray[Any] = file[key]
            return array
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        path.unlink(missing_ok=True)
        raise RunError(
            f"{path} was damaged after it was written ({error}), and is removed: the same command makes it again"
        ) from error


def grid(every: list[Path], settings: Mapping[str, Any], signal: Signal) -> pictures.Picture:
    """Rows by class: of the first classes in their order the first images; nothing is empty. Where known ids bring the
    classes, rows by known image."""
    classes, count = len(settings["classes"]) or int(settings["known"]["images"]), int(settings["num_images"])
    rows = min(classes, GRID_ROWS, count)
    columns = min(GRID_COLUMNS, (count - rows) // classes + 1)
    wanted = {column * classes + row: row * columns + column for row in range(rows) for column in range(columns)}
    found: dict[int, NDArray[Any]] = {}
    for number, path in enumerate(every):
        first = number * int(settings["batch"])
        here = [n for n in wanted if first <= n < first + int(settings["batch"])]
        if here:
            images = _load(path, "images")
            found |= {wanted[n]: images[n - first] for n in here}
    stacked = signal.tiles(np.stack([found[place] for place in sorted(found)]))
    return pictures.tiles(stacked, columns, pictures.scale(*stacked.shape[2:]) if stacked.shape[2] < 128 else 1)
