"""State dictionaries of VQGANs by other projects, under the names that taming-transformers gave the same layers, and
with numbers in the order that they have here. Messages about what is wrong with one then use these names.

A name that no rule knows stays as it is, and is unknown to whoever compares names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import functional as F

from vqscale.tokenizer.family import State, numbers

ROWS = "quantize.embedding.weight"
USED = "quantize.codebook_used"  # LlamaGen's window of ids
MIDDLE = ("block_1", "attn_1", "block_2")

TAMING = re.compile(r"(encoder\.down|decoder\.up|(encoder|decoder)\.mid\.(block|attn)_\d)\.")
Rules = Mapping[str, str | Callable[[re.Match[str]], str]]

LLAMAGEN: Rules = {
    r"^(encoder|decoder)\.mid\.([012])\.": lambda found: f"{found[1]}.mid.{MIDDLE[int(found[2])]}.",
    r"^((?:encoder\.down|decoder\.up)\.\d+)\.res\.": r"\1.block.",
}
DIFFUSERS: Rules = {
    r"^(encoder|decoder)\.mid_block\.resnets\.([01])\.": lambda found: f"{found[1]}.mid.block_{int(found[2]) + 1}.",
    r"^(encoder|decoder)\.mid_block\.attentions\.0\.": r"\1.mid.attn_1.",
    r"^(encoder|decoder)\.conv_norm_out\.": r"\1.norm_out.",
    r"\.resnets\.(\d+)\.": r".block.\1.",
    r"\.attentions\.(\d+)\.": r".attn.\1.",
    r"\.(down|up)samplers\.0\.": r".\1sample.",
    r"\.conv_shortcut\.": ".nin_shortcut.",
    r"\.group_norm\.": ".norm.",
    r"\.to_([qkv])\.": r".\1.",
    r"\.to_out\.0\.": ".proj_out.",
    r"\.([qkv])(?:uery|ey|alue)\.": r".\1.",  # of older files, as the next
    r"\.proj_attn\.": ".proj_out.",
}
PROJECTION = re.compile(r".*\.(?:attn\.\d+|attn_1)\.(?:q|k|v|proj_out)\.weight")


def of_llamagen(state: State) -> State:
    """LlamaGen's, with rows of length one, as it uses them, and without what it counts."""
    found = _renamed(state, LLAMAGEN, r"encoder\.conv_blocks", r"decoder\.conv_blocks")
    found.pop(USED, None)
    if ROWS in found and found[ROWS].ndim == 2:
        found[ROWS] = F.normalize(found[ROWS].float(), dim=1)
    return found


def of_diffusers(state: State) -> State:
    """VQModel's; projections of attention are convolutions of one pixel."""
    found = _renamed(state, DIFFUSERS, r"encoder\.down_blocks", r"decoder\.up_blocks")
    return {name: x[..., None, None] if PROJECTION.fullmatch(name) else x for name, x in found.items()}


def _renamed(state: State, rules: Rules, down: str, up: str) -> dict[str, Tensor]:
    """`down` and `up` are the lists of levels; a decoder's begins with the coarsest there, and ends with it here."""
    last = len(numbers(state, rf"{up}\.(\d+)\.")) - 1
    found = {}
    for name, x in state.items():
        if TAMING.match(name):  # it would pass for one of these, and be read in another way
            raise ValueError(
                f"{name} is how taming-transformers and IBQ call a layer: these are other weights; give --from taming, "
                "or the family whose checkpoint it is"
            )
        new = re.sub(rf"^{down}\.", "encoder.down.", name)
        new = re.sub(rf"^{up}\.(\d+)\.", lambda level: f"decoder.up.{last - int(level[1])}.", new)
        for theirs, ours in rules.items():
            new = re.sub(theirs, ours, new)
        if new in found:
            raise ValueError(f"two tensors of the file are {new}, one of them as {name}: these are other weights")
        found[new] = x
    return found


# Open-MAGVIT2: what has channels of latents, and in which dim.
BITS = {r"encoder\.conv_out\.(weight|bias)": 0, r"decoder\.conv_in\.weight": 1}
BITS |= {r"decoder\.adaptive\.\d+\.(gamma|beta)\.weight": 1}


def first_bit_first(state: State) -> State:
    """Its first channel is the lowest bit of an id, and here the highest: channels of latents in reverse, in averages
    too, whose names have no dots."""
    names = {pattern.replace(r"\.", r"\.?"): dim for pattern, dim in BITS.items()}
    return {
        name: x.flip(dim) if (dim := _dim(name, names)) is not None and x.ndim > dim else x for name, x in state.items()
    }


def _dim(name: str, names: Mapping[str, int]) -> int | None:
    plain = name.removeprefix("model_ema.")
    return next((dim for pattern, dim in names.items() if re.fullmatch(pattern, plain)), None)
