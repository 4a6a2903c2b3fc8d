"""Pictures of a run as uint8 arrays of height x width x 3: reconstructions under their originals, usage of codes.

They are made from what the caller has gathered and know neither ranks nor TensorBoard: show.board shows them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from vqscale.disk import files, png
from vqscale.metrics.reconstruction import to_bytes
from vqscale.show import canvas

Picture = npt.NDArray[np.uint8]

_CURVE_POINTS = 2000
_LEAST_SIDE = 128  # smaller images are shown enlarged


def grid(originals: Tensor, reconstructions: Tensor, columns: int = 8, scale: int = 1) -> Picture:
    """(B, 3, H, W) twice, in [-1, 1] -> one picture: rows of `columns` originals, below each its reconstruction.

    Every pixel becomes scale x scale pixels, so that small images can be looked at.
    """
    if originals.shape != reconstructions.shape or not len(originals):
        raise ValueError(
            f"a grid shows one reconstruction of the same shape below each original, but got {tuple(originals.shape)} "
            f"and {tuple(reconstructions.shape)}: pass two batches of one shape, of at least one image"
        )
    return stacked([to_bytes(images.detach()) for images in (originals, reconstructions)], columns, scale)


def tiles(images: Tensor, columns: int = 8, scale: int = 1) -> Picture:
    """uint8 (B, 3, H, W) -> one picture of rows of `columns` images."""
    return stacked([images], columns, scale)


def stacked(sets: Sequence[Tensor], columns: int = 8, scale: int = 1) -> Picture:
    """Sets of uint8 (B, 3, H, W) -> one picture: rows of `columns` images of the first, below each that of the others.

    Every pixel becomes scale x scale pixels.
    """
    x = np.stack([images.permute(0, 2, 3, 1).cpu().numpy() for images in sets], axis=1)
    columns = min(columns, len(x))
    rows, (count, height, width) = -(-len(x) // columns), x.shape[1:4]
    picture = np.zeros((rows, count, height, columns, width, 3), dtype=np.uint8)
    for index, images in enumerate(x):
        picture[index // columns, :, :, index % columns] = images
    return picture.reshape(rows * count * height, columns * width, 3).repeat(scale, axis=0).repeat(scale, axis=1)


def scale(height: int, width: int) -> int:
    """How many times larger images of this size are shown, so that they can be looked at."""
    return max(1, _LEAST_SIDE // max(height, width))


def usage(counts: npt.ArrayLike | Tensor, title: str = "", num_codes: int | None = None) -> Picture:
    """How often each of K codes was chosen (K counts, any order) -> a picture of the counts, most used code first.

    Both axes are logarithmic, so 2^18 codes fit. The curve ends at the last code in use; the corner says how many.
    Codes that were never chosen may be left out of the counts: then num_codes says how many there are with them.
    """
    values = counts.detach().cpu().numpy() if isinstance(counts, Tensor) else np.asarray(counts)
    ordered = np.sort(values)[::-1]
    used, total = int((ordered > 0).sum()), num_codes or len(ordered)
    places = np.unique(np.geomspace(1, max(used, 1), _CURVE_POINTS).astype(np.int64))
    drawn, (axes,) = canvas.figure(6, 4, dpi=100)
    if used:
        axes.loglog(places, ordered[places - 1], drawstyle="steps-post")
        if total == len(ordered):
            axes.axhline(ordered.sum() / total, linestyle=":", color="gray", label="if all were used equally")
            axes.legend(loc="lower left")
    axes.set(xlim=(1, max(len(ordered), 2)), xlabel="codes, most used first", ylabel="times chosen", title=title)
    axes.text(0.98, 0.95, f"{used} of {total} codes used", transform=axes.transAxes, ha="right", va="top")
    return canvas.pixels(drawn)


def save(path: str | os.PathLike[str], picture: Picture | Tensor) -> Path:
    """Write a picture as PNG, with its folders."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    array = picture.cpu().numpy() if isinstance(picture, Tensor) else picture
    files.write(path, png.encoded(array))
    return path
