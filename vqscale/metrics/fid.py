"""Fréchet distances between sets of features: sums over any number of ranks, statistics, their files, the distance.

It knows no network and no image: features come from elsewhere, and the number may be called FID only if they come from
the Inception that the field uses (metrics/generation.py gives the names). Everything is float64, because the distance
is a small difference of large traces.
"""

from __future__ import annotations

import json
import operator
import tokenize
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqscale.disk import files
from vqscale.parallel import ops
from vqscale.parallel.mesh import Axis

MOST_BYTES = 4 << 30  # of the arrays of a file of statistics: 250,000 points of 2048 features


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance (divided by n - 1) of D features, float64 on the CPU. count: of images; None is unknown."""

    mu_D: Tensor
    sigma_DD: Tensor
    count: int | None = None

    @property
    def dim(self) -> int:
        return len(self.mu_D)


class Moments:
    """Sums of the features of this rank and of their outer products, about the mean of the rank's first batch.

    Nothing is communicated before `statistics`, which adds the ranks up: D * D + D + 1 numbers, whatever the number of
    images. How images were spread over ranks and batches changes the result by rounding alone (1e-15 of the variance:
    sums about zero would round in units of the squared mean).
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self._origin_D, self._sum_D = torch.zeros(2, dim, dtype=torch.float64, device=device)
        self._outer_DD = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, x_ND: Tensor) -> None:
        """Count N feature vectors of this rank; N may be 0 and may differ between ranks."""
        if not len(x_ND):
            return
        x_ND = x_ND.to(self._outer_DD)
        if not self.count:
            self._origin_D = x_ND.mean(0)
        x_ND = x_ND - self._origin_D
        self._outer_DD.addmm_(x_ND.T, x_ND)
        self._sum_D += x_ND.sum(0)
        self.count += len(x_ND)

    def statistics(self, axis: Axis) -> Statistics:
        """Of the vectors of all ranks, the same on every rank. Collective. ValueError for fewer than two vectors."""
        here = self._sum_D.new_tensor([self.count])
        sums = ops.sum_over(torch.cat([self._sum_D + self.count * self._origin_D, here]), axis)
        count = int(sums[-1])
        if count < 2:
            raise ValueError(f"a covariance takes at least 2 images, and there are {count}: give more images")
        mu_D = sums[:-1] / count
        moved_D = mu_D - self._origin_D
        crossed_DD = torch.outer(self._sum_D, moved_D)
        centred_DD = self._outer_DD - crossed_DD - crossed_DD.T + self.count * torch.outer(moved_D, moved_D)
        sigma_DD = ops.sum_over(centred_DD, axis).cpu() / (count - 1)
        return Statistics(mu_D.cpu(), (sigma_DD + sigma_DD.T) / 2, count)


def frechet(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr A + tr B - 2 tr (A B)^(1/2) for covariances A and B; 0 for equal statistics.

    tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2): no root of a product is taken, so covariances
    without full rank (fewer images than features) need nothing added to their diagonals and cost no digits.
    """
    _check_dims(a.dim, b.dim, "two sets")
    crossed = torch.linalg.svdvals(_root(a.sigma_DD).T @ _root(b.sigma_DD)).sum()
    means = (a.mu_D - b.mu_D).square().sum()
    return max(float(means + a.sigma_DD.trace() + b.sigma_DD.trace() - 2 * crossed), 0.0)


def _check_dims(dim: int, other: int, what: str) -> None:
    if dim != other:
        raise ValueError(
            f"{what}: statistics of {dim} and of {other} features cannot be compared: make both with the same network "
            "and layer (2048 pooled features for FID, 2023 spatial ones for sFID)"
        )


def _root(sigma_DD: Tensor) -> Tensor:
    """R, D x rank, with R R^T = sigma; eigenvalues that are rounding, positive or negative, are zero."""
    values, vectors_DD = torch.linalg.eigh(sigma_DD)
    kept = values > values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors_DD[:, kept] * values[kept].sqrt()


@dataclass(frozen=True)
class Reference:
    """What a file of statistics holds, and what it says of itself. Files that others made say nothing."""

    path: Path
    pool: Statistics | None
    spatial: Statistics | None
    images: bool = False
    """whether there are images too, under arr_0"""
    facts: Mapping[str, Any] = field(default_factory=dict)
    points_ND: Tensor | None = None
    """pooled features of some of the images"""


def save(
    path: Path | str,
    pool: Statistics,
    spatial: Statistics | None,
    facts: Mapping[str, Any],
    points_ND: Tensor | None = None,
) -> None:
    """Write an npz with the keys of ADM's reference batches (mu, sigma, mu_s, sigma_s), count, facts (JSON), points."""
    path = Path(path)
    arrays: dict[str, Any] = {"mu": pool.mu_D.numpy(), "sigma": pool.sigma_DD.numpy()}
    if spatial is not None:
        arrays |= {"mu_s": spatial.mu_D.numpy(), "sigma_s": spatial.sigma_DD.numpy()}
    if pool.count is not None:
        arrays["count"] = np.int64(pool.count)
    if points_ND is not None:
        arrays["points"] = points_ND.cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.writing(path) as file:
        np.savez(file, facts=np.array(json.dumps(dict(facts))), **arrays)


