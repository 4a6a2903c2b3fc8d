"""The learned vectors of the places of a grid, and of what is masked there. Rotary embeddings tell of two tokens only
where they lie to each other, so a network that sees all tokens at once wants to be told where each lies.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqscale.nets.config.transformer import TransformerConfig


class Places(nn.Module):
    """Adds to the vector of each token that of its place, and where it is masked that of the mask."""

    grid_parameters = ("table",)  # a row for each place: resized where weights begin another grid

    def __init__(self, num_tokens: int, net: TransformerConfig, *, masks: bool = False) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.empty(net.width).normal_(0.0, net.init_scale)) if masks else None
        self.table = nn.Parameter(torch.empty(num_tokens, net.width).normal_(0.0, net.init_scale))

    def forward(self, x_BTD: Tensor, masked_BT: Tensor | None = None) -> Tensor:
        x_BTD = x_BTD + self.table
        if self.mask is None or masked_BT is None:
            return x_BTD
        return x_BTD + torch.where(masked_BT[..., None], self.mask, 0.0)
