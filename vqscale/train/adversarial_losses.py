"""What discriminator and tokenizer minimise beside each other, as functions with their formulas.

They take answers (nets/discriminators.py) of this rank and talk to nobody: each is a sum over the parts of the
discriminator, by the weights of their objectives, of a mean over this rank's values, and the engine averages gradients
over the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vqscale.nets.config.discriminators import DiscriminatorLoss, GeneratorLoss, Objective, PatchMean
from vqscale.nets.discriminators import Answer


def discriminator(real: Sequence[Answer], fake: Sequence[Answer], objectives: Sequence[Objective]) -> dict[str, Tensor]:
    """What a discriminator minimises by the names of its losses, from its answers D(x) to samples and D(y) to
    reconstructions.

    hinge            (mean relu(1 - D(x)) + mean relu(1 + D(y))) / 2
    nonsaturating    (mean softplus(-D(x)) + mean softplus(D(y))) / 2
    least_squares    (mean (1 - D(x))^2 + mean D(y)^2) / 2

    patch_mean "before" puts the mean over the patches of a sample in the place of D(x) and D(y).
    """
    found: dict[str, list[Tensor]] = {}
    for x, y, each in zip(real, fake, objectives, strict=True):
        its_real, its_fake = (_values(answer, each.discriminator_patch_mean) for answer in (x, y))
        loss = each.discriminator_weight * _discriminator(its_real, its_fake, each.discriminator)
        found.setdefault(each.discriminator, []).append(loss)
    return {kind: torch.stack(losses).sum() for kind, losses in found.items()}


def _discriminator(real: Tensor, fake: Tensor, kind: DiscriminatorLoss) -> Tensor:
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    if kind == "least_squares":
        return 0.5 * ((1 - real).square().mean() + fake.square().mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator(fake: Sequence[Answer], objectives: Sequence[Objective]) -> Tensor:
    """What a generator minimises, from the answers D(y) to what it made; patch_mean as for `discriminator`.

    hinge mean -D(y), clipped_hinge mean relu(1 - D(y)), nonsaturating mean softplus(-D(y)),
    least_squares mean (1 - D(y))^2
    """
    pairs = zip(fake, objectives, strict=True)
    losses = [each.weight * _generator(_values(y, each.generator_patch_mean), each.generator) for y, each in pairs]
    return torch.stack(losses).sum()


def _generator(fake: Tensor, kind: GeneratorLoss) -> Tensor:
    if kind == "hinge":
        return -fake.mean()
    if kind == "clipped_hinge":
        return F.relu(1 - fake).mean()
    return (1 - fake).square().mean() if kind == "least_squares" else F.softplus(-fake).mean()


def features(real: Sequence[Answer], fake: Sequence[Answer], objectives: Sequence[Objective]) -> Tensor:
    """How far the maps of reconstructions are from those of their samples: the sum of mean |f(x) - f(y)| over the maps
    of an answer, and over answers by their weights; no gradient goes to f(x)."""
    losses = [
        each.weight * torch.stack([_difference(f, g) for f, g in zip(x.features, y.features, strict=True)]).sum()
        for x, y, each in zip(real, fake, objectives, strict=True)
    ]
    return torch.stack(losses).sum()


def _difference(real: Tensor, fake: Tensor) -> Tensor:
    return (real.detach().float() - fake.float()).abs().mean()


def _values(answer: Answer, patch_mean: PatchMean) -> Tensor:
    """In float32; with patch_mean "before" their means over the patches of each sample."""
    values = answer.values.float()
    return values.flatten(1).mean(1) if patch_mean == "before" else values


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
