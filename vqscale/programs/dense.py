"""How much guiding codes help a decoder that sees the image too: held-out samples decoded with their own codes, with a
part of them, with none, with another image's, and with those that a prior draws, beside a constant.

Each is a row of one table, of the signal's metrics. What a sample is given depends on its number alone, so the numbers
are the same on any number of ranks and in any batch. Not here: the command and its page (commands/evaluate/dense.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vqscale.codes import noise
from vqscale.data.samples import SampleStream
from vqscale.nets.mode import evaluating
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.programs.dense_truth import Files, Samples
from vqscale.programs.score import codes, look_over
from vqscale.seed import derive
from vqscale.signals.labelled import Labelled
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.held_out import first_ones

Draw = Callable[[Tensor, Tensor], Tensor]  # contexts (B, C, *sides), numbers of the samples (B,) -> ids (B, *grid)
Advance = Callable[[int, float], None]
Keep = Callable[[str, Tensor, Tensor], None]  # name of a row, predictions of this rank's samples, their numbers
CEILING, NO_CODE, ANOTHER, CONSTANT = "true codes", "no code", "codes of another image", "constant"
KEPT = {CEILING: 1.0, "1/2 of the codes": 1 / 2, "1/4 of the codes": 1 / 4, "1/8 of the codes": 1 / 8, NO_CODE: 0.0}


@dataclass(frozen=True)
class Measured:
    """The table, the same on every rank, and some samples with what was predicted of them, on the CPU."""

    rows: dict[str, dict[str, float]]
    by_class: dict[str, dict[int, dict[str, float]]]  # the metrics of each class that labels have, of every row
    samples: Tensor
    predicted: dict[str, Tensor]
    broken: list[str]


@torch.no_grad()
def measure(
    tokenizer: Tokenizer,
    stream: SampleStream,
    mesh: Mesh,
    *,
    constant: Tensor | None = None,
    draws: Mapping[str, Draw] | None = None,
    truth: Samples | Files | None = None,
    keep: Keep | None = None,
    measures: Any = None,
    advance: Advance | None = None,
) -> Measured:
    """Look at an evaluation stream twice: for the codes of all, then for what is made of them. Collective.

    `constant` is what `label_sums` says of a training set; `draws` become a row each, by their names; `truth` is what
    predictions are compared with, or the samples; `keep` is given all predictions, `measures` is as in Signal.sums.
    ValueError for a signal without a context, or a quantizer whose ids do not say its codes.
    """
    signal, truth = labelled(tokenizer), truth or Samples()
    with evaluating(tokenizer):
        ids, is_there = codes(tokenizer, stream, mesh, advance)
        ways = dict(_ways(tokenizer, ids, following(is_there), constant, draws or {}))
        sums, shown, firsts = {name: signal.sums(mesh, measures) for name in ways}, dict[str, Tensor](), list[Tensor]()

        def look(samples: Tensor, valid: Tensor, numbers: Tensor) -> None:
            first = not shown
            for name, way in ways.items():
                predicted = way(samples, numbers.clamp(min=0))
                truth.add(sums[name], samples[valid], predicted[valid], numbers[valid])
                if keep is not None:
                    keep(name, predicted[valid], numbers[valid])
                if first:
                    samples_shown, shown[name] = first_ones(samples, predicted, mesh)
                    firsts.append(samples_shown)

        seen = look_over(stream, mesh, look, advance)
    rows = {name: found.numbers() for name, found in sums.items()}
    by_class = {name: found.by_class() for name, found in sums.items()}
    return Measured(rows, by_class, firsts[0], shown, seen.told)


def labelled(tokenizer: Tokenizer) -> Labelled:
    """Its signal. ValueError for one without a context, or a quantizer whose ids do not say its codes."""
    signal = tokenizer.signal
    if not isinstance(signal, Labelled) or not tokenizer.quantizer.exact_decode:
        raise ValueError(
            f"the tokenizer has the signal {signal.config.name} and a quantizer that decodes its ids "
            f"{'exactly' if tokenizer.quantizer.exact_decode else 'nearly'}: guiding codes are measured of a signal "
            "with a context (depth, color, panoptic), by ids that say all; use `vqscale evaluate tokenizer`"
        )
    return signal


def following(is_there: Tensor) -> Tensor:
    """(N,): for each sample the next one that is there, after the last the first."""
    numbers = torch.arange(len(is_there), device=is_there.device)
    known = numbers[is_there]
    return known[torch.searchsorted(known, numbers, right=True) % len(known)]


def kept(numbers: Tensor, grid: tuple[int, ...], share: float) -> Tensor:
    """(B, *grid): a share of the places of each image, rounded; those of a smaller share are among a larger one's."""
    places = int(torch.Size(grid).numel())
    uniform = noise.uniform(noise.keys(derive(0, "kept codes"), numbers), 0, places)
    count = torch.full_like(numbers, round(share * places))
    return noise.lowest(uniform, count).unflatten(1, grid)


def label_sums(signal: Labelled, stream: SampleStream, mesh: Mesh, images: int) -> Tensor:
    """What `Labelled.constant` needs to know of a training set, of the first so many images of its evaluation stream.
    Collective."""
    found, seen = list[Tensor](), 0
    for batch in stream.batches():
        samples = batch.samples[batch.valid & (batch.numbers < images)].to(mesh.device)
        found.append(signal.label_sums(samples))
        seen += stream.batch
        if seen >= images:
            break
    return ops.sum_over(torch.stack(found).sum(0), mesh.world)


def _ways(
    tokenizer: Tokenizer, ids: Tensor, others: Tensor, constant: Tensor | None, draws: Mapping[str, Draw]
) -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    """(name, samples and their numbers -> what is predicted of them) of each row."""
    signal = labelled(tokenizer)
    sides = len(tokenizer.net.strides)

    def decoded(of: Callable[[Tensor, Tensor], Tensor], share: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
        def predict(samples: Tensor, numbers: Tensor) -> Tensor:
            context = signal.enter(samples)[1]
            drawn = of(context, numbers)
            mask = None if share == 1 else kept(numbers, drawn.shape[1 : 1 + sides], share)
            return signal.predict(tokenizer.decode(drawn, context, mask))

        return predict

    for name, share in KEPT.items():
        yield name, decoded(lambda _, numbers: ids[numbers], share)
    yield ANOTHER, decoded(lambda _, numbers: ids[others[numbers]])
    if constant is not None:
        yield CONSTANT, lambda samples, numbers: signal.constant(constant, samples)
    for name, draw in draws.items():
        yield name, decoded(draw)
