"""The vision transformers of UViM (2205.10337): encoder and decoder of its stage 1, to the published parameters,
and the image encoder of its stage 2.

    x = E(patches of the labels, one-hot) + S(patches of the context);  Enc(x + positions), shrunk to the grid of ids
    y = z, enlarged to the grid of patches, + S'(patches of the context);  Dec(y + positions), a dense map per output

The context enters each side once, through maps that share nothing. Blocks are pre-norm with biases, GELU in the form of
tanh; not those of transformer.py, which are LlamaGen's. First values as published: LeCun normal for maps between
patches and tokens, Xavier uniform inside blocks, zero for the last map, so that all classes begin alike.

A dense map of a one-hot patch is a sum of rows, one per pixel: no one-hot tensor is made (a patch of 16 x 16 pixels and
256 classes has 65,536 numbers). A class number that is none of a channel's is the one-hot vector of zeros.

Not here: the quantizer between them, code dropout, what is asked of the outputs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vqscale.matmul import Linear
from vqscale.nets import Parts
from vqscale.nets.config.vit import ImageEncoderConfig, VitConfig
from vqscale.nets.transformer import at_least_float32

NORM_EPS = 1e-6


def build(config: VitConfig, dim: int) -> Parts:
    """Encoder and decoder, and the dense maps between their tokens and a quantizer of `dim`."""
    last = f"heads.{len(list(config.groups())) - 1}.weight"
    return Parts(Encoder(config), dense(config.width, dim), dense(dim, config.width), Decoder(config), last)


def dense(channels: int, width: int, patch: int = 1) -> nn.Conv2d:
    """A dense map of the patches of an image, by default of every place."""
    layer = nn.Conv2d(channels, width, patch, stride=patch)
    lecun_normal_(layer.weight, channels * patch**2)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


@torch.no_grad()
def lecun_normal_(weight: Tensor, fan_in: int) -> None:
    """Normal of variance 1 / fan_in, cut at twice its deviation before it is scaled to that."""
    scale = fan_in**-0.5 / 0.87962566103423978  # the deviation of a standard normal cut at 2
    nn.init.trunc_normal_(weight, std=scale, a=-2 * scale, b=2 * scale)


class Block(nn.Module):
    """x + attention(norm x), every token to all, then x + mlp(norm x); gelu: its form of tanh, or (none) the exact."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, gelu: Literal["tanh", "none"] = "tanh") -> None:
        super().__init__()
        self.num_heads, self.gelu = num_heads, gelu
        self.norm_attention, self.norm_mlp = (nn.LayerNorm(width, eps=NORM_EPS) for _ in range(2))
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.up, self.down = Linear(width, mlp_width), Linear(mlp_width, width)
        for weight in (*self.qkv.weight.chunk(3), self.out.weight, self.up.weight, self.down.weight):
            nn.init.xavier_uniform_(weight)
        for bias, scale in ((self.qkv.bias, 0.0), (self.out.bias, 0.0), (self.up.bias, 1e-6), (self.down.bias, 1e-6)):
            nn.init.normal_(bias, 0.0, scale)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_attention(x_BTD)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y_BSTd = F.scaled_dot_product_attention(q, k, v)
        x_BTD = x_BTD + self.out(y_BSTd.transpose(1, 2).flatten(2))
        return x_BTD + self.down(F.gelu(self.up(self.norm_mlp(x_BTD)), approximate=self.gelu))


class Blocks(nn.Module):
    """Tokens (B, T, D) through blocks and a last norm; with learned positions, or (num_tokens 0) as they are given."""

    grid_parameters = ("positions",)  # a row for each place: resized where weights begin another grid

    def __init__(
        self, num_tokens: int, num_layers: int, width: int, num_heads: int, mlp_width: int, checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.positions: nn.Parameter | None = None
        if num_tokens:
            self.positions = nn.Parameter(torch.empty(num_tokens, width).normal_(0.0, width**-0.5))
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_width) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = at_least_float32(x_BTD)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions
        for block in self.blocks:
            recompute = self.checkpointing and self.training
            x_BTD = checkpoint(block, x_BTD, use_reentrant=False) if recompute else block(x_BTD)
        return self.norm(x_BTD)


class ValuePatches(nn.Module):
    """Values (B, C, H, W), an image or a context -> tokens (B, T, D): a dense map of each patch, row by row."""

    def __init__(self, channels: int, image_size: int, patch: int, width: int) -> None:
        super().__init__()
        self.shape = (channels, image_size, image_size)
        self.dense = dense(channels, width, patch)

    def forward(self, values: Tensor) -> Tensor:
        if values.shape[1:] != self.shape:
            raise ValueError(
                f"a vision transformer for images of {' x '.join(map(str, self.shape))} numbers (channels, image_size, "
                f"in its config) was given {list(values.shape)}: give it B such images, or build one for others"
            )
        tokens_BTD: Tensor = self.dense(values).flatten(2).transpose(1, 2)
        return tokens_BTD


