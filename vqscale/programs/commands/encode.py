"""Encode the images, sounds or labels of WebDataset shards into a token cache: the ids that a prior is trained on.

    vqscale encode runs/quickstart caches/shapes --shards 'runs/shards/train-{0000..0003}.tar' --views flip
    torchrun --nproc_per_node=8 -m vqscale encode TOKENIZER OUT --shards '/data/imagenet1k-train-{0000..1023}.tar'
    vqscale encode runs/dense/panoptic caches/scenes --medium panoptic --shards runs/shards/scenes32-val-000.tar
    vqscale encode runs/sound caches/sounds --medium sounds --shards 'runs/shards/sounds16k-train-{000..007}.tar'

TOKENIZER is a run folder (its newest whole checkpoint, averaged weights where there are any), one of its checkpoints,
or an exported folder. Of a recording the middle window is encoded, as long as those of its training. The same command
continues an interrupted encoding, on any number of processes. TERM, USR1, USR2 or a file STOP in OUT end it with status
75; what the storage shards hold that are finished is kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vqscale.data.as_trained import as_trained
from vqscale.data.config import INTERPOLATIONS, VIEWS, ImagesConfig, MediumConfig
from vqscale.data.config_dense import DenseConfig, DepthConfig, PanopticConfig
from vqscale.data.config_sounds import SoundsConfig
from vqscale.data.config_sounds import as_trained as as_heard
from vqscale.programs.commands import words
from vqscale.run import processes

DENSE: dict[str, type[DenseConfig]] = {"depth": DepthConfig, "panoptic": PanopticConfig}


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 failed while encoding, 2 the user's input, 75 stopped on request."""
    given = sys.argv[1:] if argv is None else list(argv)
    return processes.status_of(lambda: _encode(arguments(given), words.command("encode", given)))


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked as far as no file is needed; ValueError for options that do not go together."""
    args = _parser().parse_args(given)
    _pictures(args, args.image_size, {}) if args.medium != "sounds" else _sounds(args, {})
    return args


def _encode(args: argparse.Namespace, command: str) -> int:
    sounds, grid = args.medium == "sounds", processes.divide(args.codes)
    from vqscale.data import samples
    from vqscale.data.views import Source
    from vqscale.programs import encode
    from vqscale.run.folder import EXIT_STOPPED
    from vqscale.tokenizer.model import Tokenizer

    samples.prepare(_sounds(args, {}) if sounds else _pictures(args, None, {}))
    with processes.joined(args.device, grid, args.timeout_s) as mesh:
        tokenizer = Tokenizer.load(args.tokenizer, mesh=mesh, weights=args.weights)
        if sounds:
            rate = getattr(tokenizer.signal.config, "sample_rate", None)
            medium: MediumConfig = _sounds(args, as_heard(tokenizer.card, rate, args.seconds))
        else:
            size = args.image_size or _trained_size(args.tokenizer, tokenizer.card)
            medium = _pictures(args, size, tokenizer.card)
        source = Source(medium, args.views)
        options = encode.Options(args.batch, args.max_broken, args.storage, str(args.tokenizer), command)
        outcome = encode.encode(tokenizer, source, args.out, mesh, options)
    if mesh.world.rank == 0:
        print(encode.summary(outcome, args.out, mesh.world.size), flush=True)
    return EXIT_STOPPED if outcome.state == "stopped" else 0


def _places(args: argparse.Namespace) -> dict[str, Any]:
    """What is the same of every medium, and no part of what is encoded."""
    return {"num_workers": args.workers, "index_dir": args.index_dir, "cache_dir": args.cache_dir}


def _pictures(args: argparse.Namespace, size: int | None, card: Mapping[str, Any]) -> ImagesConfig | DenseConfig:
    return _dense(args, size, card) if args.medium in DENSE else _images(args, size, card)


def _dense(args: argparse.Namespace, size: int | None, card: Mapping[str, Any]) -> DenseConfig:
    """The config of images with labels; what is not asked for is as in a tokenizer's card, and what the labels mean as
    `_info.json` beside the shards says. ValueError for options that do not go together.
    """
    asked: dict[str, Any] = {"interpolation": args.interpolation or card.get("interpolation"), "image_size": size}
    how = {key: x for key, x in asked.items() if x is not None}
    config = DENSE[args.medium](tuple(args.shards), **_places(args), **how)
    problems = [message for _, message in config.problems()]
    if args.resize:
        problems.append("--resize is about the crop of plain images, and these are stretched: leave it out")
    if args.views not in config.views:
        problems.append(f"--views {args.views} is about plain images: use {' or '.join(config.views)}")
    if problems:
        raise ValueError("; ".join(problems))
    return config


def _images(args: argparse.Namespace, size: int | None = None, card: Mapping[str, Any] | None = None) -> ImagesConfig:
    """The config of the images, of which only the shards count without a size; what is not asked for is as in a
    tokenizer's card. ValueError for options that do not go together.
    """
    config = ImagesConfig(tuple(args.shards), **_places(args))
    problems = []
    if size is not None:
        known = as_trained(card or {}, args.image_size, args.resize, args.interpolation)
        resize = args.resize or (int(size * 1.1) if args.views == "ten_crop" else known["resize"] or size)
        config = replace(config, **{**known, "resize": resize}, crop="center")
        if args.views == "ten_crop" and resize == size:
            problems.append(f"--resize {resize} is the size of the images: the places of ten_crop are one; raise it")
    problems += [message for _, message in config.problems()]
    if problems:
        raise ValueError("; ".join(problems))
    return config


def _sounds(args: argparse.Namespace, known: Mapping[str, Any]) -> SoundsConfig:
    """The config of the recordings, of which only the shards count where nothing is known of a tokenizer. ValueError
    for options that do not go together.
    """
    config = SoundsConfig(tuple(args.shards), **_places(args), **known)
    problems = [message for _, message in config.problems()]
    others = [f"--{key.replace('_', '-')}" for key in ("image_size", "resize", "interpolation") if getattr(args, key)]
    others += [] if args.views == "center" else ["--views"]
    if others:
        problems.append(f"{', '.join(others)} is about images: leave it out with --medium sounds")
    if problems:
        raise ValueError("; ".join(problems))
    return config


def _trained_size(path: Path, card: Mapping[str, Any]) -> int:
    """The size of the images that a tokenizer was trained with; ValueError where its card does not say it."""
    size = card.get("image_size")
    if not size:
        raise ValueError(f"{path} does not say for images of which size it was trained: give --image-size")
    return int(size)


def _parser() -> argparse.ArgumentParser:
    parser = words.parser(__doc__)
    add: Any = parser.add_argument
    add("tokenizer", type=Path, metavar="TOKENIZER", help="run folder, checkpoint, or exported folder")
    add("out", type=Path, metavar="OUT", help="folder of the cache: new, or begun by the same command")
    add("--shards", required=True, nargs="+", help="tar shards, as in data.train.shards of a config")
    add(
        "--medium",
        choices=["images", "sounds", *DENSE],
        default="images",
        help="what lies in the shards (default: images)",
    )
    add("--seconds", type=float, help="sounds: length of what is encoded (default: what the run was trained with)")
    add("--image-size", type=words.count, help="pixels of a side (default: what the run was trained with)")
    add(
        "--resize", type=words.count, help="short side before the crop (default: as trained; ten_crop: 1.1 of the size)"
    )
    add("--views", choices=list(VIEWS), default="center", help="center, + mirrored, or five places, + mirrored")
    add("--interpolation", choices=INTERPOLATIONS, help="of the resize (default: as trained, or bicubic)")
    words.add_weights(parser)
    add("--batch", type=words.count, default=64, help="pictures (images x views) of a step and process (default: 64)")
    words.add_codes(parser)
    add("--workers", type=int, default=2, help="reading processes per process (default: 2)")
    add("--max-broken", type=int, default=100, help="broken images after which it ends with an error (default: 100)")
    add("--storage", type=words.count, default=0, help="images of a storage shard, the unit that is lost by a kill")
    add("--index-dir", help="where the list of samples is kept, as data.train.index_dir")
    add("--cache-dir", help="where streamed shards are kept, as data.train.cache_dir")
    words.add_processes(parser)
    return parser
