"""Scores of a set of images against a reference: FID, sFID, Inception score, precision and recall, as ADM defines them.

Where evaluators differ, this is the definition of guided-diffusion's evaluator: Inception score as the mean over parts
of 5000 images in their order (10 parts of 50,000; torch-fidelity shuffles first), sFID on 7 channels of a middle layer,
precision and recall by third neighbours in the pooled features, where distances are float64 here and were float16
there. The network is an argument. Not here: what reconstructions are measured by (reconstruction.py, fid.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vqscale.metrics import fid
from vqscale.metrics.fid import Moments, Statistics, frechet
from vqscale.metrics.sample_file import SampleFile
from vqscale.parallel import ops
from vqscale.parallel.mesh import Axis, Mesh

PART = 5000
NEIGHBOURS = 3
BLOCK = 2048


class FeatureNetwork(Protocol):
    """uint8 images (N, 3, H, W) -> pooled features (N, D), spatial features (N, E), logits (N, C).

    facts: sha256 of the weights, and whether they are the `published` ones. dims: (D, E, C).
    """

    @property
    def facts(self) -> Mapping[str, Any]: ...
    @property
    def dims(self) -> tuple[int, int, int]: ...
    def __call__(self, images: Tensor, /) -> tuple[Tensor, Tensor, Tensor]: ...


# The names of the field are for numbers by the published weights; all others compare with nobody's.
OTHER_NAMES = {
    "rfid": "distance_other_inception",
    "fid": "distance_other_inception",
    "sfid": "spatial_distance_other_inception",
    "inception_score": "score_other_inception",
    "precision": "precision_other_inception",
    "recall": "recall_other_inception",
}


def named(scores: Mapping[str, float], facts: Mapping[str, Any]) -> dict[str, float]:
    """Scores under the names that they deserve: those of the field only if the network's weights are the published."""
    return {name if facts.get("published") else OTHER_NAMES.get(name, name): x for name, x in scores.items()}


