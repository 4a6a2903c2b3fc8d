"""What a decoder is trained on that learns to do with ids that are not quite those of its images (swaps of a run)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vqscale.codes.swaps import Swaps, random_shares
from vqscale.parallel.mesh import Mesh
from vqscale.quantizers.base import Quantized
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.config.swaps import SwapsConfig


def inputs(tokenizer: Tokenizer, config: SwapsConfig, mesh: Mesh) -> Callable[[Quantized, Tensor | None], Tensor]:
    """(answer of the quantizer, keys of images) -> what the decoder is given: codes of ids with a share swapped.

    Codes have to be frozen: no gradient passes, and their neighbours are found once, in the first call, when a run that
    goes on has its codes. Collective on the code axis.
    """
    quantizer, found = tokenizer.quantizer, list[Swaps]()

    @torch.no_grad()
    def given(quantized: Quantized, keys_B: Tensor | None) -> Tensor:
        assert keys_B is not None, "a training gives the keys of its images"
        if not found:
            found.append(Swaps.among_neighbours(quantizer.decode, quantizer.num_codes, config.neighbours, mesh))
        ids_BT = quantized.ids.view(len(keys_B), -1)
        return quantizer.decode(found[0](ids_BT, keys_B, random_shares(keys_B, config.share)).flatten())

    return given
