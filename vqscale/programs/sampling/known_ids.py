"""Ids that are given when images are drawn, of priors that draw in any order: where they come from, and which of them
are drawn anew.

They are the ids of a token cache, of samples that were drawn before, or of one picture, which the tokenizer encodes. A
region, rows and columns of the grid, is drawn; every other id stays as it is. Not here: the drawing (sample.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqscale.data.as_trained import as_trained
from vqscale.data.config import ImagesConfig
from vqscale.data.pixels import Pictures
from vqscale.data.tokens.stream import Cache
from vqscale.metrics.sample_file import SampleFile
from vqscale.parallel.background import on_first
from vqscale.parallel.mesh import Mesh
from vqscale.priors.base import Prior
from vqscale.programs.sampling import folder as sample_folder
from vqscale.programs.sampling.known import Ids, Known, Region
from vqscale.tokenizer.matching import ids_of
from vqscale.tokenizer.model import Tokenizer


def read(path: Path, region: Region, prior: Prior, tokenizer: Tokenizer, mesh: Mesh, most: int) -> Known:
    """Known ids of at most so many images at a path, for a prior and its tokenizer. Collective. ValueError on all ranks
    for what is none of the three, is of another tokenizer, or does not fit.
    """
    drawn, marks = region.of(prior.grid), ids_of(tokenizer)
    ids, labels = on_first(lambda: _files(path, marks, tokenizer.card, prior, most), mesh)
    if ids is None:
        with torch.no_grad():
            ids = tokenizer.encode(labels.to(mesh.device)).cpu().numpy()
        labels = np.full(1, -1)
    if ids.shape[1:] != prior.ids_shape:
        raise ValueError(
            f"the known ids of {path} are {' x '.join(map(str, ids.shape[1:]))} of an image, and the prior's "
            f"{' x '.join(map(str, prior.ids_shape))}: give ids, or a picture, of that size"
        )
    if not prior.num_classes:
        labels = np.full_like(labels, -1)
    return Known(np.where(drawn.reshape(drawn.shape + (1,) * (prior.num_ids > 1)), -1, ids), labels)


def _files(path: Path, marks: Sequence[str], card: Mapping[str, Any], prior: Prior, most: int) -> tuple[Any, Any]:
    """(ids, labels) of a cache or of samples of the tokenizer with this card, of whose ids `marks` are, (None, pixels)
    of a picture. ValueError for what is none of these."""
    if (path / "card.json").is_file():
        return _cached(path, marks, prior, most)
    file = path / sample_folder.FILE if path.is_dir() else path
    if file.suffix == ".npz" and file.is_file():
        return _sampled(file, marks, most)
    if not path.is_file():
        raise ValueError(
            f"--known {path} is no token cache, no finished samples and no picture: give the folder of vqscale encode "
            "or of vqscale sample, its samples.npz, or a file such as a PNG"
        )
    return None, _picture(path, card)


def _cached(path: Path, marks: Sequence[str], prior: Prior, most: int) -> tuple[Ids, Ids]:
    cache = Cache(path)
    mark = next((mark for mark in marks if mark == cache.card.tokenizer), marks[0])
    cache.expect(mark, prior.num_codes, prior.grid, prior.num_ids)
    broken = {number for number, _, _ in cache.card.broken}
    numbers = [n for n in range(min(cache.card.num_images, most + len(broken))) if n not in broken][:most]
    if not numbers:
        raise ValueError(f"the token cache in {path} has the ids of no image: give another as --known")
    ids = cache.first(numbers[-1] + 1)[numbers]
    return ids.astype(np.int64), np.asarray(cache.labels)[numbers].astype(np.int64)


def _sampled(file: Path, marks: Sequence[str], most: int) -> tuple[Ids, Ids]:
    facts = sample_folder.read(file.parent) or {}
    made_by = facts.get("tokenizer", {}).get("fingerprint", marks[0])
    if made_by not in marks:
        raise ValueError(
            f"the ids in {file} are of the tokenizer with fingerprint {made_by}, and the one given has "
            f"{marks[0]}: give samples of this one as --known"
        )
    labels = SampleFile(file).labels()
    with np.load(file, allow_pickle=False) as arrays:
        ids = arrays["ids"] if "ids" in arrays.files else np.zeros((0,))
    if ids.dtype.kind not in "iu" or not len(ids) or labels is None or len(labels) != len(ids) or ids.min() < 0:
        raise ValueError(f"{file} has no ids of its images: give a samples.npz of vqscale sample as --known")
    return ids[:most].astype(np.int64), labels[:most]


def _picture(path: Path, card: Mapping[str, Any]) -> Tensor:
    """The pixels of a picture, 1 x 3 x sides, read as the tokenizer of this card was trained."""
    if not card.get("image_size"):
        raise ValueError(
            f"--known {path} is a picture, and the tokenizer does not say for pictures of which size it was trained: "
            "encode shards of them with vqscale encode --image-size, and give that cache"
        )
    config = ImagesConfig((), **as_trained(card, None, None, None), crop="center")
    out = torch.empty(1, 3, *config.sides)
    try:
        Pictures(config).views([path.read_bytes()], "center", out)
    except Exception as error:  # a decoder may raise anything on what is no picture
        raise ValueError(
            f"--known {path} cannot be read as a picture ({error}): give one, or a token cache or samples"
        ) from None
    return out
