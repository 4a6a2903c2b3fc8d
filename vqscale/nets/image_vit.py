"""Vision transformers as encoder and decoder of images, without a context: the blocks are those of vit.py.

    x = E(patches) + positions;  Enc(x), a vector for each patch, which is a token
    y = z + positions;  Dec(y), a dense map of each vector to the pixels of its patch

Positions that are sines are of no size: such a net takes images of any sides that its patch divides, of several shapes
in one training, and other ones later. Learned ones are of one grid, and belong to it (vit.py: Blocks). The map to
pixels begins LeCun normal, not at zero, so that the encoder has a gradient from the first step on.

Not here: the quantizer between them, and what is asked of the pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqscale.matmul import Linear
from vqscale.nets import Parts
from vqscale.nets.config.image_vit import ImageVitConfig
from vqscale.nets.vit import Blocks, dense, lecun_normal_


def build(config: ImageVitConfig, dim: int) -> Parts:
    """Encoder and decoder, and the dense maps between their tokens and a quantizer of `dim`."""
    return Parts(Encoder(config), dense(config.width, dim), dense(dim, config.width), Decoder(config), "pixels.weight")


class Encoder(nn.Module):
    """Images (B, C, H, W) -> (B, width, H / patch, W / patch)."""

    def __init__(self, config: ImageVitConfig) -> None:
        super().__init__()
        self.patches = dense(config.in_channels, config.width, config.patch)
        self.blocks = _blocks(config, config.encoder_layers)

    def forward(self, images: Tensor) -> Tensor:
        return _through(self.blocks, self.patches(images))


class Decoder(nn.Module):
    """(B, width, h, w) -> images (B, C, h patch, w patch)."""

    def __init__(self, config: ImageVitConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.blocks = _blocks(config, config.decoder_layers)
        self.pixels = Linear(config.width, config.in_channels * config.patch**2)
        lecun_normal_(self.pixels.weight, config.width)
        nn.init.zeros_(self.pixels.bias)

    def forward(self, latents: Tensor) -> Tensor:
        out: Tensor = self.pixels(_through(self.blocks, latents).movedim(1, -1))
        return F.pixel_shuffle(out.movedim(-1, 1), self.patch)


def _blocks(config: ImageVitConfig, num_layers: int) -> Blocks:
    sizes = (config.width, config.num_heads, config.mlp_width)
    return Blocks(config.num_places, num_layers, *sizes, checkpointing=config.checkpointing)


def _through(blocks: Blocks, x_BDhw: Tensor) -> Tensor:
    """The blocks over all places, row by row."""
    height, width = x_BDhw.shape[2:]
    x_BTD = x_BDhw.flatten(2).transpose(1, 2)
    if blocks.positions is None:
        x_BTD = x_BTD + sines(height, width, x_BTD.shape[-1], x_BTD.device)
    out: Tensor = blocks(x_BTD)
    return out.transpose(1, 2).unflatten(2, (height, width))


def sines(height: int, width: int, numbers: int, device: torch.device) -> Tensor:
    """(height * width, numbers) in float32: sines and cosines of the row at a quarter as many wavelengths, from 2 pi
    patches to 10,000 times that, then of the column."""
    slow = 10_000 ** -(torch.arange(numbers // 4, device=device, dtype=torch.float32) / (numbers // 4))
    rows_hq, columns_wq = (torch.arange(side, device=device)[:, None] * slow for side in (height, width))
    at_row, at_column = (torch.cat([at.sin(), at.cos()], 1) for at in (rows_hq, columns_wq))
    spread = (height, width, numbers // 2)
    return torch.cat([at_row[:, None].expand(spread), at_column[None].expand(spread)], -1).flatten(0, 1)
