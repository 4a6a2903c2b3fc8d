"""Measure a tokenizer or a prior on held-out images, or generated images against a reference; plain or by torchrun.

    torchrun --nproc_per_node=8 -m vqscale evaluate tokenizer RUN --shards 'val-{00..49}.tar' --inception FILE.pth
    vqscale evaluate statistics OUT.npz --shards 'train-{000..999}.tar' --inception FILE.pth
    vqscale evaluate samples SAMPLES.npz --reference VIRTUAL_imagenet256_labeled.npz --inception FILE.pth
    torchrun --nproc_per_node=8 -m vqscale evaluate prior PRIOR --cache caches/imagenet-val
    vqscale evaluate dense RUN --out runs/depth-measured
    torchrun --nproc_per_node=8 -m vqscale evaluate sounds RUN --shards 'test-{00..03}.tar' --out results/speech

tokenizer    PSNR, SSIM, usage, perplexity; rFID with --inception, LPIPS with --vgg and --heads
statistics   mean and covariance of Inception's features, and the features of some images: a --reference
samples      FID, sFID, Inception score, precision and recall of an npz with uint8 images (ADM's layout); of drawn
             shapes, with --classifier, how many are recognised as their class, which needs no download
prior        nats, perplexity and accuracy of held-out ids, the first view of every image of a token cache
dense        depth, color, panoptic: metrics with all codes, a part, none, another image's, and of a constant
sounds       whole recordings: distances of spectra, SI-SDR, measures of speech, bits per second, a page to listen to

Nothing is downloaded: --inception takes pt_inception-2015-12-05-6726825d.pth. Numbers by other weights get other names.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from vqscale.data.config import ImagesConfig, TokensConfig, as_trained
from vqscale.programs.commands import evaluate_dense, evaluate_networks, evaluate_options, evaluate_sounds, words
from vqscale.run import processes

if TYPE_CHECKING:
    from vqscale.data.samples import SampleStream
    from vqscale.metrics.sample_file import SampleFile
    from vqscale.nets.inception import Inception
    from vqscale.parallel.mesh import Mesh
    from vqscale.show.progress import Progress
    from vqscale.tokenizer.model import Tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the numbers are there, 1 failed on the way, 2 the user's input."""
    return processes.status_of(lambda: _evaluate(arguments(sys.argv[1:] if argv is None else argv)))


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked as far as no file is needed; ValueError for options that do not go together."""
    args = evaluate_options.parser(__doc__).parse_args(given)
    evaluate_options.check(args)
    return args


def _evaluate(args: argparse.Namespace) -> int:
    commands = {"tokenizer": _tokenizer, "statistics": _statistics, "samples": _samples, "prior": _prior}
    more = {"dense": evaluate_dense.told, "sounds": evaluate_sounds.told}
    told = (commands | more)[args.command](args)
    if told:
        print(told)
    return 0


def _joined(args: argparse.Namespace) -> AbstractContextManager[Mesh]:
    # Weights and images are files, which may be wrong on one rank only: no error is one that all have agreed on.
    return processes.joined(args.device, processes.divide(getattr(args, "codes", 1)), agreed=())


def _images(args: argparse.Namespace, card: Mapping[str, Any] | None = None) -> ImagesConfig:
    """The shards as asked for, where nothing is asked for as in a tokenizer's card; without one they are looked for."""
    from vqscale.data import samples

    known = as_trained(card or {}, args.image_size, None, args.interpolation)
    config = ImagesConfig(args.shards, num_workers=args.workers, **known)
    problems = [message for _, message in config.problems()]
    if problems:
        raise ValueError("; ".join(problems))
    if card is None:
        samples.prepare(config)
    return config


