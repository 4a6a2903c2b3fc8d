"""The networks of a tokenizer compiled, and captured as CUDA graphs (run.compile, run.cuda_graphs).

A graph is replayed with one launch, and writes what it returns, gradients too, where it wrote them before: they are
there until the next step begins, and torch raises an error where they are read later. So no loop may keep them, and
what would is refused (config/run.py). Nothing but encoder and decoder is captured. What is done with codes, with
gradients over all ranks and with the learning rate follows from numbers that the host reads in every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vqscale.tokenizer.model import Tokenizer


def compile_nets(tokenizer: Tokenizer, graphs: bool = False, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile encoder and decoder in place, at their first call; parameters keep their names.

    With `graphs` their passes are captured as CUDA graphs, each for the shape of its first samples.
    """
    from torch._functorch import config as functorch

    # By default a compiled backward pass writes over what it needs, and the adaptive weight asks for two.
    functorch.donated_buffer = False
    captured: dict[str, Any] = {"mode": "reduce-overhead", "dynamic": False} if graphs else {}
    tokenizer.encoder.compile(backend=backend, **captured)
    tokenizer.decoder.compile(backend=backend, **captured)
