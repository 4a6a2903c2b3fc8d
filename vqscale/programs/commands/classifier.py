"""Train a classifier of what is drawn here, a judge of samples that needs no download; plain or by torchrun.

    vqscale classifier runs/shapes-classifier --image-size 32
    vqscale evaluate samples runs/quickstart-samples/samples.npz --classifier runs/shapes-classifier
    vqscale classifier runs/sounds-classifier --medium sounds --sample-rate 16000
    vqscale evaluate sounds runs/sound --shards 'runs/shards/sounds16k-val-*.tar' --classifier runs/sounds-classifier

About a minute on two cores; what it learns from is drawn here. FOLDER gets model.safetensors and card.json, which has
its own accuracy on samples that it was not trained on. A folder that has this classifier already stays as it is. Its
numbers are no FID, and compare only with numbers of the same classifier.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vqscale.nets.config.classifiers import ShapesClassifierConfig, SoundsClassifierConfig
from vqscale.programs.commands import words
from vqscale.run import processes

USUAL = {"images": ShapesClassifierConfig(), "sounds": SoundsClassifierConfig()}


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the classifier is there, 1 failed on the way, 2 the user's input."""
    return processes.status_of(lambda: _classifier(arguments(sys.argv[1:] if argv is None else argv)))


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The arguments; ValueError for a classifier that cannot be trained, with all that is wrong."""
    parser = words.parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the classifier goes")
    parser.add_argument("--medium", choices=tuple(USUAL), default="images", help="what it judges (default: images)")
    for name, what in (
        ("image_size", "pixels of a side of the pictures it is to judge"),
        ("sample_rate", "samples per second of the sounds it is to judge"),
        ("width", "channels of its first layer"),
        ("steps", "optimiser steps"),
        ("batch", "samples of a step, over all processes"),
        ("num_images", "pictures or sounds it is trained on"),
        ("num_held_out", "pictures or sounds its own accuracy is measured on"),
        ("seed", "which samples, which first weights"),
    ):
        defaults = ", ".join(f"{of} {getattr(config, name)}" for of, config in USUAL.items() if hasattr(config, name))
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{what} (default: {defaults})")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(given)
    usual, asked = USUAL[args.medium], {key: value for key, value in vars(args).items() if value is not None}
    for of, config in USUAL.items():
        for key in asked.keys() & vars(config).keys() - vars(usual).keys():
            raise ValueError(
                f"--{key.replace('_', '-')} is of classifiers of {of}, and this one is of {args.medium}: leave it "
                f"out, or give --medium {of}"
            )
    args.config = replace(usual, **{key: value for key, value in asked.items() if key in vars(usual)})
    wrong = [message for _, message in args.config.problems()]
    if wrong:
        raise ValueError("; ".join(wrong))
    return args


def _classifier(args: argparse.Namespace) -> int:
    from vqscale.show.progress import Progress
    from vqscale.tokenizer import saved
    from vqscale.train.classifiers import MEDIA

    config, family = args.config, MEDIA[args.medium]
    with processes.joined(args.device, processes.divide()) as mesh:
        if (args.folder / "card.json").is_file():
            there = saved.config_of(args.folder, family.kind, family.schema)
            if there != config:
                raise ValueError(
                    f"{args.folder} has a classifier with the settings {there}, and {config} are asked for: give "
                    "another folder, or remove this one"
                )
            _, card = family.load(args.folder, mesh)
        else:
            progress = Progress(config.steps, rank=mesh.world.rank, stream=sys.stderr)
            trained = family.train(config, mesh, progress.advance)
            progress.close()
            card = family.save(args.folder, trained, mesh, _facts())
    if not mesh.world.rank:
        accuracy, count = card["metrics"]["accuracy"], card["metrics"]["images"]
        print(f"{args.folder}: a {family.kind} that has {accuracy:.1%} of {count} {family.things} right")
    return 0


def _facts() -> dict[str, Any]:
    from vqscale.run import folder

    return {"commit": folder.commit()}