def _progress(images: int, args: argparse.Namespace, mesh: Mesh) -> Progress:
    from vqscale.show.progress import Progress

    return Progress(-(-images // (args.batch * mesh.world.size)), rank=mesh.world.rank, stream=sys.stderr)


def _tokenizer(args: argparse.Namespace) -> str:
    _images(args)
    import torch

    from vqscale.data.samples import SampleStream
    from vqscale.metrics import fid
    from vqscale.nets.inception import PREPROCESSING
    from vqscale.programs import score
    from vqscale.show import pictures, report
    from vqscale.tokenizer.model import Tokenizer

    with _joined(args) as mesh:
        measures = evaluate_networks.measures(args, mesh)
        tokenizer = Tokenizer.load(args.path, mesh=mesh, weights=args.weights)
        if args.swaps:
            _check_swaps(tokenizer)
        config = _images(args, tokenizer.card)
        stream = SampleStream(config, args.batch * mesh.world.size, mesh.world.rank, mesh.world.size, train=False)
        tokenizer.grid(torch.empty(1, 3, config.image_size, config.image_size, device="meta"))  # refuses sides
        progress = _progress(stream.num_samples, args, mesh)
        found = score.score(tokenizer, stream, mesh, measures, progress.advance)
        progress.close()
        if args.swaps:
            found.numbers.update(score.under_swaps(tokenizer, stream, mesh, args.swaps, args.neighbours))
        fingerprint = tokenizer.fingerprint  # collective
    if mesh.world.rank:
        return ""
    of = {"path": args.path, "weights": args.weights, "sha256": fingerprint, "card": tokenizer.card}
    swaps = f"each id swapped with the probability in the name, for one of the {args.neighbours} nearest or any other"
    protocol = {
        **({"psnr_near, psnr_any": swaps} if args.swaps else {}),
        "reconstructions": "from ids"
        if tokenizer.quantizer.exact_decode
        else "through the quantizer: no id says its z",
        "psnr, ssim": "means over images, of 8-bit values; SSIM with a Gaussian window of 11 x 11, sigma 1.5",
        "usage": f"share of the {found.num_codes} codes that these images hit at least once",
        "ceiling": "usage of as many tokens if every code were as likely, 1 - exp(-tokens / codes)",
        "id_bits": "entropy of the ids of a token in bits, each id for itself",
        "lpips": {"values": "clamped, not rounded", "vgg": report.file(args.vgg), "heads": report.file(args.heads)}
        if args.vgg
        else None,
        **report.about_inception(measures.inception, PREPROCESSING),
        "reference": report.file(args.reference) if args.reference else "the originals",
    }
    result = _result(found.numbers, mesh, protocol, tokenizer=of, data=_data(config, stream))
    result["notes"] = report.notes(found.numbers, measures.inception, found.broken)
    statistics = found.statistics.get("originals")
    if statistics is not None and args.save_stats:
        fid.save(
            args.save_stats,
            statistics[0],
            statistics[1],
            {**report.about_inception(measures.inception, PREPROCESSING)["inception"], **result["data"]},
        )
    shown = {
        "reconstructions below their originals": tokenizer.signal.picture(found.originals, found.predicted),
        "usage of codes": pictures.usage(found.per_code, num_codes=found.num_codes),
    }
    return report.tell(result, args.out, f"Tokenizer {args.path}", shown)


def _check_swaps(tokenizer: Tokenizer) -> None:
    if tokenizer.quantizer.num_ids > 1:
        raise ValueError(
            f"--swaps takes the neighbours of a code, and a token of this tokenizer has {tokenizer.quantizer.num_ids} "
            "ids: leave it out"
        )


def _statistics(args: argparse.Namespace) -> str:
    config = _images(args)
    from vqscale.data.samples import SampleStream
    from vqscale.data.shards import chosen
    from vqscale.metrics import fid
    from vqscale.nets.inception import PREPROCESSING
    from vqscale.programs import score
    from vqscale.show import report

    with _joined(args) as mesh:
        inception = evaluate_networks.inception(args, mesh)
        keys = chosen.read_keys(args.keys) if args.keys else None
        place = (args.batch * mesh.world.size, mesh.world.rank, mesh.world.size)
        stream = SampleStream(config, *place, train=False, keys=keys)
        progress = _progress(stream.num_samples, args, mesh)
        found, seen = score.statistics(stream, inception, mesh, progress.advance, points=args.images)
        progress.close()
    if mesh.world.rank:
        return ""
    points = 0 if found.points_ND is None else len(found.points_ND)
    numbers = {"images": seen.images, "broken": seen.broken, "enlarged": seen.enlarged, "points": points}
    facts = {
        **inception.facts,
        **_result(numbers, mesh, report.about_inception(inception, PREPROCESSING), data=_data(config, stream)),
    }
    fid.save(args.out, found.pool, found.spatial, facts, found.points_ND)
    return f"{args.out}: statistics of {seen.images} images, features of {points}" + "".join(
        f"\nnote: {note}" for note in report.notes(numbers, inception, seen.told)
    )


def _samples(args: argparse.Namespace) -> str:
    from vqscale.metrics.sample_file import SampleFile
    from vqscale.programs import judge
    from vqscale.show import pictures, report

    images, inception = SampleFile(args.path), None
    numbers, protocol = dict[str, float](), dict[str, Any]()
    with _joined(args) as mesh:
        if args.inception:
            inception = evaluate_networks.inception(args, mesh)
            numbers, protocol = _against_reference(images, inception, args, mesh)
        if args.classifier:
            progress = _progress(len(images), args, mesh)
            judged, about = judge.judge(images, args.classifier, mesh, progress.advance)
            progress.close()
            numbers, protocol = numbers | judged, protocol | about
    if mesh.world.rank:
        return ""
    numbers["images"] = len(images)
    result = _result(numbers, mesh, protocol, samples=report.file(args.path))
    result["notes"] = report.notes(numbers, inception, [])
    _, some = next(images.batches(16))
    picture = pictures.tiles(some, scale=pictures.scale(*some.shape[2:]))
    return report.tell(result, args.out, f"Samples {args.path}", {"samples, the first": picture})


def _against_reference(
    images: SampleFile, inception: Inception, args: argparse.Namespace, mesh: Mesh
) -> tuple[dict[str, float], dict[str, Any]]:
    """(FID and its kin, how they were measured)."""
    from vqscale.metrics import generation
    from vqscale.nets.inception import PREPROCESSING
    from vqscale.show import report

    progress = _progress(len(images), args, mesh)
    reference = generation.read_reference(args.reference, inception, mesh, batch=args.batch)
    samples = generation.describe(images, inception, mesh, batch=args.batch, advance=progress.advance)
    progress.close()
    return generation.compare(samples, reference), {
        "definitions": "guided-diffusion's evaluator; Inception score of parts of 5000; distances in float64",
        **report.about_inception(inception, PREPROCESSING),
        "reference": report.file(args.reference),
        "reference images": 0 if reference.points_ND is None else len(reference.points_ND),
    }


def _prior(args: argparse.Namespace) -> str:
    from vqscale.data.tokens.stream import TokenStream
    from vqscale.metrics import unigram
    from vqscale.priors.base import Prior
    from vqscale.show import report
    from vqscale.train import prior, prior_data

    TokenStream(TokensConfig(args.cache), args.batch, train=False)  # refused before processes meet
    with _joined(args) as mesh:
        model, notes = Prior.load(args.path, mesh=mesh, weights=args.weights), list[str]()

        def stream(path: str, train: bool) -> TokenStream:
            world = mesh.world
            found = TokenStream(TokensConfig(path), args.batch * world.size, world.rank, world.size, train=train)
            prior_data.expect(found.cache, model.card.get("tokenizer"), model.config)
            notes.extend(prior_data.check_labels(found, model.config))
            return found

        held_out = stream(args.cache, train=False)
        seen_Ik = unigram.count(stream(args.training, train=True), mesh) if args.training else None
        progress = _progress(min(args.images or held_out.num_samples, held_out.num_samples), args, mesh)
        numbers = prior.evaluate(model, model, held_out, mesh, args.images, seen_Ik, seed=0, progress=progress)
        progress.close()
        fingerprint = model.fingerprint  # collective
    if mesh.world.rank:
        return ""
    if numbers["images"] < held_out.num_samples:
        notes.append(f"the first {numbers['images']:.0f} of {held_out.num_samples} images alone were looked at")
    if model.config.bound:
        notes.append(f"loss and perplexity are upper bounds: {model.config.bound}")
    of = {"path": args.path, "weights": args.weights, "sha256": fingerprint, "card": model.card}
    data = {"cache": args.cache, "fingerprint": held_out.fingerprint, "tokenizer": held_out.tokenizer_fingerprint}
    protocol = {
        "loss": "mean cross entropy of the ids of the first view, given the class, in nats; nothing is dropped",
        "accuracy": "share of ids that are the most probable, the lowest id among equals",
        "unigram": "with add-one frequencies of storage shards spread over the cache of --training",
    }
    said = {"bound": bool(model.config.bound), "notes": notes}
    result = {**_result(numbers, mesh, protocol, prior=of, data=data), **said}
    return report.tell(result, args.out, f"Prior {args.path}", {})


def _data(config: ImagesConfig, stream: SampleStream) -> dict[str, Any]:
    how = "without" if config.interpolation == "sampled" else "with"
    crop = f"short side to {config.short_side}, {config.interpolation} {how} antialiasing, centre crop"
    data = {"shards": list(config.patterns), "image_size": config.image_size}
    return {**data, "crop": crop, "fingerprint": stream.fingerprint}


def _result(numbers: Mapping[str, float], mesh: Mesh, protocol: dict[str, Any], **what: Any) -> dict[str, Any]:
    """What is written: numbers, what they are of, how they were measured, by which code, on how many processes."""
    code = words.made_by("evaluate")
    return {"numbers": numbers, **what, "protocol": protocol, **code, "processes": mesh.world.size}
