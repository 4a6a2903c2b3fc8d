"""The settings of alignment, which draws the codes of images towards the features of a frozen vision model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vqscale.engine.config import OptimConfig
from vqscale.nets.config import by
from vqscale.nets.config.vision import VisionConfig


@dataclass(frozen=True)
class AlignmentConfig:
    """One minus the cosine of a map of the codes that the decoder is given and the features of their places."""

    vision: VisionConfig
    """the frozen vision transformer"""
    layer: int | None = None
    """block, numbered from 1, after which features are taken; null is the last"""
    tokens_per_feature: int = 1
    """tokens along each side whose mean is aligned with one feature: fewer features take less time"""
    weight: float = 0.5
    """weight of the loss"""
    hidden: int = 1024
    """hidden numbers of the map from codes to features, which is trained beside the tokenizer and is no part of it"""
    optim: OptimConfig | None = None
    """optimiser of the map; null is the tokenizer's"""

    @property
    def after(self) -> int:
        """The block after which features are taken."""
        return self.vision.num_layers if self.layer is None else self.layer

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.weight <= 0:
            yield "weight", f"weight is {self.weight}: use a positive number, or alignment: null for none"
        for key in ("hidden", "tokens_per_feature"):
            if getattr(self, key) < 1:
                yield key, f"{key} is {getattr(self, key)}: use at least 1"
        if not 1 <= self.after <= self.vision.num_layers:
            yield (
                "layer",
                f"layer is {self.layer}, and vision has blocks 1 to {self.vision.num_layers} (vision.num_layers): use "
                "one of them, or null for the last",
            )

    def grid_problems(self, places: Sequence[int]) -> Iterable[tuple[str, str]]:
        """(key of a run, message) where there are no features for a grid of so many tokens."""
        if any(side % max(1, self.tokens_per_feature) for side in places):
            yield (
                "loss.alignment.tokens_per_feature",
                f"{by(places)} tokens of a sample cannot be cut into squares of {self.tokens_per_feature} "
                "(tokens_per_feature), each of which has one feature: use a number that divides both sides, such as 1",
            )
