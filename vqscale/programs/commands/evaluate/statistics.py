"""`vqscale evaluate statistics`: mean and covariance of Inception's features of a data set."""

from __future__ import annotations

import argparse

from vqscale.programs.commands.evaluate import asked, networks


def told(args: argparse.Namespace) -> str:
    """The lines for a terminal, on rank 0 alone; writes the file of statistics. Collective."""
    config = asked.images(args)
    from vqscale.data.samples import SampleStream
    from vqscale.data.shards import chosen
    from vqscale.metrics import fid
    from vqscale.nets.inception import PREPROCESSING
    from vqscale.programs import score
    from vqscale.show import report

    with asked.joined(args) as mesh:
        inception = networks.inception(args, mesh)
        keys = chosen.read_keys(args.keys) if args.keys else None
        place = (args.batch * mesh.world.size, mesh.world.rank, mesh.world.size)
        stream = SampleStream(config, *place, train=False, keys=keys)
        progress = asked.progress(stream.num_samples, args, mesh)
        found, seen = score.statistics(stream, inception, mesh, progress.advance, points=args.images)
        progress.close()
    if mesh.world.rank:
        return ""
    points = 0 if found.points_ND is None else len(found.points_ND)
    numbers = {"images": seen.images, "broken": seen.broken, "enlarged": seen.enlarged, "points": points}
    facts = {
        **inception.facts,
        **asked.result(
            numbers, mesh, report.about_inception(inception, PREPROCESSING), data=asked.data(config, stream)
        ),
    }
    fid.save(args.out, found.pool, found.spatial, facts, found.points_ND)
    return f"{args.out}: statistics of {seen.images} images, features of {points}" + "".join(
        f"\nnote: {note}" for note in report.notes(numbers, inception, seen.told)
    )
