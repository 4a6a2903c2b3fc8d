"""Every held-out sample through a trained tokenizer, once, with the networks that measure; statistics of the originals.

Not here: the sums of such a look (train/held_out.py, which a training evaluates with too), generated images
(metrics/generation.py), the report (show/report.py), and files of weights, which `vqscale evaluate` opens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqscale.codes import noise
from vqscale.codes.swaps import Swaps
from vqscale.data.samples import SampleStream
from vqscale.metrics.features import FeatureMoments, Points
from vqscale.metrics.generation import Described, FeatureNetwork
from vqscale.nets.mode import evaluating
from vqscale.parallel import ops
from vqscale.parallel.clock import timed
from vqscale.parallel.mesh import Mesh
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.held_out import Pass, first_ones

MOST_TOLD = 5


@dataclass(frozen=True)
class Scored:
    """What `score` found, the same on every rank."""

    numbers: dict[str, float]
    per_code: Tensor
    num_codes: int
    originals: Tensor  # the first samples of the stream, on the CPU
    predicted: Tensor  # and what was made of them
    statistics: Mapping[str, Any]  # what else the sums of the signal know (Sums.statistics)
    broken: list[str]  # a few of what could not be read


@torch.no_grad()
def score(
    tokenizer: Tokenizer,
    stream: SampleStream,
    mesh: Mesh,
    measures: Any = None,
    advance: Callable[[int, float], None] | None = None,
) -> Scored:
    """Look at every sample of an evaluation stream once. Collective; the same answer on any number of ranks.

    Samples go to ids and back through `encode` and `decode`, so that what is measured is what ids carry, unless no id
    can say the quantizer's z (exact_decode is false): then they go through the whole tokenizer. `measures` as in
    Signal.sums. ValueError on all ranks where no sample can be read.
    """
    signal, shown = tokenizer.signal, list[Tensor]()
    passed = Pass(signal, tokenizer.quantizer, mesh, measures)

    def look(samples: Tensor, valid: Tensor, numbers: Tensor) -> None:
        output, ids = through(tokenizer, signal.enter(samples))
        predicted = signal.predict(output)
        passed.add(samples, predicted, ids, valid)
        if not shown:
            shown.extend(first_ones(samples, predicted, mesh))

    with evaluating(tokenizer):
        seen = look_over(stream, mesh, look, advance)
    numbers = passed.numbers() | {"broken": seen.broken, "enlarged": seen.enlarged}
    return Scored(numbers, passed.per_code(), passed.num_codes, shown[0], shown[1], passed.sums.statistics, seen.told)


def through(tokenizer: Tokenizer, entered: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """(output of the decoder, ids) of what enters, by way of the ids where they say all."""
    if tokenizer.quantizer.exact_decode:
        ids = tokenizer.encode(*entered)
        return tokenizer.decode(ids, *entered[1:]), ids
    output, quantized = tokenizer(*entered)
    return output, quantized.ids


@torch.no_grad()
def under_swaps(
    tokenizer: Tokenizer, stream: SampleStream, mesh: Mesh, shares: Sequence[float], neighbours: int
) -> dict[str, float]:
    """How a decoder bears wrong ids: PSNR of images of an evaluation stream where a share of their ids is swapped, for
    one of so many codes nearest to each (psnr_near_SHARE) or for any other code (psnr_any_SHARE). Collective; the same
    ids are swapped on any number of ranks, and those of a smaller share are swapped for the same at a larger one."""
    signal, quantizer = tokenizer.signal, tokenizer.quantizer
    near = Swaps.among_neighbours(quantizer.decode, quantizer.num_codes, neighbours, mesh)
    kinds = {"near": near, "any": Swaps(quantizer.num_codes)}
    sums = {(kind, share): signal.sums(mesh, None) for kind in kinds for share in shares}

    def look(samples: Tensor, valid: Tensor, numbers: Tensor) -> None:
        entered, keys_B = signal.enter(samples), noise.keys(0, numbers)
        ids = tokenizer.encode(*entered)
        for (kind, share), counted in sums.items():
            other = kinds[kind](ids.flatten(1), keys_B, share).view_as(ids)
            counted.add(samples[valid], signal.predict(tokenizer.decode(other, *entered[1:]))[valid])

    with evaluating(tokenizer):
        look_over(stream, mesh, look)
    return {f"psnr_{kind}_{share:g}": counted.numbers()["psnr"] for (kind, share), counted in sums.items()}


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
    """look(samples, valid, numbers) on every batch of an evaluation stream, on the mesh's device. Collective.

    ValueError on all ranks when not one sample could be read.
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
            f"none of the {stream.num_samples} {stream.config.kind} of {', '.join(stream.config.patterns)} could be "
            f"read ({'; '.join(told) or 'there are none'}): give shards with {stream.config.kind} "
            f"({', '.join(stream.config.suffixes)})"
        )
    return Seen(images, broken, enlarged, told)
