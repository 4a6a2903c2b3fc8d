"""The networks that `vqscale evaluate` measures by, from files of weights, and statistics that they compare with."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vqscale.metrics.features import Measures
    from vqscale.nets.inception import Inception
    from vqscale.parallel.mesh import Mesh


def inception(args: argparse.Namespace, mesh: Mesh) -> Inception:
    """The network of --inception."""
    from vqscale.nets.inception import load

    return load(args.inception, args.inception_sha256).to(mesh.device)


def against(args: argparse.Namespace, mesh: Mesh) -> Measures:
    """Inception and the statistics of --reference, each where it is given. ValueError for a file without statistics."""
    from vqscale.metrics import fid
    from vqscale.metrics.features import Measures

    if not args.inception:
        return Measures()
    network, reference = inception(args, mesh), None
    if args.reference:
        reference = fid.read(args.reference, network.facts, network.dims)
        if reference.pool is None:
            raise ValueError(
                f"--reference {args.reference} has images and no statistics: make some with "
                "`vqscale evaluate statistics`"
            )
    return Measures(network, reference=reference)


def measures(args: argparse.Namespace, mesh: Mesh) -> Measures:
    """As `against`, and LPIPS by --vgg and --heads."""
    from vqscale.nets import lpips

    found = against(args, mesh)
    if not args.vgg:
        return found
    expected = None if args.vgg_sha256 == "any" else args.vgg_sha256
    distance = lpips.load(args.vgg, args.heads, vgg_sha256=expected).to(mesh.device)
    published = args.vgg_sha256.startswith("397923af")
    return replace(found, lpips=distance, lpips_name="lpips" if published else "distance_other_vgg")
