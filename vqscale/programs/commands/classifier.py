"""Train the shapes classifier, a judge of samples of drawn pictures that needs no download; plain or by torchrun.

    vqscale classifier runs/shapes-classifier --image-size 32
    vqscale evaluate samples runs/quickstart-samples/samples.npz --classifier runs/shapes-classifier

About a minute on two cores; the pictures are drawn here. FOLDER gets model.safetensors and card.json, which has its own
accuracy on pictures that it was not trained on. A folder that has this classifier already stays as it is. Its numbers
are no FID, and compare only with numbers of the same classifier.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vqscale.nets.config.shapes import ShapesClassifierConfig
from vqscale.programs.commands import words
from vqscale.run import processes

USUAL = ShapesClassifierConfig()


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the classifier is there, 1 failed on the way, 2 the user's input."""
    return processes.status_of(lambda: _classifier(arguments(sys.argv[1:] if argv is None else argv)))


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The arguments; ValueError for a classifier that cannot be trained, with all that is wrong."""
    parser = words.parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the classifier goes")
    for name, what in (
        ("image_size", "pixels of a side of the pictures it is to judge"),
        ("width", "channels of its first layer"),
        ("steps", "optimiser steps"),
        ("batch", "pictures of a step, over all processes"),
        ("num_images", "pictures it is trained on"),
        ("num_held_out", "pictures its own accuracy is measured on"),
        ("seed", "which pictures, which first weights"),
    ):
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=getattr(USUAL, name), help=f"{what} (default: %(default)s)"
        )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(given)
    wrong = [message for _, message in _config(args).problems()]
    if wrong:
        raise ValueError("; ".join(wrong))
    return args


def _config(args: argparse.Namespace) -> ShapesClassifierConfig:
    known = vars(USUAL)
    return ShapesClassifierConfig(**{key: value for key, value in vars(args).items() if key in known})


def _classifier(args: argparse.Namespace) -> int:
    from vqscale.show.progress import Progress
    from vqscale.tokenizer import saved
    from vqscale.train import shapes_classifier

    config = _config(args)
    with processes.joined(args.device, processes.divide()) as mesh:
        if (args.folder / "card.json").is_file():
            there = saved.config_of(args.folder, shapes_classifier.KIND, ShapesClassifierConfig)
            if there != config:
                raise ValueError(
                    f"{args.folder} has a classifier with the settings {there}, and {config} are asked for: give "
                    "another folder, or remove this one"
                )
            _, card = shapes_classifier.load(args.folder, mesh)
        else:
            progress = Progress(config.steps, rank=mesh.world.rank, stream=sys.stderr)
            trained = shapes_classifier.train(config, mesh, progress.advance)
            progress.close()
            card = shapes_classifier.save(args.folder, trained, mesh, _facts())
    if not mesh.world.rank:
        known = card["metrics"]
        print(
            f"{args.folder}: a shapes classifier that has {known['accuracy']:.1%} of {known['images']} pictures right"
        )
    return 0


def _facts() -> dict[str, Any]:
    from vqscale.run import folder

    return {"commit": folder.commit()}
