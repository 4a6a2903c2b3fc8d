"""Vocos' decoder of waves with the residual blocks and the attention that WavTokenizer put before it.

All layers work at the rate of the frames; samples come from one inverse short-time Fourier transform. Group norms and
attention see all frames of a signal, and nothing knows where a frame stands: what comes out depends on the length of
the signal, and padding a batch changes it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqscale.matmul import Linear
from vqscale.nets.conv import Attention, Residual
from vqscale.nets.waves.config import WINDOW_HOPS, WaveConfig

LOUDEST = 100.0  # the largest magnitude of a bin of a frame


class ConvNeXt(nn.Module):
    """(B, width, n) -> the same: a convolution of each channel alone, two layers on each frame, plus the input.

    It is one of `num_blocks`. Causal: a frame sees no later ones.
    """

    def __init__(self, width: int, hidden: int, kernel: int, num_blocks: int, causal: bool = False) -> None:
        super().__init__()
        padding = kernel - 1 if causal else kernel // 2
        self.dwconv = nn.Conv1d(width, width, kernel, padding=padding, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = Linear(width, hidden)
        self.pwconv2 = Linear(hidden, width)
        self.gamma = nn.Parameter(torch.full((width,), 1 / num_blocks))

    def forward(self, x: Tensor) -> Tensor:
        convolved = self.dwconv(x)[..., : x.shape[-1]]  # causal ones are padded at both ends
        frames = self.norm(convolved.transpose(1, 2))
        return x + (self.gamma * self.pwconv2(F.gelu(self.pwconv1(frames)))).transpose(1, 2)


class Backbone(nn.Module):
    """Latents (B, dim, n) -> frames (B, n, width)."""

    def __init__(self, config: WaveConfig, dim: int) -> None:
        super().__init__()
        width, kernel = config.width, config.decoder_kernel
        self.embed = nn.Conv1d(dim, width, kernel, padding=kernel // 2)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        sizes = (width, config.hidden, kernel, config.num_blocks)
        self.convnext = nn.ModuleList(ConvNeXt(*sizes) for _ in range(config.num_blocks))
        self.final_layer_norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(_initialise)
        # made after that, and begins as torch draws it
        first, second, third, fourth = (Residual(width, width, config, nn.Conv1d) for _ in range(4))
        norm = nn.GroupNorm(config.num_groups, width, eps=1e-6)
        self.pos_net = nn.Sequential(first, second, Attention(width, config, nn.Conv1d), third, fourth, norm)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.pos_net(self.embed(latents))
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        for block in self.convnext:
            x = block(x)
        frames: Tensor = self.final_layer_norm(x.transpose(1, 2))
        return frames


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv1d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        assert module.bias is not None, "all have one"
        module.bias.zero_()


class Head(nn.Module):
    """Frames (B, n, width) -> waves (B, n * hop): log magnitudes and phases of a spectrum per frame, and its inverse.

    From the spectrum on everything is float32, whatever the autocast.
    """

    def __init__(self, config: WaveConfig) -> None:
        super().__init__()
        self.hop, self.turning = config.hop, config.turning_phases
        self.out = Linear(config.width, WINDOW_HOPS * self.hop + 2)
        if config.centred_phases:
            phases = self.out.bias.detach().chunk(2)[1]
            phases.copy_(math.pi * torch.arange(len(phases)))

    def forward(self, frames: Tensor) -> Tensor:
        spectra = spectrum(self.out(frames))
        return inverse_stft(turned(spectra) if self.turning else spectra, self.hop)


def spectrum(numbers: Tensor) -> Tensor:
    """(B, n, 2 F) numbers in any precision -> (B, n, F) complex: min(exp(m), 100) (cos p + i sin p)."""
    m, p = numbers.float().chunk(2, dim=-1)
    size = m.clamp(max=math.log(LOUDEST)).exp()  # exp first would overflow, and its gradient be nan
    return torch.complex(size * p.cos(), size * p.sin())


def turned(spectra: Tensor) -> Tensor:
    """(B, n, F) complex, each frequency turned as a steady tone of it turns from one frame to the next: spectra that
    are the same in every frame become tones."""
    n, count = spectra.shape[1:]
    quarters = torch.arange(n, device=spectra.device)[:, None] * torch.arange(count, device=spectra.device)
    return spectra * torch.tensor([1, 1j, -1, -1j], device=spectra.device)[quarters % WINDOW_HOPS]


def inverse_stft(spectra: Tensor, hop: int) -> Tensor:
    """(B, n, 2 hop + 1) complex -> (B, n hop): the inverse of an STFT of 4 hops under a Hann window, whose signal was
    given 1.5 hops of zeros at both ends."""
    length, cut = WINDOW_HOPS * hop, (WINDOW_HOPS - 1) * hop // 2
    window = torch.hann_window(length, device=spectra.device)
    pieces = torch.fft.irfft(spectra, length) * window
    squares = window.square().expand(1, spectra.shape[1], length)
    wave, weight = (_overlapped(x, hop)[:, cut : cut + spectra.shape[1] * hop] for x in (pieces, squares))
    return wave / weight


def _overlapped(pieces: Tensor, hop: int) -> Tensor:
    """(B, n, length) -> (B, (n - 1) hop + length): each piece added a hop after the one before it."""
    n, length = pieces.shape[1:]
    whole = (1, (n - 1) * hop + length)
    return F.fold(pieces.transpose(1, 2), whole, (1, length), stride=(1, hop))[:, 0, 0]


class Decoder(nn.Module):
    """Latents (B, dim, n) -> waves (B, 1, n * hop), not clamped."""

    def __init__(self, config: WaveConfig, dim: int) -> None:
        super().__init__()
        self.backbone = Backbone(config, dim)
        self.head = Head(config)

    def forward(self, latents: Tensor) -> Tensor:
        wave: Tensor = self.head(self.backbone(latents))
        return wave.unsqueeze(1)
