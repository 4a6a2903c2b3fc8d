"""What a tokenizer is trained for, as frozen dataclasses that mirror the YAML. No torch here.

The formulas are in train/losses.py and train/adversarial_losses.py, the networks in vqscale/nets, the order of the two
steps in train/adversarial.py. The defaults of the adversarial loss are those of the published IBQ and SimVQ tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from vqscale.config import Free
from vqscale.engine.config import OptimConfig
from vqscale.nets.config_discriminators import DiscriminatorConfig, PatchGANConfig

PatchMean = Literal["before", "after"]
AdversarialLoss = Literal["hinge", "nonsaturating"]


@dataclass(frozen=True)
class PerceptualConfig:
    """LPIPS with VGG16, of files that you fetch: nothing is downloaded at run time."""

    vgg: Free[str]
    """path of torchvision's ImageNet VGG16, vgg16-397923af.pth"""
    heads: Free[str]
    """path of the linear heads of LPIPS 0.1 for VGG, vgg.pth"""
    vgg_sha256: str | None = "397923af"
    """first digits of the sha256 that the file vgg must have; null checks nothing"""
    heads_sha256: str | None = None
    """first digits of the sha256 that the file heads must have; null checks nothing"""
    weight: float = 1.0
    """weight of the mean LPIPS distance of images and reconstructions"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.weight <= 0:
            yield (
                "weight",
                f"weight is {self.weight}: use a positive number, or perceptual: null to train without LPIPS",
            )
        for key in ("vgg_sha256", "heads_sha256"):
            digits = getattr(self, key)
            if digits is not None and (not digits or set(digits.lower()) - set("0123456789abcdef")):
                yield (
                    key,
                    f"{key} is {digits!r}, no digits of a sha256: use hexadecimal digits, or null to check nothing",
                )


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
class LossConfig:
    """What the tokenizer is trained for; the quantizer adds its own losses."""

    reconstruction: Literal["l1", "l2"] = "l2"
    """distance of images"""
    reconstruction_weight: float = 1.0
    """its weight"""
    quantizer_weight: float = 0.01
    """weight of the sum of the quantizer's losses; at 1 their pull on the latents outweighs l2, and codes die"""
    perceptual: PerceptualConfig | None = None
    """LPIPS; null trains without it"""
    adversarial: AdversarialConfig | None = None
    """a discriminator; null trains without one"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.quantizer_weight < 0:
            yield "quantizer_weight", f"quantizer_weight is {self.quantizer_weight}: use 0 or more"
        if self.reconstruction_weight <= 0:
            yield (
                "reconstruction_weight",
                f"reconstruction_weight is {self.reconstruction_weight}, and nothing else trains the decoder: "
                "use a positive number",
            )
