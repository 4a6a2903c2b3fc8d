"""Make WebDataset shards: from drawn shapes, or from a folder of images with one folder for each class.

    vqscale shards --source shapes --num 4096 --size 64 --out data/shapes
    vqscale shards --source /data/ImageNet/train --out data/imagenet --name train

Image files go into the shards unchanged; the label is the place of the class folder among all in the order of names.
An interrupted making goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from vqscale.data.config import ShapesConfig
from vqscale.programs.commands import words
from vqscale.run import processes


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the shards are there, 1 failed on the way, 2 the user's input."""
    return processes.status_of(lambda: _make(arguments(sys.argv[1:] if argv is None else argv)))


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked as far as no file is needed; ValueError for shapes that cannot be drawn."""
    args = _parser().parse_args(given)
    problems = list(_shapes(args).problems()) if args.source == "shapes" else []
    if problems:
        raise ValueError("; ".join(message for _, message in problems))
    return args


def _make(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from vqscale.data.made import make  # after the arguments: it brings the webdataset library, and that brings torch

    if args.source == "shapes":
        plan = make.shapes(_shapes(args))
    else:
        plan = make.folder(Path(args.source).expanduser(), args.seed)
    shards = make.names(args.out.expanduser(), args.name, plan.num_samples, args.shard_size)
    make.write(plan, shards, make.split_name(shards[0].name))
    first, last = (shard.name.removesuffix(".tar").rsplit("-", 1)[1] for shard in (shards[0], shards[-1]))
    print(f"{plan.num_samples} images in {len(shards)} shards; in a config:")
    print(f"shards: {args.out}/{args.name}-{{{first}..{last}}}.tar")
    return 0


def _shapes(args: argparse.Namespace) -> ShapesConfig:
    return ShapesConfig(args.num, args.size, args.first, args.seed)


def _parser() -> argparse.ArgumentParser:
    parser = words.parser(__doc__)
    parser.add_argument("--source", required=True, help="`shapes`, or a folder whose folders are the classes")
    parser.add_argument("--out", type=Path, required=True, help="folder that the shards are put into")
    parser.add_argument("--name", default="train", help="what the names of the shards begin with (default: train)")
    parser.add_argument("--shard-size", type=words.count, default=1000, help="most images of a shard (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="which shapes, or which order of the files (default: 0)")
    parser.add_argument("--num", type=words.count, default=4096, help="shapes: how many (default: 4096)")
    parser.add_argument("--size", type=words.count, default=64, help="shapes: pixels of a side (default: 64)")
    parser.add_argument("--first", type=int, default=0, help="shapes: number of the first one (default: 0)")
    return parser
