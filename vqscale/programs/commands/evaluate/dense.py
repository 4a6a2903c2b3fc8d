"""`vqscale evaluate dense`: one table of what guiding codes tell a decoder that sees the image too, and a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqscale import config as configuration
from vqscale.data.config_dense import PanopticConfig
from vqscale.programs.commands import words
from vqscale.programs.commands.evaluate import networks
from vqscale.run import processes

if TYPE_CHECKING:
    from vqscale.data.config import MediumConfig
    from vqscale.metrics.features import Measures
    from vqscale.train.config.tokenizer import TokenizerRun

Rows = Mapping[str, Mapping[str, float]]


def told(args: argparse.Namespace) -> str:
    """The lines for a terminal, on rank 0 alone; writes the folder of --out. Collective."""
    run = _run(args)
    held_out = _held_out(args, run)
    from vqscale.data import samples
    from vqscale.data.samples import SampleStream
    from vqscale.data.shards import chosen
    from vqscale.priors.base import Prior
    from vqscale.programs import dense, predict
    from vqscale.programs.dense_truth import Files
    from vqscale.programs.dense_written import Maps
    from vqscale.show import dense_page
    from vqscale.show.progress import Progress
    from vqscale.tokenizer.model import Tokenizer

    samples.prepare(held_out)
    keys = chosen.read_keys(args.keys) if args.keys else None
    if args.training_images:
        samples.prepare(run.data.train)
    with processes.joined(args.device, processes.divide(args.codes), agreed=()) as mesh:
        tokenizer = Tokenizer.load(args.path, mesh=mesh, weights=args.weights)
        signal, world, constant = dense.labelled(tokenizer), mesh.world, None

        def stream(medium: MediumConfig, keys: Sequence[str] | None = None) -> SampleStream:
            return SampleStream(medium, args.batch * world.size, world.rank, world.size, train=False, keys=keys)

        if args.training_images:
            constant = dense.label_sums(signal, stream(run.data.train), mesh, args.training_images)
        fingerprint, draws = tokenizer.fingerprint, dict[str, dense.Draw]()  # collective
        if args.prior:
            prior = Prior.load(args.prior, mesh=mesh, weights=args.weights)
            draws = predict.draws(prior, tokenizer, more=None if args.guidance is None else {"guidance": args.guidance})
        seen = stream(held_out, keys)
        truth = Files(held_out, seen.index) if args.own_size else None
        maps, written = None, list[Path]()
        if truth is not None and isinstance(held_out, PanopticConfig) and args.predictions:
            maps = Maps(Path(args.predictions), held_out, truth, (dense.CEILING, *draws, dense.NO_CODE))
        measures = networks.against(args, mesh)
        progress = Progress(-(-2 * seen.num_samples // seen.batch), rank=world.rank, stream=sys.stderr)
        options: Any = {"constant": constant, "draws": draws, "truth": truth, "advance": progress.advance}
        options |= {"measures": measures, "keep": maps.keep if maps else None}
        found = dense.measure(tokenizer, seen, mesh, **options)
        if maps:
            written = maps.finish(mesh)
        progress.close()
    if world.rank:
        return ""
    result = {
        "rows": found.rows,
        "classes": _classes(held_out, found.by_class),
        "predictions": [str(path) for path in written],
        "tokenizer": {"path": args.path, "weights": args.weights, "sha256": fingerprint, "card": tokenizer.card},
        "prior": args.prior,
        "data": {"shards": list(held_out.patterns), "fingerprint": seen.fingerprint, **held_out.card},
        "protocol": {
            "samples": f"the {seen.num_samples} of --keys {args.keys}" if keys else f"all {seen.num_samples}",
            "size": "of the files, predictions from the nearest pixel" if truth else "of the samples, as they entered",
            "codes of another image": "those of the next image of the set",
            "a part of the codes": "at places drawn anew for each image, a smaller part among those of a larger",
            "constant": f"from the first {args.training_images} images of {', '.join(run.data.train.patterns)}",
            **({"guidance of what is drawn": args.guidance} if args.guidance is not None else {}),
            **(_about_fid(args, measures) if args.inception else {}),
        },
        "notes": [f"{len(found.broken)} images or more could not be read: {found.broken[0]}"] if found.broken else [],
        **words.made_by("evaluate"),
        "processes": world.size,
    }
    return dense_page.tell(result, args.out, args.json, f"Guiding codes of {args.path}", _picture(signal, found))


def _classes(
    medium: MediumConfig, by_class: Mapping[str, Mapping[int, Mapping[str, float]]]
) -> dict[str, dict[str, Mapping[str, float]]]:
    """{class: {row of the table: its metrics}}, classes by their names; nothing where labels have no classes."""
    if not isinstance(medium, PanopticConfig):
        return {}
    names = [category.name for category in medium.classes()]
    return {name: {way: of[number] for way, of in by_class.items()} for number, name in enumerate(names, 1)}


def _about_fid(args: argparse.Namespace, measures: Measures) -> dict[str, Any]:
    """How the distance of colored images was taken, and in what that is not FID-5k's protocol."""
    from vqscale.nets.inception import PREPROCESSING
    from vqscale.show import report

    return {
        "fid": "of pooled features; predictions of more than 256 pixels brought there by area, values round((x + 1) "
        "128); images are read as in training, where FID-5k brings their centre to its size by area and divides by 128",
        "reference": report.file(args.reference),
        **report.about_inception(measures.inception, PREPROCESSING),
    }


def _picture(signal: Any, found: Any) -> Any:
    """Image, truth, and what was predicted with all codes, with those of each prior, and with none."""
    from vqscale.programs.dense import ANOTHER, CEILING, CONSTANT, KEPT, NO_CODE

    drawn = [name for name in found.predicted if name not in {*KEPT, ANOTHER, CONSTANT}]
    names = [CEILING, *drawn, NO_CODE]
    few = 8
    picture = signal.beside(found.samples[:few], *(found.predicted[name][:few] for name in names))
    return ", ".join(["the image", "the truth", *names]), picture


def _run(args: argparse.Namespace) -> TokenizerRun:
    from vqscale.tokenizer import saved
    from vqscale.train.config import Run
    from vqscale.train.config.tokenizer import TokenizerRun

    file = args.config or saved.run_file(args.path)
    if file is None:
        raise ValueError(
            f"{args.path} has no run.yaml that says on which samples it is measured: give --config, a YAML with "
            "data.val, such as the one that it was trained with"
        )
    run: Any = configuration.load(Run, file)
    if not isinstance(run, TokenizerRun):
        raise ValueError(f"{file} is of a {run.task}: give the run of a tokenizer")
    return run


def _held_out(args: argparse.Namespace, run: TokenizerRun) -> MediumConfig:
    if args.shards:
        given: Any = {"shards": args.shards, "make": None}  # every medium of a context has both
        found: MediumConfig = replace(run.data.val or run.data.train, **given)
    elif run.data.val is None:
        raise ValueError(f"the config of {args.path} has data.val: null, so nothing is held out: give --shards")
    else:
        found = run.data.val
    if args.predictions and not isinstance(found, PanopticConfig):
        raise ValueError(
            f"the held-out shards of {args.path} are of {found.kind}, and --predictions writes segments: leave it out"
        )
    if args.inception and run.tokenizer.signal.name != "color":
        raise ValueError(
            f"{args.path} is of {run.tokenizer.signal.name}, and Inception looks at colors: leave out --inception and "
            "--reference"
        )
    return found