class InceptionScore:
    """exp of the mean divergence of p(class | image) from its mean, for each part of the images; their mean.

    Sums by part are kept, so that images may come in any order and from any rank, under their numbers.
    """

    def __init__(
        self, num_images: int, num_classes: int, device: torch.device | str = "cpu", *, part: int = PART
    ) -> None:
        self.part, parts = part, -(-num_images // part)
        self._sums = torch.zeros(parts, num_classes + 2, dtype=torch.float64, device=device)

    def add(self, logits_NC: Tensor, first: int) -> None:
        """Count the images with numbers first, first + 1, ... of this rank."""
        log_NC = logits_NC.to(self._sums).log_softmax(1)
        p_NC = log_NC.exp()
        rows = torch.cat([p_NC, (p_NC * log_NC).sum(1, keepdim=True), torch.ones_like(p_NC[:, :1])], dim=1)
        part_N = torch.arange(first, first + len(rows), device=rows.device) // self.part
        self._sums.index_add_(0, part_N, rows)

    def value(self, axis: Axis) -> float:
        """Over the images of all ranks, the same on every rank. Collective."""
        sums = ops.sum_over(self._sums, axis)
        count, mean_log, mean_p = sums[:, -1], sums[:, -2] / sums[:, -1], sums[:, :-2] / sums[:, -1:]
        assert (count > 0).all(), "a part without images"
        return float((mean_log - torch.xlogy(mean_p, mean_p).sum(1)).exp().mean())


def precision_recall(
    reference_RD: Tensor, samples_SD: Tensor, neighbours: int = NEIGHBOURS, block: int = BLOCK
) -> tuple[float, float]:
    """(share of samples in the reference's manifold, share of the reference in the samples' manifold).

    The manifold of a set is the union of balls about its points, each reaching to the point's k-th neighbour in the set
    (Kynkäänniemi et al. 2019). Block by block: never more than block x block distances. Float64.
    """
    fewest = min(len(reference_RD), len(samples_SD))
    if fewest <= neighbours:
        raise ValueError(
            f"precision and recall look at neighbour {neighbours} of each image, but one of the sets has {fewest} "
            f"images: give at least {neighbours + 1} of both"
        )
    radii_R = _radii(reference_RD, neighbours, block)
    radii_S = _radii(samples_SD, neighbours, block)
    inside_S = torch.zeros(len(samples_SD), dtype=torch.bool, device=samples_SD.device)
    inside_R = torch.zeros(len(reference_RD), dtype=torch.bool, device=samples_SD.device)
    for r in range(0, len(reference_RD), block):
        for s in range(0, len(samples_SD), block):
            distance = _squares(reference_RD[r : r + block], samples_SD[s : s + block])
            inside_S[s : s + block] |= (distance <= radii_R[r : r + block, None]).any(0)
            inside_R[r : r + block] |= (distance <= radii_S[None, s : s + block]).any(1)
    return float(inside_S.double().mean()), float(inside_R.double().mean())


def _radii(x_ND: Tensor, neighbours: int, block: int) -> Tensor:
    """Squared distance of each point to its k-th neighbour among the others."""
    radii = []
    for begin in range(0, len(x_ND), block):
        rows = x_ND[begin : begin + block]
        nearest = rows.new_zeros(len(rows), 0, dtype=torch.float64)
        for other in range(0, len(x_ND), block):
            found = torch.cat([nearest, _squares(rows, x_ND[other : other + block])], dim=1)
            nearest = found.topk(min(neighbours + 1, found.shape[1]), largest=False).values
        radii.append(nearest[:, neighbours])  # the first is the point itself
    return torch.cat(radii)


def _squares(x_ND: Tensor, y_MD: Tensor) -> Tensor:
    x_ND, y_MD = x_ND.double(), y_MD.double()
    norms = x_ND.square().sum(1, keepdim=True) + y_MD.square().sum(1)
    return torch.addmm(norms, x_ND, y_MD.T, alpha=-2).clamp(min=0)


@dataclass(frozen=True)
class Described:
    """What is known of a set of images. None: the file it comes from does not say it."""

    pool: Statistics
    spatial: Statistics | None
    points_ND: Tensor | None  # pooled features of its images, or of some of a data set's
    inception_score: float | None
    facts: Mapping[str, Any]  # of the network


@torch.no_grad()
def describe(
    images: SampleFile,
    network: FeatureNetwork,
    mesh: Mesh,
    *,
    batch: int = 64,
    advance: Callable[[int, float], None] | None = None,
) -> Described:
    """Look once at every image of a file, each rank at its part; the same answer on every rank. Collective.

    The pooled features of all images end on every rank (50,000 x 2048: 400 MB); everything else is sums.
    """
    world = mesh.world
    if len(images) < world.size:
        raise ValueError(
            f"{images.path} has {len(images)} images for {world.size} processes: give more images, or start fewer"
        )
    pool, spatial = (Moments(dim, mesh.device) for dim in network.dims[:2])
    score = InceptionScore(len(images), network.dims[2], mesh.device)
    points, since = [], time.perf_counter()
    for first, part in images.batches(batch, world.rank, world.size):
        waited = time.perf_counter() - since
        pool_ND, spatial_NE, logits_NC = network(part.to(mesh.device))
        pool.add(pool_ND)
        spatial.add(spatial_NE)
        score.add(logits_NC, first)
        points.append(pool_ND)
        if advance is not None:
            advance(len(part) * world.size, waited)
        since = time.perf_counter()
    points_ND = _whole(torch.cat(points), images, mesh)
    return Described(pool.statistics(world), spatial.statistics(world), points_ND, score.value(world), network.facts)


def _whole(part_ND: Tensor, images: SampleFile, mesh: Mesh) -> Tensor:
    """The features of all ranks in the order of the file."""
    sizes = [last - first for first, last in (images.part(rank, mesh.world.size) for rank in range(mesh.world.size))]
    padded = part_ND.new_zeros(max(sizes), part_ND.shape[1])
    padded[: len(part_ND)] = part_ND
    parts = ops.gather(padded, mesh.world).split(max(sizes))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def read_reference(
    path: Path | str,
    network: FeatureNetwork,
    mesh: Mesh,
    *,
    batch: int = 64,
    advance: Callable[[int, float], None] | None = None,
) -> Described:
    """A reference from its file: the statistics that it states, and what must be seen of its images. Collective.

    A batch of ADM states mu and sigma of the whole training set, while its 10,000 images serve precision and recall. In
    a file of ours, which has no images, points (score.Points) do; one with neither gives no precision and recall, and
    one without statistics those of its images.
    """
    stated = fid.read(path, network.facts, network.dims)
    if not stated.images:
        assert stated.pool is not None, "a file without statistics has images"
        points_ND = None if stated.points_ND is None else stated.points_ND.to(mesh.device)
        return Described(stated.pool, stated.spatial, points_ND, None, network.facts)
    seen = describe(SampleFile(path), network, mesh, batch=batch, advance=advance)
    return replace(seen, pool=stated.pool or seen.pool, spatial=stated.spatial or seen.spatial)


def compare(samples: Described, reference: Described) -> dict[str, float]:
    """fid, sfid, inception_score, precision, recall, as far as the reference goes; no communication.

    Under other names when the network's weights are not the published ones.
    """
    scores = {"fid": frechet(samples.pool, reference.pool)}
    if samples.spatial is not None and reference.spatial is not None:
        scores["sfid"] = frechet(samples.spatial, reference.spatial)
    if samples.inception_score is not None:
        scores["inception_score"] = samples.inception_score
    if samples.points_ND is not None and reference.points_ND is not None:
        scores["precision"], scores["recall"] = precision_recall(reference.points_ND, samples.points_ND)
    return named(scores, samples.facts)
