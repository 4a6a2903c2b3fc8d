"""An encoder of waves that begins with spectra: log magnitudes of frames, and Vocos' blocks over them.

How loud each frequency is stands in its input, which SEANet (seanet.py) must first learn from samples that only
oscillate. Phases are not seen: what they say of a frame is in no token. Frames are as SEANet's, one for each begun hop,
and the ends of a wave are mirrored as its are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vqscale.nets.waves.config import SpectraConfig, WaveConfig
from vqscale.nets.waves.seanet import LSTM, Conv, begin, mirrored, padding
from vqscale.nets.waves.vocos import ConvNeXt


def log_spectra(waves: Tensor, window: int, hop: int, floor: float, causal: bool) -> Tensor:
    """(B, channels, T) -> (B, channels * (window // 2 + 1), ceil(T / hop)), float32 whatever the autocast: log
    magnitudes under a Hann window, from -1 at `floor` and below it to 1 for a sine that fills [-1, 1].

    The window of a frame ends with the frame if causal, else it lies about the frame's middle.
    """
    pieces = mirrored(waves.float(), *padding(waves.shape[-1], window, hop, causal)).unfold(-1, window, hop)
    hann = torch.hann_window(window, device=waves.device)
    sizes = torch.fft.rfft(pieces * (2 / hann.sum() * hann)).abs()
    levels = 1 - 2 * sizes.clamp_min(floor).log() / math.log(floor)
    return levels.transpose(-1, -2).flatten(1, 2)


class FrameNorm(nn.LayerNorm):
    """(B, width, n) -> the same, each frame normalised: without it latents may grow until no code reaches them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Encoder(nn.Module):
    """Waves (B, in_channels, T) -> latents (B, dim, ceil(T / hop)).

    The transform moves on by the first ratio; convolutions of the others' strides follow.
    """

    def __init__(self, config: WaveConfig, spectra: SpectraConfig, dim: int) -> None:
        super().__init__()
        self.window, self.floor, self.causal = spectra.window, spectra.floor, config.causal
        self.hop, *strides = config.ratios
        width, kernel, causal = spectra.width, config.kernel, config.causal
        layers: list[nn.Module] = [Conv(config.in_channels * (self.window // 2 + 1), width, kernel, causal=causal)]
        for stride in strides:
            layers += [nn.ELU(), Conv(width, width, 2 * stride, stride, causal)]
        sizes = (width, spectra.hidden, spectra.kernel, spectra.num_blocks)
        layers += [ConvNeXt(*sizes, causal=causal) for _ in range(spectra.num_blocks)]
        if config.lstm_layers:
            layers.append(LSTM(width, config.lstm_layers))
        layers += [FrameNorm(width), Conv(width, dim, kernel, causal=causal)]
        self.model = nn.Sequential(*layers)
        if config.encoder_gain is not None:
            begin(self, config.encoder_gain)

    def forward(self, waves: Tensor) -> Tensor:
        latents: Tensor = self.model(log_spectra(waves, self.window, self.hop, self.floor, self.causal))
        return latents
