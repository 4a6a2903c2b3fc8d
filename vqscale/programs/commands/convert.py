"""Make WebDataset shards of data sets with labels of their pixels, in the forms in which these are passed on.

    vqscale convert nyu nyudepthv2 --out data/nyu
    vqscale convert nyu-labeled nyu_depth_v2_labeled.mat --splits splits.mat --out data/nyu_labeled
    vqscale convert sync sync --out data/nyu_sync
    vqscale convert coco train2017 --maps panoptic_train2017.zip --json panoptic_train2017.json --out data/coco
    vqscale convert pairs mine --unit-m 0.001 --out data/mine

nyu          FastDepth's tree: train/SCENE/00001.h5 and val/official/00001.h5, with rgb and depth in metres
nyu-labeled  the 1449 labeled images, 795 of them for training
sync         the tree of BTS and its heirs: SCENE/rgb_00045.jpg beside SCENE/sync_depth_00045.png, in millimetres
coco         images, PNGs of segments and their JSON, as cocodataset.org has them
pairs        NAME.jpg (png, webp) beside NAME.depth.png, and NAME.panoptic.png with NAME.panoptic.json or NAME.seg.png

A sample is an image and depth.png (16 bits, 0 = missing) or panoptic.png with panoptic.json, or seg.png (the category
of each pixel); `_info.json` beside the shards has the unit of depth and the categories. What is wrong with a file is
said with its name. An interrupted conversion goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vqscale.programs.commands import words
from vqscale.run import processes

if TYPE_CHECKING:
    from vqscale.data.made.make import Plan
    from vqscale.data.made.pairs import Coverage


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the shards are there, 1 failed on the way, 2 the user's input."""
    return processes.status_of(lambda: _convert(arguments(sys.argv[1:] if argv is None else argv)))


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked as far as no file is needed; ValueError for what cannot be made."""
    args = _parser().parse_args(given)
    if args.name and Path(args.name).name != args.name:
        raise ValueError(f"--name {args.name!r} is what the names of files begin with, without a folder: change --out")
    if getattr(args, "unit_m", None) is not None and not args.unit_m > 0:
        raise ValueError(f"--unit-m is {args.unit_m}, but a step of depth is above 0 metres: use 0.001 for millimetres")
    return args


def _convert(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from vqscale.data.made import make
    from vqscale.data.made.pairs import Coverage

    coverage = Coverage()
    plans = _plans(args, coverage)
    for (_, plan), pattern in zip(plans, make.write_all(plans, args.out, args.shard_size), strict=True):
        print(f"{plan.num_samples} samples; in a config:\nshards: {pattern}")
    if coverage.pixels:
        print(f"of what was written now, {coverage.told()}")
    return 0


def _plans(args: argparse.Namespace, coverage: Coverage) -> list[tuple[str, Plan]]:
    """(name, what to make) of each set of shards."""
    from vqscale.data.made import coco, nyu, pairs

    source, more = args.source.expanduser(), {"seed": args.seed, "coverage": coverage}
    categories = coco.read_categories(args.categories) if getattr(args, "categories", None) else None
    if args.form == "nyu":
        return [(part, nyu.tree(source, part, **more)) for part in ("train", "val")]
    if args.form == "nyu-labeled":
        return [(part, nyu.labeled(source, args.splits, part, args.raw, **more)) for part in ("train", "test")]
    if args.form == "sync":
        return [(args.name, nyu.sync(source, args.list, **more))]
    if args.form == "coco":
        return [(args.name, coco.panoptic(source, args.maps, args.json, categories, **more))]
    return [(args.name, pairs.folder(source, args.unit_m, categories, **more))]


def _parser() -> argparse.ArgumentParser:
    parser = words.parser(__doc__)
    forms = parser.add_subparsers(dest="form", required=True)
    of = {
        "nyu": "folder with train/SCENE/*.h5 and val/official/*.h5",
        "nyu-labeled": "nyu_depth_v2_labeled.mat",
        "sync": "folder with SCENE/rgb_00045.jpg and SCENE/sync_depth_00045.png",
        "coco": "folder with the images",
        "pairs": "folder with images, and their labels beside them",
    }
    made = {name: forms.add_parser(name, help=about) for name, about in of.items()}
    for name, form in made.items():
        form.add_argument("source", type=Path, help=of[name])
        form.add_argument("--out", type=Path, required=True, help="folder that the shards are put into")
        form.add_argument(
            "--shard-size", type=words.count, default=1000, help="most samples of a shard (default: 1000)"
        )
        form.add_argument("--seed", type=int, default=0, help="the order of training samples (default: 0)")
        if not name.startswith("nyu"):
            form.add_argument("--name", default="train", help="what the shards' names begin with (default: train)")
        else:
            form.set_defaults(name=None)
    made["nyu-labeled"].add_argument("--splits", type=Path, required=True, help="splits.mat")
    made["nyu-labeled"].add_argument("--raw", action="store_true", help="the sensor's depth, with what it missed")
    made["sync"].add_argument("--list", type=Path, help="file with `image depth ...` on each line (default: all pairs)")
    made["coco"].add_argument("--maps", type=Path, required=True, help="panoptic_train2017.zip, or the folder of PNGs")
    made["coco"].add_argument("--json", type=Path, required=True, help="panoptic_train2017.json")
    for name in ("coco", "pairs"):
        made[name].add_argument("--categories", type=Path, help="JSON with a list of id, name, isthing")
    made["pairs"].add_argument("--unit-m", type=float, help="metres that a step of NAME.depth.png is")
    return parser
