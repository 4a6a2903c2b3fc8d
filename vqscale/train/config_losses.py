"""What a tokenizer is trained for, as frozen dataclasses that mirror the YAML. No torch here.

Distances are in vqscale/signals, formulas of the game in train/adversarial_losses.py, the networks in vqscale/nets, the
order of the two steps in train/adversarial.py. The defaults of the adversarial loss are those of the published IBQ and
SimVQ tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from vqscale.engine.config import OptimConfig
from vqscale.nets.config_discriminators import DiscriminatorConfig, PatchGANConfig
from vqscale.signals.config import DistanceConfig

PatchMean = Literal["before", "after"]
AdversarialLoss = Literal["hinge", "nonsaturating"]


@dataclass(frozen=True)
class AdversarialConfig:
    """A discriminator of patches, its loss and the tokenizer's. It steps first, then the tokenizer."""

    net: DiscriminatorConfig = field(default_factory=PatchGANConfig)
    """the discriminator"""
    generator: AdversarialLoss = "nonsaturating"
    """the tokenizer's loss: nonsaturating is softplus(-D(recon)), hinge is -D(recon)"""
    discriminator: AdversarialLoss = "hinge"
    """the discriminator's loss: half of relu(1 - D(images)) + relu(1 + D(recon)), or of two softplus"""
    generator_patch_mean: PatchMean = "before"
    """patches of an image are averaged before or after the non-linearity of the tokenizer's loss"""
    discriminator_patch_mean: PatchMean = "after"
    """patches of an image are averaged before or after the non-linearity of the discriminator's loss"""
    weight: float = 0.1
    """weight of the tokenizer's loss"""
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
        for key in ("start_step", "lecam_weight"):
            if getattr(self, key) < 0:
                yield key, f"{key} is {getattr(self, key)}: use 0 or more"
        if not 0 <= self.lecam_decay < 1:
            yield "lecam_decay", f"a decay lies in [0, 1), but lecam_decay is {self.lecam_decay}: use 0.999, say"


@dataclass(frozen=True)
class LossConfig(DistanceConfig):
    """What the tokenizer is trained for; the quantizer adds its own losses."""

    quantizer_weight: float = 0.01
    """weight of the sum of the quantizer's losses; at 1 their pull on the latents outweighs l2, and codes die"""
    adversarial: AdversarialConfig | None = None
    """a discriminator; null trains without one"""

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        if self.quantizer_weight < 0:
            yield "quantizer_weight", f"quantizer_weight is {self.quantizer_weight}: use 0 or more"
