"""Which parameters lose nothing by being sent in bfloat16: those that autocast rounds to it wherever they are used.

Under autocast a linear layer and a convolution round weight and bias at every call, so what a rank computes is the
same, to the bit, when they arrive rounded. All else is sent as it is: norms, tables, gains and directions of weights
that are normalised, and what a module names in `unrounded`, the parts that it runs without autocast.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from vqscale.engine.config import EngineConfig
from vqscale.matmul import Linear

KEPT_BELOW = 100_000  # numbers: smaller parameters DeepSpeed's stage 3 keeps whole, and gathers as they are
LAYERS = (
    *(nn.Linear, Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def rounded(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that belong to such layers alone, and to no part that runs without autocast."""
    others = {id(p) for p in _others(module)}
    found = {id(p): p for part in module.modules() if type(part) in LAYERS for p in part.parameters(recurse=False)}
    return [p for key, p in found.items() if key not in others]


def num_rounded(module: nn.Module, engine: EngineConfig) -> int:
    """How many numbers of those that learn a gather has in bfloat16."""
    low = [p.numel() for p in rounded(module) if p.requires_grad] if engine.sends_bf16 else []
    return sum(n for n in low if engine.zero_stage < 3 or n > KEPT_BELOW)


def _others(module: nn.Module) -> Iterator[nn.Parameter]:
    for part in module.modules():
        for name in getattr(part, "unrounded", ()):
            yield from getattr(part, name).parameters()
        if type(part) not in LAYERS:
            yield from part.parameters(recurse=False)
