"""The convolutional encoder and decoder of the VQGAN family, with the parameter names of the published checkpoints.

A pyramid of residual blocks with group normalisation and swish, single-head attention at coarse levels, strided
convolutions down and nearest neighbours up. With the default config a published IBQ state dictionary loads key by key.
Not here: the quantizer, and averages of weights.

The network of the published SimVQ checkpoints is another one, in magvit.py.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vqscale.nets import Parts
from vqscale.nets.config import ConvConfig, MagvitConfig
from vqscale.nets.waves.config import WaveConfig

Convolution = type[nn.Conv1d] | type[nn.Conv2d]


def build(config: ConvConfig, dim: int) -> Parts:
    """Encoder and decoder, and the 1x1 convolutions between their latents and a quantizer of `dim`."""
    encoder, quant_conv = Encoder(config), nn.Conv2d(config.z_channels, dim, 1)
    post_quant_conv = nn.Conv2d(dim, config.z_channels, 1)
    return Parts(encoder, quant_conv, post_quant_conv, Decoder(config), "conv_out.weight")


def _norm(channels: int, config: ConvConfig | WaveConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.num_groups, channels, eps=1e-6)


class Residual(nn.Module):
    """(B, channels, *sides) -> (B, out_channels, *sides): two convolutions, plus the input (1x1 where channels change).

    `conv` is torch's convolution over as many sides as there are: nn.Conv2d of images, nn.Conv1d of waves.
    """

    def __init__(
        self, channels: int, out_channels: int, config: ConvConfig | WaveConfig, conv: Convolution = nn.Conv2d
    ) -> None:
        super().__init__()
        self.norm1 = _norm(channels, config)
        self.conv1 = conv(channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = conv(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(nn.Module):
    """(B, C, *sides) -> the same: each position attends to its whole sample, one head of C channels, plus the input."""

    def __init__(self, channels: int, config: ConvConfig | WaveConfig, conv: Convolution = nn.Conv2d) -> None:
        super().__init__()
        self.norm = _norm(channels, config)
        self.q = conv(channels, channels, 1)
        self.k = conv(channels, channels, 1)
        self.v = conv(channels, channels, 1)
        self.proj_out = conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (project(normed).flatten(2).transpose(1, 2).unsqueeze(1) for project in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)  # scaled by channels ** -0.5, torch's default for one head
        return x + self.proj_out(mixed.squeeze(1).transpose(1, 2).reshape_as(x))


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H // 2, W // 2). Padded right and below only, as published weights expect."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2 H, 2 W): nearest neighbours, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Recomputed(nn.Module):
    """Base of what runs blocks: with config.checkpointing their activations are computed again in the backward pass."""

    def __init__(self, config: ConvConfig | MagvitConfig) -> None:
        super().__init__()
        self.checkpointing = config.checkpointing

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)


class Level(Recomputed):
    """The blocks of one level, each followed by attention if asked for, then the step to the next side, if any."""

    def __init__(self, level: int, channels: int, num_blocks: int, config: ConvConfig) -> None:
        super().__init__(config)
        width = config.widths[level]
        inputs = [channels] + [width] * (num_blocks - 1)
        self.block = nn.ModuleList(Residual(c, width, config) for c in inputs)
        attentions = num_blocks if level in config.attention_levels else 0
        self.attn = nn.ModuleList(Attention(width, config) for _ in range(attentions))
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = self.run(block, x)
            if self.attn:
                x = self.run(self.attn[index], x)
        for resize in (self.downsample, self.upsample):
            if resize is not None:
                x = resize(x)
        return x


class Middle(Recomputed):
    """Residual block, attention, residual block at the coarsest level."""

    def __init__(self, channels: int, config: ConvConfig) -> None:
        super().__init__(config)
        self.block_1 = Residual(channels, channels, config)
        self.attn_1 = Attention(channels, config) if config.mid_attention else None
        self.block_2 = Residual(channels, channels, config)

    def forward(self, x: Tensor) -> Tensor:
        x = self.run(self.block_1, x)
        if self.attn_1 is not None:
            x = self.run(self.attn_1, x)
        return self.run(self.block_2, x)


class Encoder(nn.Module):
    """Images (B, in_channels, H, W) -> latents (B, z_channels, h, w), one for config.strides pixels of each side."""

    def __init__(self, config: ConvConfig) -> None:
        super().__init__()
        widths = config.widths
        self.patch = config.patch
        self.conv_in = nn.Conv2d(config.in_channels * config.patch**2, config.channels, 3, padding=1)
        channels = config.channels
        levels: list[Level] = []
        for level, width in enumerate(widths):
            levels.append(Level(level, channels, config.num_blocks, config))
            if level < len(widths) - 1:
                levels[-1].downsample = Downsample(width)
            channels = width
        self.down = nn.ModuleList(levels)
        self.mid = Middle(channels, config)
        self.norm_out = _norm(channels, config)
        self.conv_out = nn.Conv2d(channels, config.z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(images, self.patch) if self.patch > 1 else images)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents (B, z_channels, h, w) -> images (B, in_channels, H, W), config.strides pixels for each; not clamped."""

    def __init__(self, config: ConvConfig) -> None:
        super().__init__()
        widths = config.widths
        channels = widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = Middle(channels, config)
        levels: list[Level] = []
        for level in reversed(range(len(widths))):
            levels.insert(0, Level(level, channels, config.num_blocks + 1, config))
            channels = widths[level]
            if level > 0:
                levels[0].upsample = Upsample(channels)
        self.up = nn.ModuleList(levels)  # numbered by level, so the last one runs first
        self.norm_out = _norm(channels, config)
        self.patch = config.patch
        self.conv_out = nn.Conv2d(channels, config.in_channels * config.patch**2, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = level(x)
        images = self.conv_out(F.silu(self.norm_out(x)))
        return F.pixel_shuffle(images, self.patch) if self.patch > 1 else images
