"""State dictionaries of EnCodec under the names of its own package: those have them already, and those of transformers'
EncodecModel, of which newer ones name the two parts of a normed weight by torch's parametrizations.

A name that no rule knows stays as it is, and is unknown to whoever compares names.
"""

from __future__ import annotations

import re

from torch import Tensor

from vqscale.tokenizer.family import State, numbers

LEVEL = r"quantizer\.vq\.layers\.(\d+)\._codebook\."
ROWS = "quantizer.vq.layers.0._codebook.embed"
COUNTED = re.compile(LEVEL + "(inited|cluster_size|embed_avg)")  # the state of its training
RULES = {
    r"^quantizer\.layers\.(\d+)\.codebook\.": r"quantizer.vq.layers.\1._codebook.",
    r"^((?:encoder|decoder)\.layers\..*)\.conv\.": r"\1.conv.conv.",
    r"^(encoder|decoder)\.layers\.": r"\1.model.",
    r"\.parametrizations\.weight\.original0$": ".weight_g",
    r"\.parametrizations\.weight\.original1$": ".weight_v",
}


def plain(state: State) -> State:
    """Its weights under the names of its own package."""
    last = max(numbers(state, r"decoder\.layers\.(\d+)\."), default=0)
    found: dict[str, Tensor] = {}
    for name, x in state.items():
        new = _own(name, last)
        if new in found:
            raise ValueError(f"two tensors of the file are {new}, one of them as {name}: these are other weights")
        if not COUNTED.fullmatch(new):
            found[new] = x
    return found


def _own(name: str, last: int) -> str:
    """Of transformers' decoder all convolutions between the first layer and the last are transposed, outside blocks."""
    new = name
    for theirs, own in RULES.items():
        new = re.sub(theirs, own, new)
    layer = re.match(r"decoder\.layers\.(\d+)\.conv\.", name)
    return new.replace(".conv.conv.", ".convtr.convtr.") if layer and 0 < int(layer[1]) < last else new
