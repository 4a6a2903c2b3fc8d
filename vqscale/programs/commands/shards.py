"""Make WebDataset shards: of drawn shapes, of images or recordings as they are, or of squares of photographs.

    vqscale shards --source shapes --num 4096 --size 64 --out data/shapes
    vqscale shards --source /data/ImageNet/train --out data/imagenet --name train
    vqscale shards --source /data/LibriTTS/train-clean-100 --out data/speech
    vqscale shards --source cifar-10-python.tar.gz --out data/cifar10
    vqscale shards --source GTSRB_Final_Training_Images.zip --out data/gtsrb
    vqscale shards --source /data/photographs --crops 16 --size 64 --scales 64,256 --held-out 0.1 --out data/squares

Of CIFAR-10 (python or binary) the test pictures are in the shards val-0000.tar and on, of GTSRB a zip of pictures gives
those that it has; both become PNG, with their classes. Nothing of a pickle is run.

Folders directly below --source are classes; the label is their place in the order of names. Without --crops files go
into the shards unchanged: images, or where there are none recordings (wav, flac, mp3, ogg, opus); --medium sounds
takes recordings of a folder that has both. With it each photograph, of any format that Pillow reads, gives that many
squares as PNG, and all squares of a photograph that is held out are in the shards val-0000.tar and on; files without a
whole picture are left out and named. An interrupted making goes on where it stopped when the same command is given
again.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vqscale.data.config import ShapesConfig
from vqscale.data.made.squares import CropsConfig
from vqscale.programs.commands import words
from vqscale.run import processes

if TYPE_CHECKING:
    from vqscale.data.made.make import Plan
    from vqscale.data.made.photographs import Found

logger = logging.getLogger(__name__)
OF_CROPS = ("scales", "held_out", "max_broken")  # options that mean nothing without --crops
HELD_OUT = "val"  # what the names of its shards begin with


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the shards are there, 1 failed on the way, 2 the user's input."""
    return processes.status_of(lambda: _make(arguments(sys.argv[1:] if argv is None else argv)))


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked as far as no file is needed; ValueError for what cannot be made."""
    args = _parser().parse_args(given)
    settings = _settings(args)
    problems = [message for _, message in settings.problems()] if settings else []
    unused = [f"--{key.replace('_', '-')}" for key in OF_CROPS if getattr(args, key) is not None]
    if unused and (args.crops is None or args.source == "shapes"):
        problems.append(f"{', '.join(unused)} is about squares of photographs: give a folder as --source, and --crops")
    if args.held_out and args.name == HELD_OUT:
        problems.append(f"--name is {HELD_OUT}, as the shards of what is held out begin: choose another")
    if Path(args.name).name != args.name:
        problems.append(f"--name {args.name!r} is what the names of files begin with, without a folder: change --out")
    if problems:
        raise ValueError("; ".join(problems))
    return args


def _make(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from vqscale.data.made import make  # after the arguments: it brings the webdataset library, and that brings torch

    plans = _plans(args)
    for (_, plan), pattern in zip(plans, make.write_all(plans, args.out, args.shard_size), strict=True):
        print(f"{plan.num_samples} samples; in a config:\nshards: {pattern}")
    return 0


def _plans(args: argparse.Namespace) -> list[tuple[str, Plan]]:
    """(name, what to make) of each set of shards."""
    from vqscale.data.made import archives, make, photographs

    settings, root = _settings(args), Path(args.source).expanduser()
    if args.medium and (settings is not None or root.is_file()):
        raise ValueError(
            f"--medium {args.medium} is about the files of a folder as they are, and --source is {args.source}"
            f"{'' if args.crops is None else f', of which --crops {args.crops} cuts squares'}: leave it out"
        )
    if isinstance(settings, ShapesConfig):
        return [(args.name, make.shapes(settings))]
    if settings is None and root.is_file():
        return archives.plans(root, args.name, HELD_OUT, args.seed)
    if settings is None:
        return [(args.name, make.folder(root, args.seed, args.medium))]
    found = photographs.find(root, settings)
    _tell(found)
    train, held_out = photographs.plans(root, found, settings)
    return [(args.name, train)] + ([(HELD_OUT, held_out)] if held_out else [])


def _tell(found: Found) -> None:
    logger.info("%d photographs, %d copies of these", len(found.photographs), found.copies)
    if found.left_out:
        logger.info("%d files are left out:%s", len(found.left_out), "".join(f"\n  {line}" for line in found.left_out))
    if found.others:
        told = ", ".join(f"{count} of {suffix}" for suffix, count in found.others.most_common())
        logger.info("not opened, as they are no pictures by their names: %s", told)


def _settings(args: argparse.Namespace) -> ShapesConfig | CropsConfig | None:
    """What is to be drawn or cut; None for files as they are."""
    if args.source == "shapes":
        return ShapesConfig(args.num, args.size, args.first, args.seed)
    if args.crops is None:
        return None
    broken = 100 if args.max_broken is None else args.max_broken
    return CropsConfig(args.crops, args.size, args.scales, args.held_out or 0.0, args.seed, broken)


def _sides(text: str) -> tuple[int, int]:
    shortest, _, longest = text.partition(",")
    return int(shortest), int(longest or shortest)


def _parser() -> argparse.ArgumentParser:
    parser = words.parser(__doc__)
    parser.add_argument(
        "--source",
        required=True,
        help="`shapes`, a folder of images or recordings, one for each class, or an archive of CIFAR-10 or GTSRB",
    )
    parser.add_argument(
        "--medium",
        choices=("images", "sounds"),
        help="what to take of a folder (default: images, or where there are none sounds)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that the shards are put into")
    parser.add_argument("--name", default="train", help="what the names of the shards begin with (default: train)")
    parser.add_argument("--shard-size", type=words.count, default=1000, help="most samples of a shard (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="which shapes or squares, and their order (default: 0)")
    parser.add_argument("--size", type=words.count, default=64, help="shapes, squares: pixels of a side (default: 64)")
    parser.add_argument("--num", type=words.count, default=4096, help="shapes: how many (default: 4096)")
    parser.add_argument("--first", type=int, default=0, help="shapes: number of the first one (default: 0)")
    parser.add_argument("--crops", type=words.count, help="squares of each photograph (default: the files unchanged)")
    parser.add_argument(
        "--scales",
        type=_sides,
        metavar="LOW,HIGH",
        help="shortest and longest side that is cut, in pixels of the photograph (default: from --size to its triple)",
    )
    parser.add_argument("--held-out", type=float, help="share of the photographs for shards of their own (default: 0)")
    parser.add_argument("--max-broken", type=int, help="most files that may be left out (default: 100)")
    return parser
