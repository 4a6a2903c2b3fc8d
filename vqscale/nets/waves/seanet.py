"""SEANet's encoder and decoder of waves, as EnCodec has them: strided convolutions with residual blocks, an LSTM over
the frames; the decoder mirrors the encoder.

With the default config a state dictionary of the published SimVQ tokenizers of speech fits the encoder name by name,
EnCodec's both, but for the second `conv` or `convtr` that every name of a convolution has there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqscale.nets.waves.config import WaveConfig
from vqscale.nets.waves.weight_norm import NormedConv, NormedTransposed


class Conv(nn.Module):
    """(B, channels, L) -> (B, out, ceil(L / stride)): padded by mirroring, so that the last window is full.

    Causal: what a place sees ends with its own last sample. Only the mirrored beginning shows later ones.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, causal: bool = True) -> None:
        super().__init__()
        self.conv = NormedConv(nn.Conv1d(channels, out, kernel, stride))
        self.kernel, self.stride, self.causal = kernel, stride, causal

    def forward(self, x: Tensor) -> Tensor:
        left, right = padding(x.shape[-1], self.kernel, self.stride, self.causal)
        out: Tensor = self.conv(mirrored(x, left, right) if left or right else x)
        return out


class Up(nn.Module):
    """(B, channels, L) -> (B, out, stride * L): a transposed convolution of two strides, cut to the places that Conv
    makes these L of.

    Causal: what a place sees ends with the one of the L that it belongs to.
    """

    def __init__(self, channels: int, out: int, stride: int, causal: bool = True) -> None:
        super().__init__()
        self.convtr = NormedTransposed(nn.ConvTranspose1d(channels, out, 2 * stride, stride))
        self.stride, self.left = stride, 0 if causal else stride - stride // 2

    def forward(self, x: Tensor) -> Tensor:
        return self.convtr(x)[..., self.left : self.left + self.stride * x.shape[-1]]


def padding(length: int, window: int, stride: int, causal: bool) -> tuple[int, int]:
    """(left, right) of so long a signal: ceil(length / stride) windows, each ending with its own stride if causal, else
    lying about its middle."""
    both = window - stride
    full = -(-length // stride) * stride - length  # what the last window lacks
    right = 0 if causal else both // 2
    return both - right, right + full


def mirrored(x: Tensor, left: int, right: int) -> Tensor:
    """x between its mirror images; one that is too short for them is lengthened by zeros, which are cut off again."""
    short = max(0, max(left, right) - x.shape[-1] + 1)
    padded = F.pad(F.pad(x, (0, short)) if short else x, (left, right), mode="reflect")
    return padded[..., : padded.shape[-1] - short]


class Residual(nn.Module):
    """(B, channels, L) -> the same: two convolutions over half the channels, plus a convolution of the input."""

    def __init__(self, channels: int, config: WaveConfig) -> None:
        super().__init__()
        half, causal = channels // 2, config.causal
        first = Conv(channels, half, config.residual_kernel, causal=causal)
        self.block = nn.Sequential(nn.ELU(), first, nn.ELU(), Conv(half, channels, 1))
        self.shortcut = Conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.block(x)


class LSTM(nn.Module):
    """(B, channels, n) -> the same: an LSTM over the frames of each signal from a state of zeros, plus its input."""

    def __init__(self, channels: int, num_layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, num_layers)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.permute(2, 0, 1)
        return (self.lstm(frames)[0] + frames).permute(1, 2, 0)


class Encoder(nn.Module):
    """Waves (B, in_channels, T) -> latents (B, dim, ceil(T / hop))."""

    def __init__(self, config: WaveConfig, dim: int) -> None:
        super().__init__()
        channels, causal = config.channels, config.causal
        layers: list[nn.Module] = [Conv(config.in_channels, channels, config.kernel, causal=causal)]
        for ratio in config.ratios:
            down = Conv(channels, 2 * channels, 2 * ratio, ratio, causal)
            layers += [Residual(channels, config), nn.ELU(), down]
            channels *= 2
        if config.lstm_layers:
            layers.append(LSTM(channels, config.lstm_layers))
        layers += [nn.ELU(), Conv(channels, dim, config.kernel, causal=causal)]
        self.model = nn.Sequential(*layers)
        if config.encoder_gain is not None:
            begin(self, config.encoder_gain)

    def forward(self, waves: Tensor) -> Tensor:
        latents: Tensor = self.model(waves)
        return latents


class Decoder(nn.Module):
    """Latents (B, dim, n) -> waves (B, in_channels, n * hop), not clamped."""

    def __init__(self, config: WaveConfig, dim: int) -> None:
        super().__init__()
        channels, causal = config.channels << len(config.ratios), config.causal
        layers: list[nn.Module] = [Conv(dim, channels, config.kernel, causal=causal)]
        if config.lstm_layers:
            layers.append(LSTM(channels, config.lstm_layers))
        for ratio in reversed(config.ratios):
            up = Up(channels, channels // 2, ratio, causal)
            channels //= 2
            layers += [nn.ELU(), up, Residual(channels, config)]
        layers += [nn.ELU(), Conv(channels, config.in_channels, config.kernel, causal=causal)]
        self.model = nn.Sequential(*layers)
        self.last_weight = f"model.{len(layers) - 1}.conv.weight_v"

    def forward(self, latents: Tensor) -> Tensor:
        waves: Tensor = self.model(latents)
        return waves


@torch.no_grad()
def begin(encoder: nn.Module, gain: float) -> None:
    """Weights of its normed convolutions so many times as large, and no biases."""
    for layer in encoder.modules():
        if isinstance(layer, NormedConv):
            layer.weight_g.mul_(gain)
            assert layer.bias is not None
            layer.bias.zero_()
