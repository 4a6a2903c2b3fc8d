"""A tokenizer compiled, and captured as CUDA graphs (run.compile, run.cuda_graphs).

run.compile alone is of encoder and decoder. With run.cuda_graphs the whole forward pass (encoder, quantizer, decoder)
is one graph, and its backward pass one more, but for two cases, which are told before a run begins:

* with a discriminator they are two, cut before the decoder: the weight of its loss, and what is logged of it, are
  gradients at the decoder's last weight, for which one graph would go back through the encoder, three times in a step;
* encoder and decoder alone are captured where what is between them cannot be (`apart`): several processes talk there,
  the encoder does not learn, the quantizer's forward pass is more than one graph (Quantizer.breaks_graph).

A graph is replayed with one launch, and writes what it returns, gradients too, where it wrote them before: they are
there until the next step begins, and torch raises an error where they are read later. So no loop may keep them, and
what would is refused (config/run.py). What a quantizer keeps of a pass (counts, tokens for revival) its `update` copies
or forgets before the next one.

A number of the host that a graph reads is a constant of it, and another number makes another graph. So what the host
knows is noted before each pass (Quantizer.note). What changes a few times in a run is a constant: warm-up, landing and
after, each with and without statistics, one of them once more when the length of the window is known; with evaluation
these are eight graphs at most, and torch compiles no more. What changes with every step is a tensor at one address.

Not captured are the losses with their networks, and what follows from numbers that the host reads in every step: what
is done with gradients over all ranks, the learning rate, the optimiser, revival.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from vqscale.codes import tally
from vqscale.train.config.first_weights import TOKENIZER_PARTS

if TYPE_CHECKING:
    from vqscale.parallel.mesh import Mesh
    from vqscale.tokenizer.model import Tokenizer
    from vqscale.train.config import TokenizerRun

Backend = str | Callable[..., Any]
CAPTURED: dict[str, Any] = {"mode": "reduce-overhead", "dynamic": False}


def compile_run(config: TokenizerRun, tokenizer: Tokenizer, mesh: Mesh, backend: Backend = "inductor") -> list[str]:
    """Compile in place, at the first call, what the run asks for; parameters keep their names. Returns what is said of
    it."""
    if not config.run.cuda_graphs:
        compile_nets(tokenizer, backend=backend)
        return []
    if why := apart(config, tokenizer, mesh):
        compile_nets(tokenizer, graphs=True, backend=backend)
        return [f"CUDA graphs: encoder and decoder alone: {why}"]
    halves = config.loss.adversarial is not None
    capture(tokenizer, halves, backend)
    cut = ", in two before the decoder, where the discriminator's loss is weighed" if halves else ""
    return [f"CUDA graphs: the whole tokenizer, forward and backward{cut}"]


def apart(config: TokenizerRun, tokenizer: Tokenizer, mesh: Mesh) -> str | None:
    """Why encoder and decoder are captured alone, and not what is between them; None where all is."""
    if mesh.world.size > 1:
        return f"{mesh.world.size} processes talk to each other between them"
    if "encoder" not in (config.trained or TOKENIZER_PARTS):
        return "nothing goes back through the encoder, and ids may be others than those of the images"
    if config.data.val is not None and len(config.data.val.shapes) > 1:
        return f"data.val.buckets are {len(config.data.val.shapes)}, and evaluation would be a graph for each"
    return tokenizer.quantizer.breaks_graph


def compile_nets(tokenizer: Tokenizer, graphs: bool = False, backend: Backend = "inductor") -> None:
    """Compile encoder and decoder; with `graphs` their passes are captured, each for the shape of its first samples."""
    _as_not_compiled()
    captured = CAPTURED if graphs else {}
    tokenizer.encoder.compile(backend=backend, **captured)
    tokenizer.decoder.compile(backend=backend, **captured)


def capture(tokenizer: Tokenizer, halves: bool, backend: Backend = "inductor") -> None:
    """Compile and capture the forward pass of a tokenizer, in one or in two graphs. An error where it is more."""
    _as_not_compiled()

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, backend=backend, **CAPTURED)

    whole, parts = compiled(tokenizer.forward), tokenizer.forward
    if halves:
        vars(tokenizer).update(quantize=compiled(tokenizer.quantize), restore=compiled(tokenizer.restore))

    def forward(*args: Any) -> Any:
        tokenizer.quantizer.note()
        if tokenizer.training:
            return (parts if halves else whole)(*args)
        # Without a backward pass to come the second of two graphs would write over what the first has returned; and
        # statistics, which nobody reads of an evaluation, say where in its beginning the training is.
        with tally.silent():
            return whole(*args)

    vars(tokenizer).update(forward=forward)


def _as_not_compiled() -> None:
    """Backward passes as they are without a compiler."""
    from torch._functorch import config as functorch

    # By default a compiled backward pass writes over what it needs, and the adaptive weight asks for two.
    functorch.donated_buffer = False
    # By default it is in the autocast that its forward pass began in, and would round what is not to be (quant_conv).
    functorch.backward_pass_autocast = "off"
