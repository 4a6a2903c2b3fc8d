"""Heads of priors: vocabularies whose rows lie on the code axis. They embed, score and draw ids; logits are not sent.

To add one: a file here with what base.py asks for, its settings (in config.py, which has no torch), its line in HEADS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vqscale.codes.heads.config import HEADS, HeadConfig
from vqscale.config import load_class

if TYPE_CHECKING:
    from vqscale.codes.heads.base import Vocabulary
    from vqscale.parallel.mesh import Mesh

__all__ = ["HEADS", "build"]


def build(
    config: HeadConfig,
    num_codes: int,
    dim: int,
    mesh: Mesh,
    *,
    seed: int,
    feature_dim: int | None = None,
    num_ids: int = 1,
) -> Vocabulary:
    """The head that a config names, for `num_codes` ids and a trunk of width `dim`.

    `feature_dim` is the dimension of the tokenizer's codes, for heads that take their vectors; `num_ids` is how many
    ids a token has, each of `num_codes`.
    """
    head: Vocabulary = load_class(config.module).from_config(
        config, num_codes, dim, mesh, seed=seed, feature_dim=feature_dim, num_ids=num_ids
    )
    return head
