"""Distances of reconstructions from their images, as functions with their formulas.

They take and return this rank's tensors and talk to nobody: each is a mean over this rank's values, and the engine
averages gradients over the ranks. Losses of a quantizer are in its own file.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Reconstruction = Literal["l1", "l2"]


def l1(images: Tensor, recon: Tensor) -> Tensor:
    """mean |x - y| over all values of all images."""
    return (images.float() - recon.float()).abs().mean()


def l2(images: Tensor, recon: Tensor) -> Tensor:
    """mean (x - y)^2 over all values of all images, the mean squared error."""
    return (images.float() - recon.float()).square().mean()


RECONSTRUCTIONS = {"l1": l1, "l2": l2}


def reconstruction(images: Tensor, recon: Tensor, kind: Reconstruction) -> Tensor:
    """The reconstruction loss called kind, a scalar in float32, of two (B, 3, H, W) batches in the same range."""
    if kind not in RECONSTRUCTIONS:
        raise ValueError(
            f"there is no reconstruction loss {kind!r}, only {', '.join(RECONSTRUCTIONS)}: change the kind of the loss"
        )
    if images.shape != recon.shape:  # subtraction would broadcast, and train towards a mean image
        raise ValueError(
            f"images are {tuple(images.shape)} and their reconstructions {tuple(recon.shape)}: give reconstruction() "
            "two batches of the same shape"
        )
    return RECONSTRUCTIONS[kind](images, recon)
