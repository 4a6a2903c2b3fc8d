"""What `vqscale evaluate tokenizer` says of how well a prior will do with the ids: --swaps, --training, --agreement."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vqscale.programs.commands.evaluate import asked

if TYPE_CHECKING:
    from vqscale.data.samples import SampleStream
    from vqscale.metrics.features import Measures
    from vqscale.nets.shapes_classifier import ShapesClassifier
    from vqscale.parallel.mesh import Mesh
    from vqscale.programs.generability import Features
    from vqscale.programs.score import Scored
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

    classifier: ShapesClassifier | None
    training: SampleStream | None
    about: dict[str, Any]


def prepare(args: argparse.Namespace) -> None:
    """Before processes meet: look for the images of --training."""
    if args.training:
        asked.images(_training(args))


def opened(args: argparse.Namespace, tokenizer: Tokenizer, stream: SampleStream, mesh: Mesh) -> Opened:
    """Collective. ValueError where it cannot be opened, or cannot be said of this tokenizer."""
    from vqscale.data.samples import SampleStream
    from vqscale.metrics.shapes_classifier import check_size
    from vqscale.programs import judge
    from vqscale.train import probe, shapes_classifier

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
    classifier, training, about = None, None, dict[str, Any]()
    if args.classifier:
        classifier, card = shapes_classifier.load(args.classifier, mesh)
        check_size((stream.config.sides[0], stream.config.sides[1]), classifier.config.image_size, "the images")
        about = judge.about(args.classifier, classifier, card, BESIDE)
    if args.training:
        probe.check(mesh)
        config = asked.images(_training(args), tokenizer.card)
        training = SampleStream(config, stream.batch, mesh.world.rank, mesh.world.size, train=False)
    return Opened(classifier, training, about)


def told(
    args: argparse.Namespace,
    tokenizer: Tokenizer,
    stream: SampleStream,
    given: Opened,
    features: list[Features],
    mesh: Mesh,
) -> tuple[dict[str, float], dict[str, Any]]:
    """(numbers, what the protocol says of them), of what is asked for; `features` are those that are known besides.
    Collective."""
    from vqscale.programs import generability

    numbers, protocol = dict[str, float](), dict(given.about)
    if given.classifier is not None:
        network = given.classifier
        shapes = generability.Features("shapes_distance", network.num_features, lambda images: network(images)[0])
        features = [*features, shapes]
    if args.swaps or given.classifier is not None:
        numbers |= generability.under_swaps(tokenizer, stream, mesh, args.swaps, args.neighbours, features)
    if args.swaps:
        near = f"one of the {args.neighbours} nearest (near) or any other code (any)"
        protocol["_near_, _any_"] = f"each id swapped with the probability in the name, for {near}"
    if args.agreement:
        numbers |= generability.moved(tokenizer, stream, mesh)
        protocol["moved"] = MOVED
    if given.training is not None:
        entropies, about = _entropies(args, tokenizer, stream, given.training, mesh)
        numbers, protocol = numbers | entropies, protocol | about
    return numbers, protocol


def known(found: Scored, measures: Measures) -> list[Features]:
    """Inception, where it is given, with the statistics that rFID compares with."""
    from vqscale.metrics.generation import named
    from vqscale.programs.generability import Features

    inception = measures.inception
    if inception is None:
        return []
    (name,) = named({"rfid": 0.0}, inception.facts)
    real = measures.reference.pool if measures.reference else found.statistics["originals"][0]
    return [Features(name, inception.dims[0], lambda images: inception(images)[0], real)]


def _training(args: argparse.Namespace) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), "shards": args.training})


def _entropies(
    args: argparse.Namespace, tokenizer: Tokenizer, stream: SampleStream, training: SampleStream, mesh: Mesh
) -> tuple[dict[str, float], dict[str, Any]]:
    from vqscale.programs import score
    from vqscale.train import probe

    seen, is_there = score.codes(tokenizer, training, mesh, most=args.training_images)
    held_out, is_held_out = score.codes(tokenizer, stream, mesh)
    ids, held_out = seen[is_there], held_out[is_held_out]
    progress = asked.progress(args.prior_steps * probe.BATCH, args, mesh)
    numbers = probe.entropies(tokenizer.quantizer, ids, held_out, args.prior_steps, mesh, advance=progress.advance)
    progress.close()
    about = (
        f"nats of an id of these images under a small prior ({probe.ABOUT}, {args.prior_steps} steps) that has seen "
        "the ids of the training images; unigram_nats: knowing how often each id occurs there; uniform_nats: log of "
        "the codes; _image: of all ids of an image"
    )
    data = {"shards": list(training.config.patterns), "images": len(ids), "fingerprint": training.fingerprint}
    return numbers, {"prior_nats": about, "prior_nats, training": data}
