"""manifest.json: the size and sha256 of every file of a folder, written last, so that damage is found before reading.

Not here: which files there are (checkpoint.py), and how one of them is written (files.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from vqscale.disk import files

NAME = "manifest.json"


def seal(file: Path) -> dict[str, Any]:
    """Make a file durable; its entry of the manifest, computed from what can be read back."""
    files.sync(file)
    with file.open("rb") as opened:
        return {"bytes": os.fstat(opened.fileno()).st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest with a hash of itself, and make everything under the folder durable.

    manifest["files"] maps paths relative to the folder to their entries from `seal`.
    """
    files.write(folder / NAME, json.dumps({**manifest, "sha256": _hash(manifest)}, indent=1))
    for inner, _, _ in os.walk(folder):
        files.sync(inner)


def read(folder: Path) -> dict[str, Any]:
    """The manifest as it was given to `write`; ValueError that says what is wrong with it."""
    try:
        manifest = json.loads((folder / NAME).read_text())
        claimed = manifest.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{NAME} cannot be read ({type(error).__name__}: {error})") from None
    if claimed != _hash(manifest):
        raise ValueError(f"{NAME} was changed after it was written")
    _check_entries(manifest.get("files"))
    return manifest


def _check_entries(entries: Any) -> None:
    """ValueError unless these are entries of files inside the folder: a manifest may be a stranger's."""
    if not isinstance(entries, dict):
        raise ValueError(f"{NAME} has no files")
    for name, entry in entries.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{NAME} names {name}, which is not in its folder")
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise ValueError(f"{NAME} does not say size and sha256 of {name}")


def is_file(path: Path) -> bool:
    """Whether it is a file that ends, or not there: no folder, pipe or device, from which reading might not return."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


def damage(folder: Path) -> str | None:
    """Why the files of this folder are not what was written, or None. Reads every byte of them."""

    def check(item: tuple[str, dict[str, Any]]) -> str | None:
        name, entry = item
        if not is_file(folder / name):
            return f"{name} is no file"
        try:
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes, not the {entry['bytes']} that were written"
            with (folder / name).open("rb") as file:
                same = hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
            return None if same else f"{name} was changed after it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"

    try:
        manifest = read(folder)
    except ValueError as error:
        return str(error)
    with ThreadPoolExecutor(4) as pool:
        return next((found for found in pool.map(check, manifest["files"].items()) if found), None)


def _hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
