"""The settings of the masked prior and of drawing from it, as frozen dataclasses that mirror the YAML. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from vqscale.nets.config.transformer import TransformerConfig
from vqscale.priors.config import IdsConfig, RuleSampleConfig, SampleConfig, unturned

MaskLaw = Literal["cosine", "arccos", "linear", "square", "cubic", "root"]
Order = Literal["confidence", "halton", "random"]


@dataclass(frozen=True)
class MaskedSampleConfig(RuleSampleConfig):
    """Drawing in steps, some ids in each; guidance ramps over the steps."""

    steps: int = 12
    """passes over the image, each of which reveals at least one id; at most as many as there are ids"""
    order: Order = "confidence"
    """which ids a step reveals: the likeliest of those drawn, the next of Halton's sequence, or any; the last two need
    the head only where an id is revealed"""
    mask_law: MaskLaw = "cosine"
    """share of the ids that is still masked after a share r of the steps; see prior.mask_law"""
    order_noise: float = 4.5
    """confidence is log p + order_noise x (1 - share of the steps) x Gumbel noise; 0 is the likeliest first"""
    roll: bool = False
    """begin Halton's sequence at another place for every image"""

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        if self.steps < 1:
            yield "steps", f"steps is {self.steps}: use at least 1"
        if not 0 <= self.order_noise < float("inf"):
            yield "order_noise", f"order_noise is {self.order_noise}: use 0 (the likeliest first) or more"
        if self.roll and self.order != "halton":
            yield (
                "roll",
                f"roll is true with order {self.order}, and only Halton's sequence is rolled: use order halton",
            )


@dataclass(frozen=True)
class MaskedConfig(IdsConfig):
    """Some ids given the others, in any order, as MaskGIT does."""

    module: ClassVar[str] = "vqscale.priors.masked:Masked"
    sampling: ClassVar[type[SampleConfig]] = MaskedSampleConfig
    any_order: ClassVar[bool] = True
    name: Literal["masked"] = "masked"
    """which prior"""
    net: TransformerConfig = field(default_factory=TransformerConfig)
    """the transformer, in which every token sees all"""
    mask_law: MaskLaw = "cosine"
    """share masked in training for r uniform in [0, 1): cosine cos(pi r / 2), arccos 2 arccos(r) / pi, linear 1 - r,
    square 1 - r^2, cubic 1 - r^3, root 1 - sqrt(r)"""
    least_masked: float = 0.0
    """smallest share that is masked in training; FSQ's MaskGIT has 0.45, and any above 0.2 steadies it"""
    unmasked_weight: float = 0.0
    """weight of an id that is not masked in the loss of its image, a masked one having 1: 0 asks the head about masked
    ids alone, 1 is the loss on all (Halton-MaskGIT)"""
    bound_passes: int = 4
    """masks drawn for each held-out image, their numbers of masked ids spread evenly: the more, the less variance"""

    @property
    def bound(self) -> str:
        return "means over random orders in which ids are predicted"

    def against(self, settings: SampleConfig) -> Iterable[tuple[str, str]]:
        steps = getattr(settings, "steps", 1)
        if self.grid is not None and steps > self.num_tokens:
            yield (
                "steps",
                f"steps is {steps}, but an image of this prior has {self.num_tokens} ids (grid {list(self.grid)}), and "
                f"every step reveals at least one: use at most {self.num_tokens}",
            )

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        yield from unturned(self.net, self.grid)
        if not 0 <= self.least_masked < 1:
            yield "least_masked", f"least_masked is {self.least_masked}: use a share from 0 to below 1"
        if not 0 <= self.unmasked_weight <= 1:
            yield "unmasked_weight", f"unmasked_weight is {self.unmasked_weight}: use a weight from 0 to 1"
        if self.bound_passes < 1:
            yield "bound_passes", f"bound_passes is {self.bound_passes}: use at least 1"
