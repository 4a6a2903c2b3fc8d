"""Clustering the codes of a frozen tokenizer, for priors that predict coarse ids first: codes/kmeans.py on its vectors,
or the leading digits of its ids where they have digits. The outcome is a file (tokenizer/clusters.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch

from vqscale.codes.kmeans import Method, by_digits, kmeans
from vqscale.codes.rows import Rows, decoded
from vqscale.disk import manifest
from vqscale.parallel import ops
from vqscale.parallel.background import on_first
from vqscale.parallel.mesh import Mesh
from vqscale.run.folder import commit
from vqscale.tokenizer import clusters
from vqscale.tokenizer.clusters import ClustersCard
from vqscale.tokenizer.model import Tokenizer

Kind = Literal["kmeans", "balanced", "digits"]


def place(tokenizer: Path, num_clusters: int) -> Path:
    """Where the clusters of a tokenizer lie. ValueError for a checkpoint, which is sealed."""
    if (tokenizer / manifest.NAME).is_file():
        raise ValueError(f"{tokenizer} is a checkpoint, to which nothing is added: give a file with --out")
    return tokenizer / f"clusters-{num_clusters}.safetensors"


def cluster(
    tokenizer: Tokenizer, out: Path, kind: Kind | None, method: Method, mesh: Mesh, path: str = "", command: str = ""
) -> ClustersCard:
    """Cluster the codes and write the file; its card. `kind` None is digits where ids have them, else balanced.
    Collective; ValueError on all ranks for what cannot be clustered.
    """
    quantizer = tokenizer.quantizer
    if quantizer.num_ids > 1:
        raise ValueError(
            f"{path} has {quantizer.num_ids} ids per token, and clusters are of one: take a tokenizer with one id"
        )
    kind = kind or ("digits" if quantizer.digits else "balanced")
    layout = Rows(quantizer.num_codes, mesh.codes.size, mesh.codes.rank)
    card = ClustersCard(
        tokenizer.fingerprint, quantizer.num_codes, method.num_clusters, kind, tokenizer_path=path, command=command
    )
    known = vars(card) | {"commit": commit()}
    if kind == "digits":
        if quantizer.digits is None:
            raise ValueError(f"the ids of {path} have no digits, as those of fsq, lfq and bsq: use --method balanced")
        cluster_k = by_digits(quantizer.digits, method.num_clusters, layout, mesh.device)
    else:
        with torch.no_grad():
            rows_kD = torch.cat(list(decoded(quantizer.decode, layout, mesh.device)))
        cluster_k = kmeans(rows_kD, layout, mesh.codes, method)
        known |= {"metric": method.metric, "iterations": method.iterations, "seed": method.seed}
    parts = ops.gather_objects(cluster_k.to(torch.int32).cpu().numpy(), mesh.codes)
    return on_first(lambda: clusters.write(out, np.concatenate(parts), ClustersCard(**known)), mesh)


def summary(card: ClustersCard, out: Path) -> str:
    """The closing line."""
    return (
        f"{card.num_codes} codes in {card.num_clusters} clusters ({card.method}), fingerprint {card.fingerprint[:12]}, "
        f"in {out}: give it to a prior as prior.clusters={out}"
    )
