"""Losses on images as functions, each with its formula.

They take and return this rank's tensors and talk to nobody: each is a mean over this rank's values, and the engine
averages gradients over the ranks. Losses of a quantizer are in its own file.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Reconstruction = Literal["l1", "l2"]
Player = Literal["hinge", "nonsaturating"]
PatchMean = Literal["before", "after"]


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


def discriminator(real: Tensor, fake: Tensor, kind: Player, patch_mean: PatchMean) -> Tensor:
    """What a discriminator minimises, from its answers D(x) to images and D(y) to reconstructions, (B, 1, h, w) each.

    hinge            (mean relu(1 - D(x)) + mean relu(1 + D(y))) / 2
    nonsaturating    (mean softplus(-D(x)) + mean softplus(D(y))) / 2

    patch_mean "before" puts the mean over the patches of an image in the place of D(x) and D(y).
    """
    real, fake = _patches(real, patch_mean), _patches(fake, patch_mean)
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator(fake: Tensor, kind: Player, patch_mean: PatchMean) -> Tensor:
    """What a generator minimises, from the answers D(y) to its images: hinge mean -D(y), nonsaturating mean
    softplus(-D(y)); patch_mean as for `discriminator`."""
    fake = _patches(fake, patch_mean)
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def _patches(answers: Tensor, patch_mean: PatchMean) -> Tensor:
    return answers.float().flatten(1).mean(1) if patch_mean == "before" else answers.float()


def lecam(real: Tensor, fake: Tensor, averages: Tensor) -> Tensor:
    """LeCAM (Tseng et al. 2021): mean relu(D(x) - m_fake)^2 + mean relu(m_real - D(y))^2.

    averages is [m_real, m_fake], moving averages of the mean answers over all ranks. It pulls answers to images down to
    what reconstructions got, and answers to reconstructions up to what images got.
    """
    m_real, m_fake = averages
    return F.relu(real.float() - m_fake).square().mean() + F.relu(m_real - fake.float()).square().mean()


def adaptive_ratio(main: Tensor, adversarial: Tensor, limit: float) -> Tensor:
    """|main| / (|adversarial| + 1e-4), at most limit: gradients of two losses at one weight (VQGAN, eq. 7)."""
    ratio = torch.linalg.vector_norm(main) / (torch.linalg.vector_norm(adversarial) + 1e-4)
    return ratio.clamp(0, limit).detach()
