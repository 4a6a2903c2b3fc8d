"""The settings of the network of waves, without torch. What they make is in net.py."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from vqscale.nets.config import NetSettings, miscounted

WINDOW_HOPS = 4  # samples of a spectrum in the decoder, in hops


@dataclass(frozen=True)
class SpectraConfig:
    """An encoder that begins with log magnitudes of frames, which no weight has to learn."""

    window: int = 800
    """samples of a transform; net.ratios[0] samples lie between two of them"""
    floor: float = 1e-5
    """magnitude below which nothing is told apart, of a sine that fills [-1, 1]"""
    width: int = 128
    """numbers per frame"""
    hidden: int = 384
    """numbers between the two layers of a ConvNeXt block"""
    num_blocks: int = 2
    """ConvNeXt blocks at the rate of the tokens"""
    kernel: int = 7
    """of the convolutions of the ConvNeXt blocks; odd"""

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from miscounted(self, ("window", "width", "hidden", "num_blocks", "kernel"))
        yield from _even_kernel("kernel", self.kernel)
        if not 0 < self.floor < 1:
            yield "floor", f"floor is {self.floor}, but lies between silence and a full sine: use a number in (0, 1)"


@dataclass(frozen=True)
class WaveConfig(NetSettings):
    """SEANet's encoder and Vocos' decoder, by default those of the published SimVQ tokenizers of speech; or SEANet's
    decoder, as EnCodec has it.

    A frame stands for as many samples as the product of the ratios says, the hop. Level i of the encoder has
    channels * 2**i channels; the last are the LSTM's. The decoder works at the rate of the frames, width numbers each,
    and ends in one inverse Fourier transform of 4 hops per frame; SEANet's mirrors the encoder, level by level, with
    its sizes. With `spectra` another encoder stands in SEANet's place, which has no use for channels and
    residual_kernel.
    """

    module: ClassVar[str] = "vqscale.nets.waves.net:build"
    rounds_up: ClassVar[bool] = True
    name: Literal["wave"] = "wave"
    """which network"""
    decoder: Literal["vocos", "seanet"] = "vocos"
    """which decoder; seanet has channels, ratios, kernels and LSTM of the encoder, and no use for width, hidden,
    num_blocks, decoder_kernel, num_groups and dropout"""
    channels: int = 32
    """channels of the first convolution; every level doubles them"""
    ratios: tuple[int, ...] = (2, 4, 5, 8)
    """stride of each level of the encoder, from the samples on; its kernel is twice that. With spectra the first is the
    hop of the transform"""
    kernel: int = 7
    """of the encoder's first and last convolution"""
    residual_kernel: int = 3
    """of the first convolution of a residual block of the encoder"""
    lstm_layers: int = 2
    """layers of the LSTM over the frames of the encoder and of SEANet's decoder; 0 is none"""
    causal: bool = True
    """the encoder pads on the left alone: a frame sees no later samples, but for the first, where the padding mirrors;
    SEANet's decoder pads alike, and Vocos' sees all frames of a sample in any case"""
    encoder_gain: float | None = None
    """the encoder's convolutions begin with weights so many times torch's and without biases; 1.8 keeps what differs
    between frames, of which torch's start (null, as published) leaves a hundredth beside what all have in common"""
    width: int = 768
    """numbers per frame in the decoder"""
    hidden: int = 2304
    """numbers between the two layers of a ConvNeXt block"""
    num_blocks: int = 12
    """ConvNeXt blocks"""
    decoder_kernel: int = 7
    """of the decoder's first convolution and of those of the ConvNeXt blocks; odd"""
    num_groups: int = 32
    """groups of every group normalisation before the ConvNeXt blocks; must divide width"""
    dropout: float = 0.1
    """dropout inside the residual blocks before the ConvNeXt blocks, in training only"""
    centred_phases: bool = False
    """the decoder's phases begin at pi times the number of the frequency, which is a pulse in the middle of a frame;
    about 0, as published, it is a pulse where the frame begins, which its window takes away"""
    turning_phases: bool = False
    """the decoder's phases are beside those of steady tones at the frequencies of its transform, so that frames that
    are alike are these tones, a quarter of the frames' rate apart; else such frames are one pulse after the other, with
    overtones of the frames' rate alone"""
    in_channels: int = 1
    """channels of a wave"""
    spectra: SpectraConfig | None = None
    """an encoder of spectra in place of SEANet; null is SEANet"""

    @property
    def hop(self) -> int:
        """Samples per frame."""
        return math.prod(self.ratios)

    @property
    def strides(self) -> tuple[int, ...]:
        return (self.hop,)

    @property
    def strides_from(self) -> str:
        return f"product of net.ratios {list(self.ratios)}"

    def problems(self) -> Iterable[tuple[str, str]]:
        """(key, message) of all that no network can be built from."""
        counts = ("channels", "kernel", "residual_kernel", "width", "hidden", "num_blocks", "decoder_kernel")
        yield from miscounted(self, (*counts, "num_groups", "in_channels"))
        if self.encoder_gain is not None and self.encoder_gain <= 0:
            yield "encoder_gain", f"encoder_gain is {self.encoder_gain}: use a positive number, or null"
        if self.lstm_layers < 0:
            yield "lstm_layers", f"lstm_layers is {self.lstm_layers}: use 0 or more"
        if not self.ratios or min(self.ratios) < 1:
            yield (
                "ratios",
                f"ratios are {list(self.ratios)}, but there is a level for each, whose stride it is: give numbers of "
                "at least 1",
            )
        elif self.decoder == "vocos" and self.hop % 2:
            yield (
                "ratios",
                f"ratios are {list(self.ratios)}, but the hop is their product, and a window of {WINDOW_HOPS} hops is "
                "cut to its middle hop, which takes an even hop: give numbers with an even product",
            )
        if self.spectra is not None and self.ratios and self.spectra.window < self.ratios[0]:
            yield (
                "spectra.window",
                f"a window of {self.spectra.window} samples every {self.ratios[0]} (ratios {list(self.ratios)}) leaves "
                "samples unseen: raise spectra.window, or lower ratios[0]",
            )
        yield from _even_kernel("decoder_kernel", self.decoder_kernel)
        if self.num_groups >= 1 and self.width % self.num_groups:
            yield (
                "num_groups",
                f"{self.num_groups} groups do not divide the decoder's width of {self.width}: change num_groups or "
                "width",
            )
        if self.decoder == "seanet" and (self.centred_phases or self.turning_phases):
            key = "centred_phases" if self.centred_phases else "turning_phases"
            yield key, f"{key} is of Vocos' decoder, and decoder is seanet, which has no phases: leave out {key}"
        if not 0 <= self.dropout < 1:
            yield "dropout", f"dropout is {self.dropout}, but a share of zeroed values lies in [0, 1): change dropout"


def _even_kernel(key: str, kernel: int) -> Iterable[tuple[str, str]]:
    if kernel % 2 == 0:
        yield (
            key,
            f"{key} is {kernel}, and a convolution that keeps the number of frames has a middle: use an odd number",
        )
