"""NYU Depth v2 in the forms in which it is passed on, to plans of shards: FastDepth's tree of .h5 files, the labeled
.mat with its splits, and the `sync` tree of pictures of BTS and its heirs.

Depth becomes gray PNG of 16 bits in millimetres, 0 where it is missing; images that were arrays become PNG, files stay
as they are. h5py and scipy are the extra `convert`, imported where a form needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqscale.data.made.make import Plan, Sample, listing
from vqscale.data.made.pairs import Coverage, depth_pair
from vqscale.data.order import permutation
from vqscale.disk import png
from vqscale.seed import derive

UNIT_M = 0.001
FARTHEST_M = 65.535  # what 16 bits of millimetres hold


def tree(root: Path, part: str, seed: int = 0, coverage: Coverage | None = None) -> Plan:
    """FastDepth's files, `root`/PART/SCENE/00001.h5 with rgb (3, H, W) uint8 and depth (H, W) in metres; PART is train
    or val. Training files are mixed by the seed. ValueError where there are none, or h5py is missing.
    """
    h5py = extra("h5py")
    found = sorted((root / part).rglob("*.h5"))
    if not found:
        raise ValueError(
            f"no .h5 file in {root / part}: give the folder that has FastDepth's train/SCENE/*.h5 and val/official/*.h5"
        )

    def arrays(number: int) -> tuple[Any, Any]:
        with h5py.File(found[number], "r") as file:
            if missing := {"rgb", "depth"} - set(file):
                raise ValueError(f"{found[number]} has no {' and no '.join(sorted(missing))}: it is not FastDepth's")
            return file["rgb"][()].transpose(1, 2, 0), file["depth"][()]

    order = permutation(len(found), derive("make", seed)) if part == "train" else np.arange(len(found))
    facts = {"source": "nyu", "part": part, "listing": listing(root, found), "seed": seed, "classes": []}
    return _plan(len(found), facts, lambda n: found[n], arrays, order, coverage)


def labeled(
    file: Path, splits: Path, part: str, raw: bool = False, seed: int = 0, coverage: Coverage | None = None
) -> Plan:
    """The labeled set: nyu_depth_v2_labeled.mat (version 7.3) with images (N, 3, W, H) and depths (N, W, H), and
    splits.mat with trainNdxs and testNdxs, numbered from 1. `raw` takes rawDepths, with what the sensor missed.
    ValueError for other files, or where h5py or scipy is missing.
    """
    h5py, scipy = extra("h5py"), extra("scipy.io")
    names = {"train": "trainNdxs", "test": "testNdxs"}
    depths = "rawDepths" if raw else "depths"
    numbers = np.asarray(_opened(scipy.loadmat, splits, "splits.mat")[names[part]]).ravel().astype(np.int64) - 1
    opened = _opened(lambda path: h5py.File(path, "r"), file, "nyu_depth_v2_labeled.mat, HDF5")
    if missing := {"images", depths} - set(opened):
        raise ValueError(f"{file} has no {' and no '.join(sorted(missing))}: give nyu_depth_v2_labeled.mat")
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(opened["images"]):
        raise ValueError(
            f"{splits} numbers images {numbers.min() + 1} to {numbers.max() + 1}, and {file} has "
            f"{len(opened['images'])}: give the splits.mat of the labeled set"
        )

    def arrays(number: int) -> tuple[Any, Any]:
        place = int(numbers[number])  # Matlab's arrays are stored with their axes reversed
        return opened["images"][place].transpose(2, 1, 0), opened[depths][place].T

    order = permutation(len(numbers), derive("make", seed)) if part == "train" else np.arange(len(numbers))
    facts: dict[str, Any] = {
        "source": "nyu_labeled",
        "part": part,
        "depths": depths,
        "bytes": file.stat().st_size,
        "seed": seed,
    }
    facts["classes"] = []
    return _plan(len(numbers), facts, lambda n: f"image {numbers[n] + 1} of {file}", arrays, order, coverage)


def sync(root: Path, listed: Path | None = None, seed: int = 0, coverage: Coverage | None = None) -> Plan:
    """A tree with SCENE/rgb_00045.jpg beside SCENE/sync_depth_00045.png, gray of 16 bits in millimetres: files as they
    are, mixed by the seed. `listed` names the pairs, as the published lists do: image, depth and more on each line.
    ValueError where there are none, or half a pair.
    """
    images = _of_list(root, listed) if listed else sorted(root.rglob("rgb_*.jpg"))
    pairs = [(path, path.with_name(path.name.replace("rgb_", "sync_depth_", 1)).with_suffix(".png")) for path in images]
    if not pairs:
        raise ValueError(f"no rgb_*.jpg in {root}: give the folder with SCENE/rgb_00045.jpg and sync_depth_00045.png")
    if lacking := [str(path) for pair in pairs for path in pair if not path.is_file()]:
        raise ValueError(
            f"{len(lacking)} files of {len(pairs)} pairs are missing, the first {lacking[0]}: bring them, or name the "
            "pairs that are there by --list"
        )
    order = permutation(len(pairs), derive("make", seed))

    def sample(number: int) -> Sample:
        chosen = int(order[number])
        return {"__key__": f"{chosen:08d}", **depth_pair(*pairs[chosen], root, coverage)}

    facts = {"source": "sync", "listing": listing(root, [path for pair in pairs for path in pair]), "seed": seed}
    return Plan(len(pairs), {**facts, "classes": []}, sample, {"depth": {"unit_m": UNIT_M}})


def steps_of(metres: NDArray[np.floating], what: object) -> NDArray[np.uint16]:
    """Depth in metres to millimetres, rounded; ValueError for what is no depth."""
    if not np.isfinite(metres).all() or metres.min() < 0 or metres.max() > FARTHEST_M:
        raise ValueError(
            f"{what} has depths from {metres.min()} to {metres.max()} m, and what becomes 16 bits of millimetres lies "
            f"between 0 and {FARTHEST_M} m: mend the file or take it out"
        )
    return np.round(metres.astype(np.float64) / UNIT_M).astype(np.uint16)


def extra(name: str) -> Any:
    """A package of the extra `convert`; ValueError where it is missing."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"this form is read by {name.split('.')[0]}, which is not installed: pip install 'vqscale[convert]'"
        ) from error


