"""What of a model is trained, and what stands still (trained of a run): no gradients and no moments, at every stage of
every engine, and nothing else that a training moves. It is saved all the same, and is what it was to the bit.
"""

from __future__ import annotations

from torch import nn

from vqscale.engine import optimisers
from vqscale.priors.base import Prior
from vqscale.quantizers.base import Quantizer
from vqscale.tokenizer.export import entries
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.config import Run
from vqscale.train.config.first_weights import PRIOR_PARTS, TOKENIZER_PARTS

Model = Tokenizer | Prior


def frozen_parts(config: Run) -> list[str]:
    """The parts of the model that stand still."""
    every = TOKENIZER_PARTS if config.task == "tokenizer" else PRIOR_PARTS
    return [part for part in every if config.trained is not None and part not in config.trained]


def part_of(model: Model, name: str) -> str:
    """The part that a tensor is of."""
    first = name.partition(".")[0]
    return next((part for part, names in model.parts.items() if first in names), "network")


def freeze(config: Run, model: Model) -> None:
    """Let what is not trained stand still: no gradients, and nothing that a training moves. Before tables are set
    aside."""
    frozen, taken = frozen_parts(config), () if config.init is None else config.init.parts
    for part in frozen:
        for name in model.parts[part]:
            piece = getattr(model, name, None)
            if isinstance(piece, Quantizer):
                piece.freeze()
            elif piece is not None:
                piece.requires_grad_(False)
            if isinstance(piece, nn.Module) and part in ("encoder", "decoder", "network"):
                piece.eval()  # what is not trained drops nothing out
    if isinstance(model, Tokenizer) and "encoder" in frozen and "codes" in taken:
        model.quantizer.freeze_frame()


def frozen_line(config: Run) -> list[str]:
    """What to say of a run of which some is frozen."""
    frozen = frozen_parts(config)
    return [f"frozen: {', '.join(frozen)}; trained: {', '.join(config.trained or ())}"] if frozen else []


def check_learns(config: Run, model: Model) -> None:
    """ValueError where nothing learns, or where the engine or learning rates are about what does not."""
    learns = [name for name, entry in entries(model).items() if entry.tensor.requires_grad]
    if not learns:
        raise ValueError(
            f"trained is {list(config.trained or ())}, and no parameter of these parts learns by gradients, so that "
            "everything is frozen: train another part too"
        )
    dense = [name for name in learns if entries(model)[name].table is None]
    if not dense and config.engine.name == "deepspeed":
        raise ValueError(
            f"trained is {list(config.trained or ())}, which is rows of codes alone, and engine.name deepspeed steps "
            "what is beside them: use engine.name=torch, or train another part too"
        )
    optimisers.lr_factors(model, config.optim)
