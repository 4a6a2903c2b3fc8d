"""`vqscale evaluate samples`: generated images against a reference, and before the shapes classifier."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from vqscale.programs.commands.evaluate import asked, networks

if TYPE_CHECKING:
    from vqscale.metrics.sample_file import SampleFile
    from vqscale.nets.inception import Inception
    from vqscale.parallel.mesh import Mesh


def told(args: argparse.Namespace) -> str:
    """The lines for a terminal, on rank 0 alone; writes the folder of --out. Collective."""
    from vqscale.metrics.sample_file import SampleFile
    from vqscale.programs import judge
    from vqscale.show import pictures, report

    images, inception = SampleFile(args.path), None
    numbers, protocol = dict[str, float](), dict[str, Any]()
    with asked.joined(args) as mesh:
        if args.inception:
            inception = networks.inception(args, mesh)
            numbers, protocol = _against_reference(images, inception, args, mesh)
        if args.classifier:
            progress = asked.progress(len(images), args, mesh)
            judged, about = judge.judge(images, args.classifier, mesh, progress.advance)
            progress.close()
            numbers, protocol = numbers | judged, protocol | about
    if mesh.world.rank:
        return ""
    numbers["images"] = len(images)
    result = asked.result(numbers, mesh, protocol, samples=report.file(args.path))
    result["notes"] = report.notes(numbers, inception, [])
    _, some = next(images.batches(16))
    picture = pictures.tiles(some, scale=pictures.scale(*some.shape[2:]))
    return report.tell(result, args.out, f"Samples {args.path}", {"samples, the first": picture})


def _against_reference(
    images: SampleFile, inception: Inception, args: argparse.Namespace, mesh: Mesh
) -> tuple[dict[str, float], dict[str, Any]]:
    """(FID and its kin, how they were measured)."""
    from vqscale.metrics import generation
    from vqscale.nets.inception import PREPROCESSING
    from vqscale.show import report

    progress = asked.progress(len(images), args, mesh)
    reference = generation.read_reference(args.reference, inception, mesh, batch=args.batch)
    samples = generation.describe(images, inception, mesh, batch=args.batch, advance=progress.advance)
    progress.close()
    return generation.compare(samples, reference), {
        "definitions": "guided-diffusion's evaluator; Inception score of parts of 5000; distances in float64",
        **report.about_inception(inception, PREPROCESSING),
        "reference": report.file(args.reference),
        "reference images": 0 if reference.points_ND is None else len(reference.points_ND),
    }