def _plan(
    count: int,
    facts: Mapping[str, Any],
    name_of: Callable[[int], object],
    arrays: Callable[[int], tuple[NDArray[np.uint8], NDArray[np.floating]]],
    order: Sequence[int] | NDArray[np.int64],
    coverage: Coverage | None,
) -> Plan:
    """Samples of arrays: an image (H, W, 3) and metres (H, W)."""

    def sample(number: int) -> Sample:
        chosen = int(order[number])
        pixels, metres = arrays(chosen)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.shape[:2] != metres.shape:
            raise ValueError(
                f"{name_of(chosen)} has an image of {pixels.dtype} {pixels.shape} and depth {metres.shape}: an image "
                "is 8-bit RGB, and depth is of its pixels"
            )
        steps = steps_of(metres, name_of(chosen))
        if coverage:
            coverage.add(steps)
        return {"__key__": f"{chosen:08d}", "png": png.encoded(pixels), "depth.png": png.encoded(steps)}

    return Plan(count, facts, sample, {"depth": {"unit_m": UNIT_M}})


def _opened(reader: Callable[[Path], Any], path: Path, what: str) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is no file: give {what}")
    try:
        return reader(path)
    except Exception as error:  # each library raises its own kinds on bytes that it does not know
        raise ValueError(f"{path} cannot be read ({error}): give {what}") from error


def _of_list(root: Path, listed: Path) -> list[Path]:
    """The images of the first words of the lines."""
    words = [line.split()[0] for line in listed.read_text().splitlines() if line.strip()]
    images = [root / word.lstrip("/") for word in words]
    if outside := [word for word in words if ".." in Path(word).parts]:
        raise ValueError(f"{listed} names {outside[0]}, which is outside {root}: its lines name files below --source")
    return images
