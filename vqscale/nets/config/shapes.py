"""The settings of the shapes classifier, as a frozen dataclass that its card repeats. Imports no torch.

The network is in shapes_classifier.py, its training in train/shapes_classifier.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ShapesClassifierConfig:
    """A judge of drawn pictures of one size: how large it is, and what it is trained on."""

    image_size: int = 32
    """pixels of a side of the pictures it knows"""
    width: int = 24
    """channels of its first layer; it has four times as many features"""
    steps: int = 800
    """optimiser steps of its training"""
    batch: int = 64
    """pictures of a step, over all processes"""
    num_images: int = 8192
    """pictures it is trained on, again and again, each time mirrored and coloured in another way"""
    num_held_out: int = 2000
    """further pictures that its own accuracy is measured on"""
    lr: float = 3e-3
    """peak learning rate"""
    seed: int = 0
    """which pictures, which first weights"""

    def problems(self) -> Iterable[tuple[str, str]]:
        for key, least in (("image_size", 8), ("steps", 1), ("batch", 1), ("num_images", 1), ("num_held_out", 1)):
            if getattr(self, key) < least:
                yield key, f"{key} is {getattr(self, key)}: use at least {least}"
        if self.width < 8 or self.width % 8:
            yield "width", f"width is {self.width}, and its channels are normalised in 8 groups: use a multiple of 8"
        if self.lr <= 0:
            yield "lr", f"lr is {self.lr}: use a positive learning rate"
