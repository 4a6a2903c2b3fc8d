"""What the looks at images have in common: processes, shards and progress as asked for, and the form of a result."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from vqscale.data.config import ImagesConfig
from vqscale.data.config_buckets import BucketsConfig, images_as_trained
from vqscale.programs.commands import words
from vqscale.run import processes

if TYPE_CHECKING:
    from vqscale.data.samples import SampleStream
    from vqscale.parallel.mesh import Mesh
    from vqscale.show.progress import Progress


def joined(args: argparse.Namespace) -> AbstractContextManager[Mesh]:
    # Weights and images are files, which may be wrong on one rank only: no error is one that all have agreed on.
    return processes.joined(args.device, processes.divide(getattr(args, "codes", 1)), agreed=())


def images(args: argparse.Namespace, card: Mapping[str, Any] | None = None) -> ImagesConfig | BucketsConfig:
    """The shards as asked for, where nothing is asked for as in a tokenizer's card; without one they are looked for."""
    from vqscale.data import samples

    sides = (args.image_size, getattr(args, "buckets", None))
    config = images_as_trained(args.shards, args.workers, card or {}, *sides, args.interpolation)
    problems = [message for _, message in config.problems()]
    if problems:
        raise ValueError("; ".join(problems))
    if card is None:
        samples.prepare(config)
    return config


def progress(images: int, args: argparse.Namespace, mesh: Mesh) -> Progress:
    from vqscale.show.progress import Progress

    return Progress(-(-images // (args.batch * mesh.world.size)), rank=mesh.world.rank, stream=sys.stderr)


def data(config: ImagesConfig | BucketsConfig, stream: SampleStream) -> dict[str, Any]:
    how = f"{config.interpolation} {'without' if config.interpolation == 'sampled' else 'with'} antialiasing"
    if isinstance(config, BucketsConfig):
        sides: dict[str, Any] = {"buckets": [list(sides) for sides in config.buckets]}
        crop = f"to cover the bucket of the nearest aspect, {how}, centre crop"
    else:
        sides = {"image_size": config.image_size}
        crop = f"short side to {config.short_side}, {how}, centre crop"
    return {"shards": list(config.patterns), **sides, "crop": crop, "fingerprint": stream.fingerprint}


def result(numbers: Mapping[str, float], mesh: Mesh, protocol: dict[str, Any], **what: Any) -> dict[str, Any]:
    """What is written: numbers, what they are of, how they were measured, by which code, on how many processes."""
    code = words.made_by("evaluate")
    return {"numbers": numbers, **what, "protocol": protocol, **code, "processes": mesh.world.size}
