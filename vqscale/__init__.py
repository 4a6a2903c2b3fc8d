"""vqscale: visual tokenizers with very large, sharded codebooks, and priors over their ids.

Importing this package imports nothing heavy; each public name brings what it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqscale.codes.codebook import Codebook
    from vqscale.codes.heads.flat import Head
    from vqscale.parallel.mesh import Mesh
    from vqscale.priors.base import Prior
    from vqscale.tokenizer.model import Tokenizer

__all__ = ["Codebook", "Head", "Mesh", "Prior", "Tokenizer", "priors", "quantizers"]

_HOMES = {
    "Codebook": "vqscale.codes.codebook",
    "Head": "vqscale.codes.heads.flat",
    "Mesh": "vqscale.parallel.mesh",
    "Prior": "vqscale.priors.base",
    "Tokenizer": "vqscale.tokenizer.model",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in __all__:
        return import_module(f"vqscale.{name}")
    raise AttributeError(f"module 'vqscale' has no attribute {name!r}; it has {', '.join(__all__)}")
