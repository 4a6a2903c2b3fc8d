"""The clusters of a tokenizer's codes as a file beside it, and who made them of what: `vqscale cluster` writes it, and
priors take it.

    NAME.safetensors    cluster: int32 (K,); its header has a card: the fingerprint of the tokenizer whose codes these
                        are, that of the clusters themselves, and how they were found

Four bytes of every code come to one process when it is written; a rank that reads takes its own rows. Not here: how
clusters are found (codes/kmeans.py).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vqscale.disk import files

if TYPE_CHECKING:
    from torch import Tensor

    from vqscale.codes.rows import Rows

FORMAT, VERSION, TENSOR = "vqscale clusters", 1, "cluster"


@dataclass(frozen=True)
class ClustersCard:
    """What is known of the clusters of a tokenizer's codes."""

    tokenizer: str  # fingerprint of the tokenizer
    num_codes: int
    num_clusters: int
    method: str  # kmeans, balanced or digits
    metric: str = ""
    iterations: int = 0
    seed: int = 0
    fingerprint: str = ""  # of the clusters
    tokenizer_path: str = ""
    command: str = ""
    commit: str = ""


def fingerprint(cluster_K: NDArray[np.int32]) -> str:
    """The sha256 of which code is in which cluster."""
    return hashlib.sha256(cluster_K.astype("<i4").tobytes()).hexdigest()


def write(path: Path, cluster_K: NDArray[np.int32], card: ClustersCard) -> ClustersCard:
    """Write the file; the card with the fingerprint. What lies there with other clusters is not written over."""
    known = {**asdict(card), "fingerprint": fingerprint(cluster_K)}
    there = read_card(path) if path.exists() else None
    if there is not None and there.fingerprint != known["fingerprint"]:
        raise ValueError(
            f"{path} has other clusters, of method {there.method} and seed {there.seed}, on which priors may depend: "
            "give another file with --out, or remove it"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"format": FORMAT, "version": str(VERSION), "card": json.dumps(known)}
    files.write(path, save({TENSOR: cluster_K.astype(np.int32)}, header))
    return ClustersCard(**known)


def read_card(path: str | Path) -> ClustersCard:
    """ValueError where there is no file of clusters at the path."""
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
        if (header.get("format"), header.get("version")) != (FORMAT, str(VERSION)):
            raise ValueError(f"it is {header.get('format')!r}, version {header.get('version')}")
        found = json.loads(header["card"])
        return ClustersCard(**{one.name: found[one.name] for one in fields(ClustersCard)})
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no file of clusters ({type(error).__name__}: {error}): give what `vqscale cluster TOKENIZER` "
            "has written"
        ) from None


def check(path: str | Path, made_by: str | None, num_codes: int | None, num_clusters: int | None) -> ClustersCard:
    """The card of clusters for ids of this tokenizer, None where that is not known yet. ValueError with all that does
    not fit, or is damaged."""
    card, cluster_K = read_card(path), _read(path, None)
    count_G = np.bincount(cluster_K.clip(0), minlength=card.num_clusters)
    faults = []
    if made_by not in (None, card.tokenizer):
        faults.append(
            f"they are of the tokenizer with fingerprint {card.tokenizer} ({card.tokenizer_path}), and the ids of the "
            f"one with {made_by}"
        )
    for what, there, here in (("codes", card.num_codes, num_codes), ("clusters", card.num_clusters, num_clusters)):
        if there != here:
            faults.append(f"they are {there} {what}, but expected are {here}")
    if fingerprint(cluster_K) != card.fingerprint or len(cluster_K) != card.num_codes:
        faults.append("the file was changed after it was written")
    if (empty := int((count_G == 0).sum())) or len(count_G) > card.num_clusters or cluster_K.min(initial=0) < 0:
        faults.append(f"{empty} of the {card.num_clusters} clusters are empty, or codes are in others than these")
    if faults:
        raise ValueError(
            f"the clusters in {path} do not fit:\n  " + "\n  ".join(faults) + "\ngive those of this tokenizer's codes, "
            "or make them with vqscale cluster"
        )
    return card


def read(path: str | Path, layout: Rows) -> Tensor:
    """The clusters of the codes of this rank, int64."""
    import torch

    return torch.from_numpy(_read(path, layout).astype(np.int64))


def _read(path: str | Path, layout: Rows | None) -> NDArray[Any]:
    try:
        with safe_open(path, framework="np") as file:
            part = file.get_slice(TENSOR)
            found: NDArray[Any] = part[:] if layout is None else part[layout.start : layout.stop]
            return found
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): make it again with vqscale cluster") from None
