"""What a tokenizer is trained for, as frozen dataclasses that mirror the YAML. No torch here.

Distances are in vqscale/signals, adversarial formulas in train/adversarial_losses.py, the networks in vqscale/nets, the
order of the two steps in train/adversarial.py. The defaults of the adversarial loss are those of the published IBQ and
SimVQ tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from vqscale.engine.config import OptimConfig
from vqscale.nets.config.discriminators import (
    DiscriminatorConfig,
    DiscriminatorLoss,
    GeneratorLoss,
    Objective,
    PatchGANConfig,
    PatchMean,
)
from vqscale.signals.config import DistanceConfig
from vqscale.train.config.alignment import AlignmentConfig


@dataclass(frozen=True)
class AdversarialConfig:
    """A discriminator, its loss and the tokenizer's, and which of the two steps first.

    The four keys of losses and means over patches are for discriminators whose answers are all alike; that of waves
    says itself what each of its parts is trained for.
    """

    net: DiscriminatorConfig = field(default_factory=PatchGANConfig)
    """the discriminator"""
    first: Literal["discriminator", "tokenizer"] = "discriminator"
    """who steps first; then the other steps against it as it now is, on the same reconstructions"""
    generator: GeneratorLoss = "nonsaturating"
    """the tokenizer's loss: nonsaturating is softplus(-D(recon)), hinge is -D(recon), clipped_hinge is
    relu(1 - D(recon)), least_squares is (1 - D(recon))^2"""
    discriminator: DiscriminatorLoss = "hinge"
    """the discriminator's loss: half of relu(1 - D(images)) + relu(1 + D(recon)), or of two softplus, or squares"""
    generator_patch_mean: PatchMean = "before"
    """patches of an image are averaged before or after the non-linearity of the tokenizer's loss"""
    discriminator_patch_mean: PatchMean = "after"
    """patches of an image are averaged before or after the non-linearity of the discriminator's loss"""
    weight: float = 0.1
    """weight of the tokenizer's loss"""
    feature_weight: float = 0.0
    """weight of how far the discriminator's maps of a reconstruction are from those of its sample; 0 is off"""
    adaptive: bool = False
    """multiply weight by the ratio of gradient norms (reconstruction / adversarial) at the decoder's last layer"""
    adaptive_limit: float = 1e4
    """for adaptive: the largest ratio"""
    start_step: int = 0
    """steps of the tokenizer alone before both losses begin"""
    lecam_weight: float = 0.05
    """weight of LeCAM, which holds the discriminator's answers near their moving averages; 0 is off"""
    lecam_decay: float = 0.999
    """decay per step of the averages of LeCAM"""
    optim: OptimConfig | None = None
    """optimiser of the discriminator, whose schedule counts steps from start_step on; null is the tokenizer's"""

    def problems(self) -> Iterable[tuple[str, str]]:
        for key in ("weight", "adaptive_limit"):
            if getattr(self, key) <= 0:
                yield key, f"{key} is {getattr(self, key)}: use a positive number, or adversarial: null for none"
        for key in ("start_step", "lecam_weight", "feature_weight"):
            if getattr(self, key) < 0:
                yield key, f"{key} is {getattr(self, key)}: use 0 or more"
        if self.feature_weight and not self.net.shows_features:
            yield (
                "feature_weight",
                f"feature_weight is {self.feature_weight}, and the discriminator {self.net.name} shows no maps: use 0, "
                "or another net",
            )
        if self.net.objectives:
            yield from self._overruled()
        if not 0 <= self.lecam_decay < 1:
            yield "lecam_decay", f"a decay lies in [0, 1), but lecam_decay is {self.lecam_decay}: use 0.999, say"

    def _overruled(self) -> Iterable[tuple[str, str]]:
        for key in ("generator", "discriminator", "generator_patch_mean", "discriminator_patch_mean"):
            if getattr(self, key) != getattr(AdversarialConfig, key):
                yield (
                    key,
                    f"{key} is {getattr(self, key)}, and the parts of the discriminator {self.net.name} say themselves "
                    "what they are trained for: leave it out, and change the loss of a part in net",
                )

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """Of each answer of the discriminator: its own, or else a mean over answers that are all alike."""
        count = self.net.num_answers
        alike = Objective(
            self.discriminator,
            self.generator,
            1 / count,
            1 / count,
            self.discriminator_patch_mean,
            self.generator_patch_mean,
        )
        return self.net.objectives or (alike,) * count


@dataclass(frozen=True)
class LossConfig(DistanceConfig):
    """What the tokenizer is trained for; the quantizer adds its own losses."""

    quantizer_weight: float = 0.01
    """weight of the sum of the quantizer's losses; at 1 their pull on the latents outweighs l2, and codes die"""
    adversarial: AdversarialConfig | None = None
    """a discriminator; null trains without one"""
    alignment: AlignmentConfig | None = None
    """draws codes of images towards features of a frozen vision model; null trains without one"""

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        if self.quantizer_weight < 0:
            yield "quantizer_weight", f"quantizer_weight is {self.quantizer_weight}: use 0 or more"
