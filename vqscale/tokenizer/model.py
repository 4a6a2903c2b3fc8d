"""Tokenizer: encoder, quantizer and decoder as one module; images to ids and back.

The order of tokens is defined here, and where float32 begins and ends. Not here: losses and metrics (the signal's), the
search among codes (the quantizer's), and ranks: every rank passes its own images, and only the quantizer talks to the
others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqscale import nets, quantizers, signals
from vqscale.nets.config import NetConfig, grid
from vqscale.nets.mode import evaluating
from vqscale.parallel.mesh import Mesh
from vqscale.seed import derive
from vqscale.signals.config import ImagesSignal
from vqscale.tokenizer import code_dropout, export, saved
from vqscale.tokenizer.config import TokenizerConfig

if TYPE_CHECKING:
    from vqscale.quantizers.base import Quantized, Quantizer
    from vqscale.signals import Signal

LatentNorm = Literal["none", "rms", "layer"]
CodeDropout = Literal["none", "random"]
NoCode = Literal["zero", "learned"]


class Tokenizer(nn.Module):
    """encoder -> quant_conv -> latent norm -> quantizer -> post_quant_conv -> decoder.

    Samples are (B, C, *sides), ids (B, *grid): every side is a multiple of its stride (net.strides), and the grid has
    side // stride places along it. Images are (B, 3, H, W) in [-1, 1], their ids (B, h, w). The N tokens of a batch
    are row-major, sample after sample: of images token (b * h + y) * w + x is row y, column x of image b.

    Where net.rounds_up a side may be any length: the grid has one more place for what is left at its end, ids become
    samples of whole strides, and calling the tokenizer cuts them to the samples' sides. Waves are (B, 1, T).

    A net may take a context (net.takes_context): then every call has it as second argument, a tensor with B entries
    that encoder and decoder both see, and that is in no id.

    latent_norm acts on each token before the quantizer and has no parameters: "rms" divides it by its root mean square,
    "layer" first subtracts its mean, "none" leaves it. From quant_conv to the quantizer's answer everything is in the
    type of the parameters, float32, whatever the autocast; the nets follow the autocast.

    With code_dropout the decoder is given a part of the codes in training (code_dropout.py), and `kept` (B, *grid) says
    which, of reconstruct and decode, at any time. In place of the others it sees codes of zeros, or behind
    post_quant_conv the learned vector no_code.

    `inputs`, in training where it is set, makes what the decoder is given of the quantizer's answer and keys_B.

    `config` is None where a tokenizer was put together by hand: such a one cannot be saved. `card` has what is known of
    where the weights come from (origin, commit, image_size, metrics); it goes with them into a saved folder.
    """

    # What init and trained of a run name, as the modules that it is made of.
    parts: ClassVar[dict[str, tuple[str, ...]]] = {
        "encoder": ("encoder", "quant_conv"),
        "codes": ("quantizer",),
        "decoder": ("post_quant_conv", "decoder", "no_code"),
    }
    no_code: nn.Parameter | None
    unrounded = ("quant_conv", "post_quant_conv", "quantizer")  # they run without autocast: engine/rounded.py

    def __init__(
        self,
        net: NetConfig,
        quantizer: Quantizer,
        latent_norm: LatentNorm = "none",
        code_dropout: CodeDropout = "none",
        no_code: NoCode = "zero",
    ) -> None:
        super().__init__()
        self.net = net
        self.latent_norm, self.code_dropout = latent_norm, code_dropout
        self.config: TokenizerConfig | None = None
        self.card: dict[str, Any] = {}
        self.mesh: Mesh | None = None
        self.inputs: Callable[[Quantized, Tensor | None], Tensor] | None = None
        parts = nets.build(net, quantizer.dim)
        self.encoder, self.quant_conv = parts.encoder, parts.quant_conv
        self.quantizer = quantizer
        self.post_quant_conv, self.decoder = parts.post_quant_conv, parts.decoder
        self._last_weight = parts.last_weight
        self.no_code = None
        if no_code == "learned":
            with torch.no_grad():
                given = self.post_quant_conv(torch.zeros(1, quantizer.dim, *[1] * len(net.strides)))
            self.no_code = nn.Parameter(torch.zeros_like(given.flatten()))

    @classmethod
    def from_config(cls, config: TokenizerConfig, mesh: Mesh | None = None, seed: int = 0) -> Tokenizer:
        """A new tokenizer on the mesh's device; its first values do not depend on the number of processes."""
        mesh = mesh or Mesh()
        torch.manual_seed(derive(seed, "model"))
        quantizer = quantizers.build(config.quantizer, mesh, seed=derive(seed, "codes"))
        dropout = (config.code_dropout, config.no_code)
        tokenizer = cls(config.net, quantizer, config.latent_norm, *dropout).to(mesh.device)
        tokenizer.config, tokenizer.mesh = config, mesh
        return tokenizer

    @classmethod
    def load(
        cls, path: str | Path, *, mesh: Mesh | None = None, weights: Literal["average", "parameters"] = "average"
    ) -> Tokenizer:
        """The trained tokenizer of a run folder (its newest whole checkpoint), of one of its checkpoint folders, or of
        a folder that `save` wrote; in evaluation mode, on the mesh's device.

        `weights` "average" takes the moving averages of a checkpoint, or the parameters where it has none. With a mesh
        it is collective, and a rank reads only its own rows. ValueError on all ranks for what cannot be loaded.
        """
        mesh = mesh or Mesh()
        source = saved.find(path, mesh, weights)
        with torch.random.fork_rng(devices=[]):
            tokenizer = cls.from_config(source.config, mesh)
        source.fill(tokenizer, mesh)
        tokenizer.card = source.card
        return tokenizer.eval()

    def save(self, folder: str | Path, card: Mapping[str, Any] | None = None) -> Path:
        """Write model.safetensors and card.json, from which `load` gives the same tokenizer to the bit; collective.

        `card` adds to what is known of the weights. Only rank 0 writes, and no rank holds the rows of all.
        """
        if self.config is None:
            raise ValueError(
                "this tokenizer was put together by hand, so nobody could build it again from what save writes: make "
                "it with Tokenizer.from_config"
            )
        return export.write(folder, self, self.config, {**self.card, **(card or {})}, self.mesh or Mesh())

    @property
    def fingerprint(self) -> str:
        """sha256 over the config and every parameter with all rows, the same on any number of ranks; hexadecimal.

        Computed when asked; collective on the code axis.
        """
        return export.fingerprint(self, self.config)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        return next(self.decoder.parameters()).dtype

    @property
    def signal(self) -> Signal:
        """What is tokenized: images, where the tokenizer was put together by hand."""
        return signals.build(self.config.signal if self.config else ImagesSignal())

    @property
    def last_weight(self) -> nn.Parameter:
        """The decoder's weight nearest to what comes out."""
        return self.decoder.get_parameter(self._last_weight)

    def forward(
        self,
        samples: Tensor,
        context: Tensor | None = None,
        keys_B: Tensor | None = None,
        given: Tensor | None = None,
    ) -> tuple[Tensor, Quantized]:
        """Samples -> (what the decoder makes of them, not clamped; what the quantizer returned for x_ND).

        keys_B (noise.keys) decide which codes of an image are dropped in training, torch's generator without them.
        `given`, ids of the batch, the decoder gets in the place of what was encoded; -1 is as encoded.
        """
        quantized, z_ND = self.quantize(samples, context, keys_B, given)
        return self.restore(samples, z_ND, context, keys_B), quantized

    def quantize(
        self, samples: Tensor, context: Tensor | None, keys_B: Tensor | None, given: Tensor | None
    ) -> tuple[Quantized, Tensor]:
        """The first half of a call: (what the quantizer returned, z_ND that the decoder is given)."""
        x_ND = self.latents(samples, context)
        with _no_autocast(x_ND):
            quantized = self.quantizer(x_ND)
            z_ND = self.inputs(quantized, keys_B) if self.training and self.inputs else quantized.z
            if given is not None:
                ids_N = given.flatten(0, len(self.net.strides))
                other_N1 = (ids_N >= 0).view(len(z_ND), -1)[:, :1]
                z_ND = torch.where(other_N1, self.quantizer.decode(ids_N.clamp(min=0)), z_ND)
        return quantized, z_ND

    def restore(self, samples: Tensor, z_ND: Tensor, context: Tensor | None, keys_B: Tensor | None) -> Tensor:
        """The second half: what the decoder makes of z_ND, with the sides of the samples."""
        batch, *places = self.grid(samples)
        kept = None
        if self.training and self.code_dropout != "none":
            if keys_B is None:
                keys_B = torch.randint(2**62, (batch,), device=samples.device)
            kept = code_dropout.random_kept(keys_B, places)
        recon = self.reconstruct(z_ND, (batch, *places), context, kept)
        if self.net.rounds_up:
            for dim, side in enumerate(samples.shape[2:], start=2):
                recon = recon.narrow(dim, 0, side)
        return recon

    def latents(self, samples: Tensor, context: Tensor | None = None) -> Tensor:
        """Samples -> x_ND, never in half precision: what the quantizer is given."""
        self.grid(samples)  # refuses sides that are not the net's
        encoded = self.encoder(samples, *self._given(context))
        with _no_autocast(encoded):
            x_BDg = self.quant_conv(encoded.to(self.dtype))
            x_ND = x_BDg.movedim(1, -1).flatten(0, -2)
            if self.latent_norm == "rms":
                x_ND = F.rms_norm(x_ND, x_ND.shape[-1:], eps=1e-6)
            elif self.latent_norm == "layer":
                x_ND = F.layer_norm(x_ND, x_ND.shape[-1:], eps=1e-6)
            return x_ND

    def reconstruct(
        self, z_ND: Tensor, grid: tuple[int, ...], context: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """Rows of codes for a grid of (B, *grid) tokens -> samples, never in half precision, not clamped.

        `kept` (B, *grid), true where the decoder is given the code; None is everywhere.
        """
        z_BDg = z_ND.unflatten(0, grid).movedim(-1, 1)
        if kept is None:
            latents = self.post_quant_conv(z_BDg)
        else:
            kept_B1g = kept.unsqueeze(1)
            latents = self.post_quant_conv(torch.where(kept_B1g, z_BDg, 0.0))
            if self.no_code is not None:
                latents = torch.where(kept_B1g, latents, self.no_code.view(-1, *[1] * (latents.ndim - 2)))
        return self.decoder(latents, *self._given(context)).to(self.dtype)

    def _given(self, context: Tensor | None) -> tuple[Tensor, ...]:
        """The context as the nets take it. ValueError where there is one for a net that takes none, or the reverse."""
        if (context is not None) != self.net.takes_context:
            wants = "encodes and decodes with a context" if self.net.takes_context else "takes no context"
            raise ValueError(
                f"the net {self.net.name} of this tokenizer {wants}, and it was given "
                f"{'none' if context is None else f'one of shape {tuple(context.shape)}'}: call it "
                f"{'with' if self.net.takes_context else 'without'} a context, or change tokenizer.net"
            )
        return () if context is None else (context,)

    def grid(self, samples: Tensor) -> tuple[int, ...]:
        """(B, *grid): samples, and tokens along each side. ValueError for channels or sides that are not the net's."""
        channels, num_sides = self.net.in_channels, len(self.net.strides)
        if samples.ndim != 2 + num_sides or samples.shape[1] != channels or not samples.is_floating_point():
            raise ValueError(
                f"samples of this tokenizer are floats of shape (B, {channels}{', side' * num_sides}), and these are "
                f"{str(samples.dtype).removeprefix('torch.')} {tuple(samples.shape)}: bring them into that form, as "
                "what enters by its signal (8-bit values v of images become v / 127.5 - 1, class numbers stay)"
            )
        return samples.shape[0], *grid(self.net, samples.shape[2:])

    @torch.no_grad()
    def encode(self, samples: Tensor, context: Tensor | None = None) -> Tensor:
        """Samples -> int64 ids (B, *grid), or (B, *grid, num_ids): the search alone, in evaluation in any mode.

        FloatingPointError, on all ranks of a split codebook, where latents are not finite: nothing is nearest to them.
        On a GPU that check waits for nobody and fails inside the device.
        """
        with evaluating(self):
            x_ND = self.latents(samples, context)
            with _no_autocast(x_ND):
                ids_N = self.quantizer.encode(x_ND)
            return ids_N.view(*self.grid(samples), *ids_N.shape[1:])

    @torch.no_grad()
    def decode(self, ids: Tensor, context: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
        """Ids (B, *grid) -> samples (B, C, *sides), not clamped, without gradients and dropout in any training mode.

        `kept` (B, *grid) is false where the decoder is to do without the code, though there is an id.
        ValueError for ids that are none of this tokenizer's, on all ranks of a split codebook if one has such.
        """
        last = len(self.net.strides)
        if ids.ndim <= last:
            raise ValueError(
                f"ids of this tokenizer have the shape (B{', side' * last}), and these {tuple(ids.shape)}: give them "
                "as `encode` does"
            )
        with evaluating(self):
            with _no_autocast(ids):
                z_ND = self.quantizer.decode(ids.flatten(0, last))
            return self.reconstruct(z_ND, ids.shape[: last + 1], context, kept)


def _no_autocast(x: Tensor) -> AbstractContextManager:
    """Inside it autocast is off on the device of x; devices that know no autocast (meta) need nothing."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
