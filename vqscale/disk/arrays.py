"""Arrays on the disk, opened as this package writes them: zarr v3, of numbers.

Whatever lies there may be a stranger's: arrays of zarr v2 may name a filter that runs what is in their chunks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def open_array(path: Path | str, shape: tuple[int, ...] | None = None, write: bool = False) -> Any:
    """The zarr array of a folder, of numbers and, where it is given, of this shape. ValueError for another one, or
    none. Nothing but its metadata is read.
    """
    import zarr  # here: who only computes needs no files

    try:
        array = zarr.open_array(str(path), mode="r+" if write else "r", zarr_format=3)
        kind, found = array.dtype.kind, tuple(array.shape)
    except Exception as error:  # zarr raises many kinds on metadata that nobody wrote
        raise ValueError(_refused(path, f"{type(error).__name__}: {error}")) from error
    if kind not in "biuf":
        raise ValueError(_refused(path, f"it has the type {array.dtype}, which is none of numbers"))
    if shape is not None and found != shape:
        raise ValueError(_refused(path, f"it has the shape {found}, and expected is {shape}"))
    return array


def _refused(path: Path | str, why: str) -> str:
    return f"{path} is no array of numbers in zarr v3 as it was written here ({why}): copy the folder again"
