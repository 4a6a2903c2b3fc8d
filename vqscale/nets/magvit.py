"""The convolutional encoder and decoder of the published SimVQ and Open-MAGVIT2 tokenizers, with the names of their
checkpoints; Open-MAGVIT2's decoder (`adaptive`) has a norm before each level that sees the codes.

Like conv.py a pyramid of residual blocks with group normalisation and swish, and different in every detail: blocks and
the encoder's first convolution have no biases, the middle is a list of blocks without attention, strided convolutions
pad all sides, sides are doubled by a convolution to four times the channels and depth-to-space, the encoder ends in a
1x1 convolution, the decoder has as many blocks as the encoder, and no convolution stands next to the quantizer.

Depth-to-space takes the two steps of a pixel from the outer part of the channels (channel (2 i + j) C + c becomes
channel c at row i, column j), where torch's pixel_shuffle takes them from the inner one.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vqscale.nets import Parts
from vqscale.nets.config import MagvitConfig
from vqscale.nets.conv import Recomputed


def build(config: MagvitConfig, dim: int) -> Parts:
    """Encoder and decoder around a quantizer of `dim`, which must be config.z_channels."""
    if dim != config.z_channels:
        raise ValueError(
            f"net.z_channels is {config.z_channels} and the quantizer's dim is {dim}, but the net magvit has no "
            "convolution between them: give both the same number, or use the net conv"
        )
    return Parts(Encoder(config), nn.Identity(), nn.Identity(), Decoder(config), "conv_out.weight")


def _norm(channels: int, config: MagvitConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.num_groups, channels, eps=1e-6)


class Residual(nn.Module):
    """(B, channels, H, W) -> (B, out_channels, H, W): two convolutions without biases, plus the input."""

    def __init__(self, channels: int, out_channels: int, config: MagvitConfig) -> None:
        super().__init__()
        self.norm1 = _norm(channels, config)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = _norm(out_channels, config)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(channels, out_channels, 1, bias=False) if channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2 H, 2 W): a 3x3 convolution to 4 C channels, which become pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        inner_last = self.conv1(x).unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)
        return F.pixel_shuffle(inner_last, 2)


class Level(Recomputed):
    """The blocks of one level, then the step to the next side, if any."""

    def __init__(self, channels: int, out_channels: int, config: MagvitConfig) -> None:
        super().__init__(config)
        self.block = _blocks(channels, out_channels, config)
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = self.run(block, x)
        for resize in (self.downsample, self.upsample):
            if resize is not None:
                x = resize(x)
        return x


def _blocks(channels: int, out_channels: int, config: MagvitConfig) -> nn.ModuleList:
    first = [Residual(channels, out_channels, config)]
    return nn.ModuleList(first + [Residual(out_channels, out_channels, config) for _ in range(config.num_blocks - 1)])


class Encoder(Recomputed):
    """Images (B, in_channels, H, W) -> latents (B, z_channels, h, w), one for config.strides pixels of each side."""

    def __init__(self, config: MagvitConfig) -> None:
        super().__init__(config)
        widths = config.widths
        self.conv_in = nn.Conv2d(config.in_channels, config.channels, 3, padding=1, bias=False)
        channels = config.channels
        levels: list[Level] = []
        for width in widths:
            levels.append(Level(channels, width, config))
            if len(levels) < len(widths):
                levels[-1].downsample = nn.Conv2d(width, width, 3, stride=2, padding=1)
            channels = width
        self.down = nn.ModuleList(levels)
        self.mid_block = _blocks(channels, channels, config)
        self.norm_out = _norm(channels, config)
        self.conv_out = nn.Conv2d(channels, config.z_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
        for block in self.mid_block:
            x = self.run(block, x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AdaptiveNorm(nn.Module):
    """Group normalisation of x (B, channels, H, W), its scale a linear map of the deviation of the latents z
    (B, z_channels, h, w) over the places of an image, its shift one of their mean."""

    def __init__(self, channels: int, config: MagvitConfig) -> None:
        super().__init__()
        self.num_groups = config.num_groups
        self.gamma = nn.Linear(config.z_channels, channels)
        self.beta = nn.Linear(config.z_channels, channels)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        z_BCn = z.flatten(2)
        variance = z_BCn.var(2, correction=min(1, z_BCn.shape[2] - 1))  # of one place: 0
        scale, shift = self.gamma((variance + 1e-6).sqrt()), self.beta(z_BCn.mean(2))
        return scale[:, :, None, None] * F.group_norm(x, self.num_groups, eps=1e-6) + shift[:, :, None, None]


class Decoder(Recomputed):
    """Latents (B, z_channels, h, w) -> images (B, in_channels, H, W), config.strides pixels for each; not clamped."""

    def __init__(self, config: MagvitConfig) -> None:
        super().__init__(config)
        widths = config.widths
        channels = widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid_block = _blocks(channels, channels, config)
        levels: list[Level] = []
        norms: list[AdaptiveNorm] = []
        for level in reversed(range(len(widths))):
            if config.adaptive:
                norms.insert(0, AdaptiveNorm(channels, config))
            levels.insert(0, Level(channels, widths[level], config))
            channels = widths[level]
            if level > 0:
                levels[0].upsample = Upsample(channels)
        self.up = nn.ModuleList(levels)  # numbered by level, so the last one runs first
        self.adaptive = nn.ModuleList(norms) if config.adaptive else None
        self.norm_out = _norm(channels, config)
        self.conv_out = nn.Conv2d(channels, config.in_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.conv_in(latents)
        for block in self.mid_block:
            x = self.run(block, x)
        for number, level in reversed([*enumerate(self.up)]):
            if self.adaptive is not None:
                x = self.adaptive[number](x, latents)
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