class ClassPatches(nn.Module):
    """Class numbers (B, 1, H, W) -> tokens (B, T, D): the dense map of one-hot patches as a sum of its rows.

    Row c p^2 + i p + j of the weight is that of class c at pixel (i, j) of a patch of p x p.
    """

    def __init__(self, num_classes: int, patch: int, width: int) -> None:
        super().__init__()
        self.num_classes, self.patch = num_classes, patch
        self.weight = nn.Parameter(torch.empty(num_classes * patch**2, width))
        self.bias = nn.Parameter(torch.zeros(width))
        lecun_normal_(self.weight, num_classes * patch**2)

    def forward(self, classes: Tensor) -> Tensor:
        class_NP = F.pixel_unshuffle(classes, self.patch).flatten(2).transpose(1, 2).flatten(0, 1).to(torch.int64)
        known_NP = (class_NP >= 0) & (class_NP < self.num_classes)
        pixel_P = torch.arange(self.patch**2, device=classes.device)
        row_NP = torch.where(known_NP, class_NP * self.patch**2 + pixel_P, 0)
        sum_ND = F.embedding_bag(row_NP, self.weight, mode="sum", per_sample_weights=known_NP.to(self.weight.dtype))
        return (sum_ND + self.bias).unflatten(0, (len(classes), -1))


class ImageEncoder(nn.Module):
    """An image (B, C, H, W) -> vectors (B, T / pool^2, D): a vision transformer; each is the mean of pool^2 tokens."""

    def __init__(self, config: ImageEncoderConfig) -> None:
        super().__init__()
        self.side, self.pool = config.image_size // config.patch, config.pool
        self.patches = ValuePatches(config.channels, config.image_size, config.patch, config.width)
        sizes = (config.width, config.num_heads, config.mlp_width)
        self.blocks = Blocks(self.side**2, config.num_layers, *sizes, checkpointing=config.checkpointing)

    def forward(self, images: Tensor) -> Tensor:
        x_BTD: Tensor = self.blocks(self.patches(images))
        if self.pool == 1:
            return x_BTD
        return F.avg_pool2d(_on_grid(x_BTD, self.side), self.pool).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """Labels (B, channels, H, W) and a context -> (B, width, *grid), one vector for each id."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.channels = [channels for channels, _ in config.groups()]
        self.labels = nn.ModuleList(_patches(config, channels, classes) for channels, classes in config.groups())
        self.context = _patches(config, config.context_channels, 1)
        self.blocks = _blocks(config, config.encoder_layers)

    def forward(self, labels: Tensor, context: Tensor) -> Tensor:
        x_BTD = self.context(context)
        for patches, channels in zip(self.labels, labels.split(self.channels, 1), strict=True):
            x_BTD = x_BTD + patches(channels)
        return resized(_on_grid(self.blocks(x_BTD), self.config.side), self.config.side // self.config.bottleneck)


class Decoder(nn.Module):
    """(B, width, *grid) and a context -> (B, sum of labels, H, W): logits of classes, and values."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.context = _patches(config, config.context_channels, 1)
        self.blocks = _blocks(config, config.decoder_layers)
        pixels = config.patch**2
        outputs = [channels * classes * pixels for channels, classes in config.groups()]
        self.heads = nn.ModuleList(Linear(config.width, numbers) for numbers in outputs)
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        x_BTD = resized(latents, self.config.side).flatten(2).transpose(1, 2) + self.context(context)
        x_BTD = self.blocks(x_BTD)
        out = torch.cat([head(x_BTD) for head in self.heads], -1)
        return F.pixel_shuffle(_on_grid(out, self.config.side), self.config.patch)


def resized(x_BDhw: Tensor, side: int) -> Tensor:
    """x on a grid of another side, linearly; where it shrinks, all of what lies under a place counts (antialias)."""
    if x_BDhw.shape[-1] == side:
        return x_BDhw
    return F.interpolate(at_least_float32(x_BDhw), size=(side, side), mode="bilinear", antialias=True)


def _on_grid(x_BTD: Tensor, side: int) -> Tensor:
    return x_BTD.transpose(1, 2).unflatten(2, (side, side))


def _patches(config: VitConfig, channels: int, classes: int) -> nn.Module:
    if classes > 1:
        return ClassPatches(classes, config.patch, config.width)
    return ValuePatches(channels, config.image_size, config.patch, config.width)


def _blocks(config: VitConfig, num_layers: int) -> Blocks:
    sizes = (config.width, config.num_heads, config.mlp_width)
    return Blocks(config.side**2, num_layers, *sizes, checkpointing=config.checkpointing)
