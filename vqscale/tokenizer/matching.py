"""The tokenizer whose ids a prior models, found by its fingerprint. A run has two, its averages and its parameters, and
ids are made by either; which of the two it was is not for the user to remember. Not here: how it is read (saved.py).
"""

from __future__ import annotations

from pathlib import Path

from vqscale.parallel.mesh import Mesh
from vqscale.tokenizer.model import Tokenizer


def tokenizer_of(path: str | Path, made_by: str | None, mesh: Mesh) -> Tokenizer:
    """The tokenizer in `path` (as of Tokenizer.load) with the fingerprint `made_by`: the averages of its run, or else
    the parameters. Collective. ValueError on all ranks, with all fingerprints, where neither has it.

    None, of ids that nobody knows the tokenizer of, takes the averages.
    """
    tokenizer = Tokenizer.load(path, mesh=mesh)
    average = tokenizer.fingerprint
    if made_by in (None, average):
        return tokenizer
    tokenizer = Tokenizer.load(path, mesh=mesh, weights="parameters")
    parameters = tokenizer.fingerprint
    if made_by == parameters:
        return tokenizer
    here = average if average == parameters else f"{average} (averages) or {parameters} (parameters)"
    raise ValueError(
        f"the tokenizer in {path} has the fingerprint {here}, and the ids that the prior is to model were made by the "
        f"one with {made_by}: give that tokenizer, or encode a cache with this one and train a prior on it"
    )
