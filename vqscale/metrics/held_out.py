"""One look at held-out images by a trained tokenizer: how near its reconstructions are, and which codes it used.

`Pass` keeps the sums of such a look, on any number of ranks, for the evaluations of a training (train/evaluate.py) and
for `score`, the full one with the networks that measure. Not here: generated images (metrics/generation.py), the report
(show/report.py), and files of weights, which `vqscale evaluate` opens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vqscale.codes.usage import Hits
from vqscale.data.order import permutation
from vqscale.data.samples import SampleStream
from vqscale.metrics.fid import Moments, Reference, Statistics, frechet
from vqscale.metrics.generation import Described, FeatureNetwork, named
from vqscale.metrics.reconstruction import Reconstruction, to_bytes
from vqscale.nets.mode import evaluating
from vqscale.parallel import ops
from vqscale.parallel.clock import timed
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import Quantizer
from vqscale.seed import derive
from vqscale.tokenizer.model import Tokenizer

PICTURES = 16
MOST_TOLD = 5

Set = Literal["originals", "reconstructions"]


@dataclass(frozen=True)
class Measures:
    """Networks with weights, on the mesh's device. None: what it measures is left out.

    inception: see metrics.generation.FeatureNetwork. lpips(images, recon), both (B, 3, H, W) in [-1, 1] -> (B,); its
    number is called `lpips_name`. reference: statistics that reconstructions are compared with, instead of their
    originals'.
    """

    inception: FeatureNetwork | None = None
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None
    lpips_name: str = "lpips"
    reference: Reference | None = None

    def __post_init__(self) -> None:
        assert self.reference is None or self.reference.pool is not None, "a reference for reconstructions states mu"


class FeatureMoments:
    """Moments of the pooled and spatial features of one set of images of all ranks."""

    def __init__(self, inception: FeatureNetwork, mesh: Mesh) -> None:
        self.inception, self.mesh = inception, mesh
        self._pool, self._spatial = (Moments(dim, mesh.device) for dim in inception.dims[:2])

    def add(self, images: Tensor) -> Tensor:
        """Count images (B, 3, H, W) in [-1, 1] of this rank, as 8-bit images; B may be 0. Returns pooled features."""
        if not len(images):
            return images.new_zeros(0, self.inception.dims[0])
        pool, spatial, _ = self.inception(to_bytes(images))
        self._pool.add(pool)
        self._spatial.add(spatial)
        return pool

    def statistics(self) -> tuple[Statistics, Statistics]:
        """(pooled, spatial) over all ranks, the same on every rank. Collective."""
        return self._pool.statistics(self.mesh.world), self._spatial.statistics(self.mesh.world)


class Points:
    """Pooled features, float32, of `most` images of a data set, for precision and recall against it.

    Which ones their numbers alone say, drawn from all: another number of ranks, another batch, the same points.
    """

    def __init__(self, num_images: int, most: int, dim: int, mesh: Mesh) -> None:
        self.mesh, chosen = mesh, torch.from_numpy(permutation(num_images, derive("points"))[:most])
        self._place = torch.full((num_images,), -1, device=mesh.device)
        self._place[chosen.to(mesh.device)] = torch.arange(len(chosen), device=mesh.device)
        self._rows = torch.zeros(len(chosen), dim + 1, device=mesh.device)  # the last column: 1 where one was seen

    def add(self, pool_ND: Tensor, numbers_N: Tensor) -> None:
        """Take those that are chosen from features of images of this rank."""
        place_N = self._place[numbers_N]
        taken_N = place_N >= 0
        self._rows[place_N[taken_N]] = torch.nn.functional.pad(pool_ND[taken_N].float(), (0, 1), value=1.0)

    def all(self) -> Tensor:
        """Of all ranks, on every rank, without images that could not be read. Collective."""
        rows = ops.sum_over(self._rows, self.mesh.world)
        return rows[rows[:, -1] > 0, :-1]


class Pass:
    """Sums over the held-out images of all ranks. Collective: every rank adds as many batches, of one shape."""

    def __init__(self, quantizer: Quantizer, mesh: Mesh, measures: Measures | None = None) -> None:
        self.mesh, self.measures = mesh, measures or Measures()
        self.columns = [Hits(quantizer.num_codes, mesh) for _ in range(quantizer.num_ids)]
        self.sums = Reconstruction(mesh.device)
        self._lpips = torch.zeros((), dtype=torch.float64, device=mesh.device)
        inception = self.measures.inception
        sets: tuple[Set, ...] = (
            ("originals", "reconstructions") if self.measures.reference is None else ("reconstructions",)
        )
        self.features = {} if inception is None else {name: FeatureMoments(inception, mesh) for name in sets}

    @property
    def num_codes(self) -> int:
        """Codes of all columns together."""
        return sum(hits.num_codes for hits in self.columns)

    def add(self, images: Tensor, recon: Tensor, ids: Tensor, valid: Tensor) -> None:
        """Count (B, 3, H, W) images and reconstructions and the ids of their tokens; what is not valid is padding."""
        per_image = ids.reshape(len(images), -1, len(self.columns))
        for column, hits in enumerate(self.columns):
            hits.add(torch.where(valid[:, None], per_image[:, :, column], -1).flatten())  # padding counts for no code
        images, recon = images[valid], recon[valid].clamp(-1, 1)
        self.sums.add(images, recon)
        if self.measures.lpips is not None and len(images):
            self._lpips += self.measures.lpips(images, recon).double().sum()
        for name, features in self.features.items():
            features.add(images if name == "originals" else recon)

    def numbers(self) -> dict[str, float]:
        """psnr, ssim, images, usage, perplexity, dead, and what the measures say; the same on every rank. Collective.

        usage is the share of codes that any of these images uses; with several ids per token, usage, perplexity and
        dead are means over their columns.
        """
        scores = Reconstruction.from_sums(ops.sum_over(self.sums.sums(), self.mesh.world))
        if self.measures.lpips is not None:
            scores[self.measures.lpips_name] = float(ops.sum_over(self._lpips, self.mesh.world)) / scores["images"]
        used = [hits.usage() for hits in self.columns]
        return scores | {name: sum(float(column[name]) for column in used) / len(used) for name in used[0]}

    def per_code(self) -> Tensor:
        """How often each code was taken, column after column (Hits.per_code); on every rank. Collective."""
        return torch.cat([hits.per_code() for hits in self.columns])


@dataclass(frozen=True)
class Scored:
    """What `score` found, the same on every rank."""

    numbers: dict[str, float]
    per_code: Tensor
    num_codes: int
    originals: Tensor  # the first images of the stream, on the CPU
    reconstructions: Tensor  # and what was made of them
    statistics: tuple[Statistics, Statistics] | None  # of the originals, where Inception saw them
    broken: list[str]  # a few of what could not be read


@torch.no_grad()
def score(
    tokenizer: Tokenizer,
    stream: SampleStream,
    mesh: Mesh,
    measures: Measures | None = None,
    advance: Callable[[int, float], None] | None = None,
) -> Scored:
    """Look at every image of an evaluation stream once. Collective; the same answer on any number of ranks.

    Images go to ids and back through `encode` and `decode`, so that what is measured is what ids carry, unless no id
    can say the quantizer's z (exact_decode is false): then they go through the whole tokenizer. ValueError on all ranks
    where no image can be read.
    """
    measures = measures or Measures()
    passed, shown = Pass(tokenizer.quantizer, mesh, measures), list[Tensor]()

    def look(images: Tensor, valid: Tensor, numbers: Tensor) -> None:
        recon, ids = through(tokenizer, images)
        passed.add(images, recon, ids, valid)
        if not shown:
            shown.extend(first_images(images, recon, mesh))

    with evaluating(tokenizer):
        seen = look_over(stream, mesh, look, advance)
    numbers = passed.numbers()
    statistics = {name: features.statistics() for name, features in passed.features.items()}
    if measures.inception is not None:
        against = measures.reference.pool if measures.reference else statistics["originals"][0]
        assert against is not None, "Measures takes no reference without statistics"
        distance = frechet(statistics["reconstructions"][0], against)
        numbers = named({"rfid": distance}, measures.inception.facts) | numbers
    numbers |= {"broken": seen.broken, "enlarged": seen.enlarged}
    return Scored(
        numbers, passed.per_code(), passed.num_codes, shown[0], shown[1], statistics.get("originals"), seen.told
    )


def through(tokenizer: Tokenizer, images: Tensor) -> tuple[Tensor, Tensor]:
    """(reconstructions in float32, ids) of images, by way of the ids where they say all."""
    if tokenizer.quantizer.exact_decode:
        ids = tokenizer.encode(images)
        return tokenizer.decode(ids).float(), ids
    recon, quantized = tokenizer(images)
    return recon.float(), quantized.ids


@torch.no_grad()
def statistics(
    stream: SampleStream,
    inception: FeatureNetwork,
    mesh: Mesh,
    advance: Callable[[int, float], None] | None = None,
    *,
    points: int = 0,
) -> tuple[Described, Seen]:
    """Statistics of every image of an evaluation stream, and points of so many of them, on every rank. Collective."""
    features, chosen = FeatureMoments(inception, mesh), Points(stream.num_samples, points, inception.dims[0], mesh)

    def look(images: Tensor, valid: Tensor, numbers: Tensor) -> None:
        chosen.add(features.add(images[valid]), numbers[valid])

    seen = look_over(stream, mesh, look, advance)
    pool, spatial = features.statistics()
    return Described(pool, spatial, chosen.all() if points else None, None, inception.facts), seen


@dataclass(frozen=True)
class Seen:
    """What was met on the way through a stream, on all ranks together."""

    images: int
    broken: int  # images that could not be read, and are in no number
    enlarged: int  # images whose short side had fewer pixels than the resize asks for
    told: list[str]  # a few of the broken


def look_over(
    stream: SampleStream,
    mesh: Mesh,
    look: Callable[[Tensor, Tensor, Tensor], None],
    advance: Callable[[int, float], None] | None = None,
) -> Seen:
    """look(images, valid, numbers) on every batch of an evaluation stream, on the mesh's device. Collective.

    ValueError on all ranks when not one image could be read.
    """
    counts, told = torch.zeros(3, dtype=torch.float64), list[str]()
    for batch, waited in timed(stream.batches()):
        look(*(tensor.to(mesh.device) for tensor in (batch.samples, batch.valid, batch.numbers)))
        counts += torch.tensor([int(batch.valid.sum()), len(batch.broken), batch.enlarged])
        told = (told + batch.broken)[:MOST_TOLD]
        if advance is not None:
            advance(stream.batch, waited)
    images, broken, enlarged = (int(x) for x in ops.sum_over(counts.to(mesh.device), mesh.world).tolist())
    told = [line for lines in ops.gather_objects(told, mesh.world) for line in lines][:MOST_TOLD]
    if not images:
        raise ValueError(
            f"none of the {stream.num_samples} images of {', '.join(stream.config.patterns)} could be read "
            f"({'; '.join(told) or 'there are none'}): give shards with images (jpg, png, webp)"
        )
    return Seen(images, broken, enlarged, told)


def first_images(images: Tensor, recon: Tensor, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """The first PICTURES images of a global batch, in its order, and their reconstructions; on the CPU. Collective."""
    both = torch.stack([images[:PICTURES], recon[:PICTURES]], dim=1).contiguous()
    both = ops.gather(both, mesh.world)[:PICTURES].cpu()
    return both[:, 0], both[:, 1]
