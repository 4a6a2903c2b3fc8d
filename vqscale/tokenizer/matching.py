"""The tokenizer whose ids a prior models, found by its fingerprint. A run has two, its averages and its parameters, and
ids are made by either; which of the two it was is not for the user to remember. One whose decoder alone was trained on
makes the ids of the tokenizer that it began from, and its card says of which. Not here: how it is read (saved.py).
"""

from __future__ import annotations

from pathlib import Path

from vqscale.parallel.mesh import Mesh
from vqscale.tokenizer.model import Tokenizer


def ids_of(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The fingerprints of the tokenizers whose ids are this one's: its own, and those that its encoder and codes were
    taken from and are still, to the bit. Collective on the code axis."""
    kept = tokenizer.card.get("ids_of")
    return (tokenizer.fingerprint, *(kept if isinstance(kept, list) else ()))


def tokenizer_of(path: str | Path, made_by: str | None, mesh: Mesh) -> Tokenizer:
    """The tokenizer in `path` (as of Tokenizer.load) of the ids of that with the fingerprint `made_by`: the averages of
    its run, or else the parameters. Collective. ValueError on all ranks, with all fingerprints, where neither is.

    None, of ids that nobody knows the tokenizer of, takes the averages.
    """
    tokenizer = Tokenizer.load(path, mesh=mesh)
    average = ids_of(tokenizer)
    if made_by in (None, *average):
        return tokenizer
    tokenizer = Tokenizer.load(path, mesh=mesh, weights="parameters")
    parameters = ids_of(tokenizer)
    if made_by in parameters:
        return tokenizer
    here = average[0] if average == parameters else f"{average[0]} (averages) or {parameters[0]} (parameters)"
    raise ValueError(
        f"the tokenizer in {path} has the fingerprint {here}, and the ids that the prior is to model were made by the "
        f"one with {made_by}: give that tokenizer, or encode a cache with this one and train a prior on it"
    )
