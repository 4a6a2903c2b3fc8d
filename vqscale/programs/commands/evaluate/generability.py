"""What `vqscale evaluate tokenizer` says of how well a prior will do with the ids: --swaps, --training, --agreement;
and which codes a gradient reaches: --reach."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vqscale.programs.commands.evaluate import asked

if TYPE_CHECKING:
    from vqscale.data.samples import SampleStream
    from vqscale.metrics.features import Measures
    from vqscale.metrics.fid import Statistics
    from vqscale.parallel.mesh import Mesh
    from vqscale.programs.generability import Features, Moved, UnderSwaps
    from vqscale.programs.score import Codes, Looked, Scored
    from vqscale.tokenizer.model import Tokenizer

BESIDE = "the Fréchet distance of its features of reconstructions, of swapped ids too, from those of these images"
MOVED = (
    "share of the ids that are others where the encoder computes in bfloat16, and where the image stands a pixel, or a "
    "token, further right and down (moved_token compares each token with where it has gone; both without the first row "
    "and column)"
)


@dataclass(frozen=True)
class Opened:
    """What is asked for, opened: all that can be wrong with it is known before the first image is looked at."""

    training: SampleStream | None
    about: dict[str, Any]
    swaps: UnderSwaps | None
    moved: Moved | None
    codes: Codes | None
    reach: SampleStream | None

    @property
    def beside(self) -> list[Callable[[Looked], None]]:
        """Those that look at the images with `score`."""
        return [look for look in (self.swaps, self.moved, self.codes) if look is not None]


def prepare(args: argparse.Namespace) -> None:
    """Before processes meet: look for the images of --training."""
    if args.training:
        asked.images(_training(args))


def opened(
    args: argparse.Namespace, tokenizer: Tokenizer, stream: SampleStream, measures: Measures, mesh: Mesh
) -> Opened:
    """Collective. ValueError where it cannot be opened, or cannot be said of this tokenizer."""
    from vqscale.data.samples import SampleStream
    from vqscale.metrics.shapes_classifier import check_size
    from vqscale.programs import generability, judge, reach, score
    from vqscale.train import probe
    from vqscale.train.classifiers import SHAPES

    count = tokenizer.quantizer.num_ids
    if count > 1 and (args.swaps or args.training):
        raise ValueError(
            f"--swaps takes the neighbours of a code, and --training a prior with one id per token, and a token of "
            f"this tokenizer has {count} ids: leave them out"
        )
    if len(stream.config.shapes) > 1 and (args.classifier or args.training):
        raise ValueError(
            "--classifier knows squares of one size, and --training one grid of ids, and the images have "
            f"{len(stream.config.shapes)} shapes (--buckets, or the tokenizer's card): give --image-size, or leave "
            "them out"
        )
    if args.reach:
        reach.check(tokenizer, stream)
    training, about, features = None, dict[str, Any](), _known(measures) if args.swaps else []
    if args.classifier:
        classifier, card = SHAPES.load(args.classifier, mesh)
        check_size((stream.config.sides[0], stream.config.sides[1]), classifier.config.image_size, "the images")
        about = judge.about(args.classifier, classifier, card, BESIDE)
        features.append(
            generability.Features("shapes_distance", classifier.num_features, lambda images: classifier(images)[0])
        )
    if args.training:
        probe.check(mesh)
        config = asked.images(_training(args), tokenizer.card)
        training = SampleStream(config, stream.batch, mesh.world.rank, mesh.world.size, train=False)
    swaps = None
    if args.swaps or args.classifier:
        swaps = generability.UnderSwaps(tokenizer, mesh, args.swaps, args.neighbours, features)
    moved = generability.Moved(tokenizer, mesh) if args.agreement else None
    codes = None if training is None else score.Codes(stream.num_samples, mesh)
    return Opened(training, about, swaps, moved, codes, stream if args.reach else None)


def told(
    args: argparse.Namespace, tokenizer: Tokenizer, given: Opened, found: Scored, measures: Measures, mesh: Mesh
) -> tuple[dict[str, float], dict[str, Any]]:
    """(numbers, what the protocol says of them), of what is asked for, after `score`. Collective."""
    from vqscale.programs import reach

    numbers, protocol = dict[str, float](), dict(given.about)
    if given.swaps is not None:
        numbers |= given.swaps.numbers({each.name: _real(found, measures) for each in _known(measures)})
    if args.swaps:
        near = f"one of the {args.neighbours} nearest (near) or any other code (any)"
        protocol["_near_, _any_"] = f"each id swapped with the probability in the name, for {near}"
    if given.moved is not None:
        numbers |= given.moved.numbers()
        protocol["moved"] = MOVED
    if given.reach is not None:
        numbers |= reach.reached(tokenizer, given.reach, mesh)
        protocol["reached, reached_evenly"] = reach.ABOUT
    if given.training is not None and given.codes is not None:
        entropies, about = _entropies(args, tokenizer, given.codes, given.training, mesh)
        numbers, protocol = numbers | entropies, protocol | about
    return numbers, protocol


def _known(measures: Measures) -> list[Features]:
    """Inception, where it is given."""
    from vqscale.metrics.generation import named
    from vqscale.programs.generability import Features

    inception = measures.inception
    if inception is None:
        return []
    (name,) = named({"rfid": 0.0}, inception.facts)
    return [Features(name, inception.dims[0], lambda images: inception(images)[0], known=True)]


def _real(found: Scored, measures: Measures) -> Statistics:
    """What rFID compares with."""
    real = measures.reference.pool if measures.reference else found.statistics["originals"][0]
    assert real is not None, "rFID is asked for"
    return real


def _training(args: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), "shards": args.training})


def _entropies(
    args: argparse.Namespace, tokenizer: Tokenizer, held_out: Codes, training: SampleStream, mesh: Mesh
) -> tuple[dict[str, float], dict[str, Any]]:
    from vqscale.programs import score
    from vqscale.train import probe

    seen, is_there = score.codes(tokenizer, training, mesh, most=args.training_images)
    held_out_ids, is_held_out = held_out.all()
    ids, others = seen[is_there], held_out_ids[is_held_out]
    progress = asked.progress(args.prior_steps * probe.BATCH, args, mesh)
    numbers = probe.entropies(tokenizer.quantizer, ids, others, args.prior_steps, mesh, advance=progress.advance)
    progress.close()
    about = (
        f"nats of an id of these images under a small prior ({probe.ABOUT}, {args.prior_steps} steps) that has seen "
        "the ids of the training images; unigram_nats: knowing how often each id occurs there; uniform_nats: log of "
        "the codes; _image: of all ids of an image"
    )
    data = {"shards": list(training.config.patterns), "images": len(ids), "fingerprint": training.fingerprint}
    return numbers, {"prior_nats": about, "prior_nats, training": data}
