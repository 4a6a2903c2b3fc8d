"""LPIPS: the perceptual distance of two images, from features of a frozen VGG16 (Zhang et al. 2018, version 0.1).

Written for this project, with the key names of the two published files, so that they load as they are: torchvision's
ImageNet VGG16 (features.N.*; its classifier is left out) and the linear heads (linN.model.1.weight). Not here: the
weights themselves, which nothing downloads, and the weight of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from vqscale.nets.weights import check_file, load_strictly, read_state

# Channels of the convolutions of VGG16, each followed by a ReLU; a tap after each stage, and a pooling between stages.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
LEAST_SIDE = 16
VGG, HEADS = "VGG16 of LPIPS", "linear heads of LPIPS"
WHERE_VGG = (
    "get https://download.pytorch.org/models/vgg16-397923af.pth on a machine that may download, and give its path"
)
WHERE_HEADS = (
    "get lpips/weights/v0.1/vgg.pth (7 kB) of https://github.com/richzhang/PerceptualSimilarity or of the package "
    "lpips 0.1.4, and give its path"
)


class _Head(nn.Module):
    """The weights of one tap's channels, under the name that the published file gives them; its dropout is left out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Identity(), nn.Conv2d(channels, 1, 1, bias=False))


class LPIPS(nn.Module):
    """(images, recon), both (B, 3, H, W) in [-1, 1] -> distances (B,) in float32; 0 for equal images.

    At each of five taps the features of both are divided by their norm over the channels, and the squared difference,
    weighted per channel, is averaged over the positions; the sum over the taps is the distance. The network is frozen:
    gradients go to the images only. Under autocast the convolutions follow it, norms and sums are in float32.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*_layers())
        for number, widths in enumerate(STAGES):
            self.add_module(f"lin{number}", _Head(widths[-1]))
        # ImageNet's mean and deviation for images in [-1, 1]; constants of version 0.1, in no file
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, recon: Tensor) -> Tensor:
        if images.shape != recon.shape or images.ndim != 4 or min(images.shape[2:]) < LEAST_SIDE:
            raise ValueError(
                f"LPIPS compares two batches of one shape, (B, 3, H, W) with sides of at least {LEAST_SIDE} pixels, "
                f"and was given {tuple(images.shape)} and {tuple(recon.shape)}: change data.train.image_size, or do "
                "without LPIPS"
            )
        distance = torch.zeros(len(images), device=images.device)
        for number, (one, other) in enumerate(zip(self._taps(images), self._taps(recon), strict=True)):
            weight = self.get_parameter(f"lin{number}.model.1.weight").flatten()
            square = (_unit(one) - _unit(other)).square().mean(dim=(2, 3))
            distance = distance + (square * weight).sum(dim=1)
        return distance

    def _taps(self, images: Tensor) -> Iterator[Tensor]:
        x = (images - self.shift) / self.scale
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                yield x
            x = layer(x)
        yield x


def _layers() -> Iterator[nn.Module]:
    channels = 3
    for number, widths in enumerate(STAGES):
        if number:
            yield nn.MaxPool2d(2)
        for width in widths:
            yield nn.Conv2d(channels, width, 3, padding=1)
            yield nn.ReLU()
            channels = width


def _unit(x: Tensor) -> Tensor:
    """Features of length 1 at each position. The norm's gradient where all features are 0 is 0; a root's is not."""
    x = x.float()
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)


def check(vgg: Path | str, heads: Path | str) -> None:
    """ValueError unless both files are there; reads neither."""
    check_file(vgg, what=VGG, where=WHERE_VGG)
    check_file(heads, what=HEADS, where=WHERE_HEADS)


def load(
    vgg: Path | str, heads: Path | str, *, vgg_sha256: str | None = "397923af", heads_sha256: str | None = None
) -> LPIPS:
    """LPIPS with the weights of two files whose sha256 begin with these digits (None: any). ValueError if not."""
    lpips = LPIPS()
    backbone = read_state(vgg, what=VGG, where=WHERE_VGG, sha256=vgg_sha256)
    linear = read_state(heads, what=HEADS, where=WHERE_HEADS, sha256=heads_sha256)
    used = {name: x for name, x in backbone.items() if not name.startswith("classifier.")}
    load_strictly(lpips, {**used, **linear}, what=f"LPIPS from {vgg} and {heads}")
    return lpips
