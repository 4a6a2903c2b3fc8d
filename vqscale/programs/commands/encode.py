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
from pathlib import Path
from typing import Any

from vqscale.config import load_class
from vqscale.data.config import INTERPOLATIONS, MEDIA, VIEWS, MediumConfig, ShardsConfig
from vqscale.programs.commands import words
from vqscale.run import checkout, processes
from vqscale.signals.config import SignalConfig

ASKED = ("image_size", "resize", "interpolation", "seconds")


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 failed while encoding, 2 the user's input, 75 stopped on request."""
    given = sys.argv[1:] if argv is None else list(argv)
    return processes.status_of(lambda: _encode(arguments(given), checkout.command("encode", given)))


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked as far as no file is needed; ValueError for options that do not go together."""
    args = _parser().parse_args(given)
    _medium(args, {})
    return args


def _encode(args: argparse.Namespace, command: str) -> int:
    grid = processes.divide(args.codes)
    from vqscale.data import samples
    from vqscale.data.views import Source
    from vqscale.programs import encode
    from vqscale.run.folder import EXIT_STOPPED
    from vqscale.tokenizer.model import Tokenizer

    samples.prepare(_medium(args, {}))
    with processes.joined(args.device, grid, args.timeout_s) as mesh:
        tokenizer = Tokenizer.load(args.tokenizer, mesh=mesh, weights=args.weights)
        medium = _medium(args, _known(args, tokenizer.card, tokenizer.signal.config))
        source = Source(medium, args.views)
        options = encode.Options(args.batch, args.max_broken, args.storage, str(args.tokenizer), command)
        outcome = encode.encode(tokenizer, source, args.out, mesh, options)
    if mesh.world.rank == 0:
        print(encode.summary(outcome, args.out, mesh.world.size), flush=True)
    return EXIT_STOPPED if outcome.state == "stopped" else 0


def _medium(args: argparse.Namespace, card: Mapping[str, Any]) -> MediumConfig:
    """How the samples are read: as asked for, or as a tokenizer's card says. ValueError for options that do not go
    together."""
    kind: type[ShardsConfig] = load_class(MEDIA[args.medium])
    given = {key: value for key in ASKED if (value := getattr(args, key)) is not None}
    others = [f"--{key.replace('_', '-')}" for key in given if key not in kind.asked]
    problems = (
        [f"{', '.join(others)} is not about {kind.kind}: leave it out with --medium {args.medium}"] if others else []
    )
    places = {"num_workers": args.workers, "index_dir": args.index_dir, "cache_dir": args.cache_dir}
    config = kind(tuple(args.shards), **places, **kind.encoded(card, given, args.views))
    problems += [message for _, message in config.problems()]
    if args.views not in config.views:
        problems.append(f"--views {args.views} is not for {kind.kind}: use {' or '.join(config.views)}")
    if problems:
        raise ValueError("; ".join(problems))
    return config


def _known(args: argparse.Namespace, card: Mapping[str, Any], signal: SignalConfig) -> dict[str, Any]:
    """What a tokenizer says of the samples that it was trained with; ValueError where it does not say their size."""
    if "image_size" in load_class(MEDIA[args.medium]).asked and not (args.image_size or card.get("image_size")):
        raise ValueError(f"{args.tokenizer} does not say for images of which size it was trained: give --image-size")
    rate = getattr(signal, "sample_rate", None)
    return {**card, **({} if rate is None else {"sample_rate": rate})}


def _parser() -> argparse.ArgumentParser:
    parser = words.parser(__doc__)
    add: Any = parser.add_argument
    add("tokenizer", type=Path, metavar="TOKENIZER", help="run folder, checkpoint, or exported folder")
    add("out", type=Path, metavar="OUT", help="folder of the cache: new, or begun by the same command")
    add("--shards", required=True, nargs="+", help="tar shards, as in data.train.shards of a config")
    add(
        "--medium",
        choices=[name for name, path in MEDIA.items() if not load_class(path).measure],  # a cache has one grid
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
