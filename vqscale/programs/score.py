"""Every held-out sample through a trained tokenizer, once, with the networks that measure; statistics of the originals.

Not here: the sums of such a look (train/held_out.py, which a training evaluates with too), generated images
(metrics/generation.py), what becomes of wrong ids (generability.py), the report (show/report.py), and files of
weights, which `vqscale evaluate` opens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Looked:
    """A batch that `score` has looked at, for those who look at the same one."""

    samples: Tensor
    entered: tuple[Tensor, ...]  # what the encoder was given of them
    valid: Tensor
    numbers: Tensor
    ids: Tensor  # (B, *grid), or (B, *grid, num_ids)


@torch.no_grad()
def score(
    tokenizer: Tokenizer,
    stream: SampleStream,
    mesh: Mesh,
    measures: Any = None,
    advance: Callable[[int, float], None] | None = None,
    beside: Sequence[Callable[[Looked], None]] = (),
) -> Scored:
    """Look at every sample of an evaluation stream once. Collective; the same answer on any number of ranks.

    Samples go to ids and back through `encode` and `decode`, so that what is measured is what ids carry, unless no id
    can say the quantizer's z (exact_decode is false): then they go through the whole tokenizer. `measures` as in
    Signal.sums; those `beside` it are given each batch with its ids. ValueError on all ranks where no sample can be
    read.
    """
    signal, shown = tokenizer.signal, list[Tensor]()
    passed = Pass(signal, tokenizer.quantizer, mesh, measures)

    def look(samples: Tensor, valid: Tensor, numbers: Tensor) -> None:
        entered = signal.enter(samples)
        output, ids = through(tokenizer, entered)
        predicted = signal.predict(output)
        passed.add(samples, predicted, ids, valid)
        if not shown:
            shown.extend(first_ones(samples, predicted, mesh))
        for other in beside:
            other(Looked(samples, entered, valid, numbers, ids))

    with evaluating(tokenizer):
        seen = look_over(stream, mesh, look, advance)
    numbers = passed.numbers() | {"broken": seen.broken, "enlarged": seen.enlarged}
    return Scored(numbers, passed.per_code(), passed.num_codes, shown[0], shown[1], passed.sums.statistics, seen.told)


def through(tokenizer: Tokenizer, entered: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """(output of the decoder, ids as of encode) of what enters, by way of the ids where they say all."""
    if tokenizer.quantizer.exact_decode:
        ids = tokenizer.encode(*entered)
        return tokenizer.decode(ids, *entered[1:]), ids
    output, quantized = tokenizer(*entered)
    return output, quantized.ids.view(*tokenizer.grid(entered[0]), *quantized.ids.shape[1:])


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


class Codes:
    """The ids of the first `count` samples of an evaluation stream, as looks at its batches bring them."""

    def __init__(self, count: int, mesh: Mesh) -> None:
        self._count, self._mesh, self._found = count, mesh, list[tuple[Tensor, Tensor]]()

    def __call__(self, looked: Looked) -> None:
        self.add(looked.valid, looked.numbers, looked.ids)

    def add(self, valid: Tensor, numbers: Tensor, ids: Tensor) -> None:
        wanted = valid & (numbers < self._count)
        self._found.append((numbers[wanted], ids[wanted]))

    def all(self) -> tuple[Tensor, Tensor]:
        """(ids (N, *grid); which of them could be read (N,)), on every rank. Collective."""
        device = self._mesh.device
        ids = torch.zeros(self._count, *self._found[0][1].shape[1:], dtype=torch.int64, device=device)
        is_there = torch.zeros(self._count, dtype=torch.int64, device=device)
        for numbers, its_ids in self._found:
            ids[numbers], is_there[numbers] = its_ids, 1
        return ops.sum_over(ids, self._mesh.world), ops.sum_over(is_there, self._mesh.world) > 0


@torch.no_grad()
def codes(
    tokenizer: Tokenizer,
    stream: SampleStream,
    mesh: Mesh,
    advance: Callable[[int, float], None] | None = None,
    *,
    most: int = 0,
) -> tuple[Tensor, Tensor]:
    """As Codes.all, of the first `most` samples of an evaluation stream, 0: of all. Collective."""
    signal, count = tokenizer.signal, min(most or stream.num_samples, stream.num_samples)
    found = Codes(count, mesh)

    def look(samples: Tensor, valid: Tensor, numbers: Tensor) -> None:
        found.add(valid, numbers, tokenizer.encode(*signal.enter(samples)))

    look_over(stream, mesh, look, advance, most=count)
    return found.all()


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
    *,
    most: int = 0,
) -> Seen:
    """look(samples, valid, numbers) on every batch of an evaluation stream, on the mesh's device, or on so many whole
    ones that `most` samples have come. Collective.

    ValueError on all ranks when not one sample could be read.
    """
    counts, told = torch.zeros(3, dtype=torch.float64), list[str]()
    batches = islice(stream.batches(), -(-most // stream.batch) if most else None)
    for batch, waited in timed(batches):
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
