"""All that has K, the number of codes, in its shape: rows over the code axis, and what is computed on them.

Whatever lies here holds only the rows that this rank owns, and takes and returns data-parallel tensors.

    rows codebook similarity      which rows are whose, the table of codes, what nearest means
    tally usage revival           what codes were used for; first values from data; dead codes
    merge scan products backend   ranks into one answer; blocks; precision of products; plain torch or kernels
    clusters kmeans               which codes belong together, and how that is found
    ids noise bits dense          ids as they are given; random numbers by key; codes that are D bits; slow definitions
    constant                      a mark for torch.compile
    softmax/                      the mixture of all codes and its gradient (its README derives it)
    search/                       exact nearest codes by a prefilter
    heads/                        vocabularies of priors: loss, embedding, drawing
    convex/                       SCQ: convex combinations of codes
    gpu/                          search and softmax as fused kernels

Names of tensors end in their shape, one letter a dimension. The case says what is split: capital letters are whole,
small ones a part.

    N   tokens of this rank                            K   all codes
    B   tokens of a code group: N of each of M ranks   k   codes, or rows, of this rank
    D   dimensions of a code                           M   ranks of the code axis, R replicas on the data axis
    b   tokens of a block                              r   rows of a block, or of a part of the rows
    P   pairs (token, row), or candidates              L   lines, neighbouring rows of a block, or the rows of a line
    T   tokens of a block of the search                E   a key of the search with its columns of bounds
    H   lines that are searched, U distinct rows       2, 4, 7   that many numbers

images have B images, C channels and sides H, W elsewhere in the package. Where a file here needs another letter, or one
of these for something else, it says so at its top: bits.py, search/prefilter.py, heads/ and convex/.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqscale.codes.codebook import Codebook
    from vqscale.codes.heads.flat import Head
    from vqscale.codes.revival import Upkeep
    from vqscale.codes.rows import Rows, Table, set_aside
    from vqscale.codes.usage import Usage

__all__ = ["Codebook", "Head", "Rows", "Table", "Upkeep", "Usage", "set_aside"]

_PLACES = {
    "Codebook": "codebook",
    "Head": "heads.flat",
    "Rows": "rows",
    "Table": "rows",
    "Upkeep": "revival",
    "Usage": "usage",
    "set_aside": "rows",
}


def __getattr__(name: str) -> Any:
    """What outsiders use, imported when it is first asked for: this package's configs need no torch."""
    if name not in _PLACES:
        raise AttributeError(f"module 'vqscale.codes' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"vqscale.codes.{_PLACES[name]}"), name)
