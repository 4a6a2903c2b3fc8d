"""What discriminator and tokenizer minimise beside each other, as functions with their formulas.

They take answers (nets/discriminators.py) of this rank and talk to nobody: each is a mean over the parts of the
discriminator of a mean over this rank's values, and the engine averages gradients over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vqscale.nets.discriminators import Answer
from vqscale.train.config_losses import AdversarialLoss, PatchMean


def discriminator(
    real: Sequence[Answer], fake: Sequence[Answer], kind: AdversarialLoss, patch_mean: PatchMean
) -> Tensor:
    """What a discriminator minimises, from its answers D(x) to samples and D(y) to reconstructions.

    hinge            (mean relu(1 - D(x)) + mean relu(1 + D(y))) / 2
    nonsaturating    (mean softplus(-D(x)) + mean softplus(D(y))) / 2

    patch_mean "before" puts the mean over the patches of a sample in the place of D(x) and D(y).
    """
    pairs = zip(*_patches((real, fake), patch_mean), strict=True)
    return _mean(_discriminator(x, y, kind) for x, y in pairs)


def _discriminator(real: Tensor, fake: Tensor, kind: AdversarialLoss) -> Tensor:
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator(fake: Sequence[Answer], kind: AdversarialLoss, patch_mean: PatchMean) -> Tensor:
    """What a generator minimises, from the answers D(y) to what it made: hinge mean -D(y), nonsaturating mean
    softplus(-D(y)); patch_mean as for `discriminator`."""
    (answers,) = _patches((fake,), patch_mean)
    return _mean(-values.mean() if kind == "hinge" else F.softplus(-values).mean() for values in answers)


def _patches(each: Iterable[Sequence[Answer]], patch_mean: PatchMean) -> list[list[Tensor]]:
    """The values of answers in float32, with patch_mean "before" their means over the patches of each sample."""
    found = [[answer.values.float() for answer in answers] for answers in each]
    return [[x.flatten(1).mean(1) for x in values] for values in found] if patch_mean == "before" else found


def _mean(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack([*losses]).mean()


def mean_values(answers: Sequence[Answer]) -> Tensor:
    """(A,) in float32 without gradients: the mean of the values of each of A answers."""
    return torch.stack([answer.values.detach().float().mean() for answer in answers])


def lecam(real: Sequence[Answer], fake: Sequence[Answer], averages_2A: Tensor) -> Tensor:
    """LeCAM (Tseng et al. 2021): mean relu(D(x) - m_fake)^2 + mean relu(m_real - D(y))^2.

    averages_2A is [m_real, m_fake] of each of the A answers, moving averages of their means over all ranks. It pulls
    answers to samples down to what reconstructions got, and answers to reconstructions up to what samples got.
    """
    return _mean(
        F.relu(x.values.float() - m_fake).square().mean() + F.relu(m_real - y.values.float()).square().mean()
        for x, y, (m_real, m_fake) in zip(real, fake, averages_2A.T, strict=True)
    )


def adaptive_ratio(main: Tensor, adversarial: Tensor, limit: float) -> Tensor:
    """|main| / (|adversarial| + 1e-4), at most limit: gradients of two losses at one weight (VQGAN, eq. 7)."""
    ratio = torch.linalg.vector_norm(main) / (torch.linalg.vector_norm(adversarial) + 1e-4)
    return ratio.clamp(0, limit).detach()
