"""Cluster the codes of a frozen tokenizer, for priors that predict clusters first (prior.name: coarse_to_fine) or weigh
them (prior.cluster_weight).

    vqscale cluster runs/quickstart --clusters 64
    torchrun --nproc_per_node=8 -m vqscale cluster TOKENIZER --clusters 512 --method kmeans --metric cosine --codes 8

TOKENIZER is a run folder, one of its checkpoints, or an exported folder. The file lies beside it and says whose codes
these are; the clusters are the same on any number of processes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vqscale.programs.commands import words
from vqscale.run import checkout, processes


def main(argv: Sequence[str] | None = None) -> int:
    """0 done, 1 failed, 2 the user's input."""
    given = sys.argv[1:] if argv is None else list(argv)
    return processes.status_of(lambda: _cluster(arguments(given), checkout.command("cluster", given)))


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked as far as no file is needed."""
    return _parser().parse_args(given)


def _cluster(args: argparse.Namespace, command: str) -> int:
    grid = processes.divide(args.codes)
    from vqscale.codes.kmeans import Method
    from vqscale.programs import cluster
    from vqscale.tokenizer.model import Tokenizer

    out = args.out or cluster.place(args.tokenizer, args.clusters)
    method = Method(args.clusters, args.metric, args.method != "kmeans", args.iterations, args.seed)
    with processes.joined(args.device, grid, args.timeout_s) as mesh:
        tokenizer = Tokenizer.load(args.tokenizer, mesh=mesh, weights=args.weights)
        card = cluster.cluster(tokenizer, out, args.method, method, mesh, str(args.tokenizer), command)
    if mesh.world.rank == 0:
        print(cluster.summary(card, out), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = words.parser(__doc__)
    add: Any = parser.add_argument
    add("tokenizer", type=Path, metavar="TOKENIZER", help="run folder, checkpoint, or exported folder")
    add("--clusters", type=words.count, required=True, help="how many; published for 16384 codes: 512")
    add("--out", type=Path, help="the file (default: TOKENIZER/clusters-N.safetensors)")
    add(
        "--method",
        choices=["kmeans", "balanced", "digits"],
        help="nearest centres, clusters of equal size, or the leading digits of ids (default: digits where ids have "
        "them, else balanced)",
    )
    add("--metric", choices=["euclid", "cosine"], default="euclid", help="of k-means (default: euclid)")
    add("--iterations", type=words.count, default=25, help="of k-means, at most (default: 25)")
    add("--seed", type=int, default=0, help="of the first centres (default: 0)")
    words.add_weights(parser)
    words.add_codes(parser)
    words.add_processes(parser)
    return parser