def read(path: Path | str, facts: Mapping[str, Any] | None = None, dims: Sequence[int] = ()) -> Reference:
    """The statistics in an npz of ours, of ADM or of pytorch-fid; pool is None where there are only images (arr_0).

    facts and dims (pooled, spatial) are those of the network that will be compared with it: a file by other weights,
    or of another number of features, is refused. ValueError for it and for what is no such file.
    """
    path = Path(path)
    where = "give an npz with mu and sigma, as `vqscale evaluate statistics` writes it, or a reference batch of ADM"
    if not path.is_file():
        raise ValueError(f"the statistics {path} are no file: {where}")
    try:
        arrays, images = _arrays(path)
        said = dict(json.loads(str(arrays["facts"]))) if "facts" in arrays else {}
        count = operator.index(arrays["count"].item()) if "count" in arrays else None
    except _UNREADABLE as error:
        told = str(error)[:200] or type(error).__name__
        raise ValueError(f"the statistics {path} cannot be read ({told}), cut off or no npz: {where}") from None
    pool = _pair(path, arrays, "mu", "sigma", count)
    if pool is None and not images:
        raise ValueError(f"{path} has neither mu and sigma nor images under arr_0: {where}")
    theirs, ours = said.get("sha256"), (facts or {}).get("sha256")
    if theirs and ours and theirs != ours:
        raise ValueError(
            f"the statistics {path} were made by the network whose weights have sha256 {theirs[:12]}..., and here it "
            f"is {ours[:12]}...: give the same weights, or make the statistics again"
        )
    spatial = _pair(path, arrays, "mu_s", "sigma_s", count)
    for found, dim in zip((pool, spatial), dims, strict=False):
        if found is not None:
            _check_dims(dim, found.dim, str(path))
    return Reference(path, pool, spatial, images, said, _points(path, arrays, pool))


_UNREADABLE = (
    *(OSError, ValueError, TypeError, LookupError, EOFError, AttributeError, zipfile.BadZipFile),
    *(MemoryError, RecursionError, NotImplementedError, SyntaxError, tokenize.TokenError),
)


def _arrays(path: Path) -> tuple[dict[str, Any], bool]:
    """(what is known of the arrays in an npz, whether there are images); raises whatever numpy does."""
    known = ("mu", "sigma", "mu_s", "sigma_s", "count", "facts", "points")
    with np.load(path, allow_pickle=False) as file:
        size = sum(file.zip.getinfo(f"{name}.npy").file_size for name in known if name in file.files)
        if size > MOST_BYTES:
            raise ValueError(f"{size} bytes of statistics, and at most {MOST_BYTES} are read")
        return {name: file[name] for name in known if name in file.files}, "arr_0" in file.files


def _points(path: Path, arrays: Mapping[str, Any], pool: Statistics | None) -> Tensor | None:
    if pool is None or "points" not in arrays:
        return None
    points = np.asarray(arrays["points"])
    if points.dtype.kind != "f" or points.shape[1:] != (pool.dim,) or not np.isfinite(points).all():
        raise ValueError(
            f"{path}: points is {points.dtype} of shape {points.shape}, and not floats of (N, {pool.dim}), or values "
            "that are not finite: make it again"
        )
    return torch.from_numpy(points)


def _pair(path: Path, arrays: Mapping[str, Any], mu: str, sigma: str, count: int | None) -> Statistics | None:
    if mu not in arrays and sigma not in arrays:
        return None
    shapes = tuple(np.shape(arrays[name]) if name in arrays else None for name in (mu, sigma))
    if shapes[0] is None or len(shapes[0]) != 1 or shapes[1] != shapes[0] * 2:
        raise ValueError(
            f"{path}: {mu} has shape {shapes[0]} and {sigma} {shapes[1]}, and not (D,) and (D, D): make it again"
        )
    kinds = [np.asarray(arrays[name]).dtype for name in (mu, sigma)]
    if any(kind.kind not in "fiu" for kind in kinds):
        raise ValueError(
            f"{path}: {mu} is of {kinds[0]} and {sigma} of {kinds[1]}, and not real numbers: make it again"
        )
    x, xx = (torch.from_numpy(np.asarray(arrays[name], dtype=np.float64)) for name in (mu, sigma))
    if not (x.isfinite().all() and xx.isfinite().all()):
        raise ValueError(f"{path}: {mu} or {sigma} has values that are not finite: make it again")
    if (xx.diagonal() < 0).any():
        raise ValueError(f"{path}: {sigma} has variances below 0, to {xx.diagonal().min():.3g}: make it again")
    return Statistics(x, (xx + xx.T) / 2, count)
