"""The settings of the classifiers of what is drawn here, frozen dataclasses that their cards repeat. Imports no torch.

The networks are in classifiers.py, their training in train/classifiers.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class _Settings:
    """What every classifier has: how large it is, and what it is trained on."""

    least: ClassVar[Mapping[str, int]] = {"steps": 1, "batch": 1, "num_images": 1, "num_held_out": 1}

    width: int = 24
    """channels of its first layer; it has four times as many features"""
    steps: int = 800
    """optimiser steps of its training"""
    batch: int = 64
    """samples of a step, over all processes"""
    num_images: int = 8192
    """samples it is trained on, again and again, each time varied in another way"""
    num_held_out: int = 2000
    """further samples that its own accuracy is measured on"""
    lr: float = 3e-3
    """peak learning rate"""
    seed: int = 0
    """which samples, which first weights"""

    def problems(self) -> Iterable[tuple[str, str]]:
        for key, least in self.least.items():
            if getattr(self, key) < least:
                yield key, f"{key} is {getattr(self, key)}: use at least {least}"
        if self.width < 8 or self.width % 8:
            yield "width", f"width is {self.width}, and its channels are normalised in 8 groups: use a multiple of 8"
        if self.lr <= 0:
            yield "lr", f"lr is {self.lr}: use a positive learning rate"


@dataclass(frozen=True)
class ShapesClassifierConfig(_Settings):
    """A judge of drawn pictures of one size."""

    least: ClassVar[Mapping[str, int]] = {"image_size": 8, **_Settings.least}

    image_size: int = 32
    """pixels of a side of the pictures it knows"""


@dataclass(frozen=True)
class SoundsClassifierConfig(_Settings):
    """A judge of drawn sounds of one rate and any length, by their mel bands."""

    least: ClassVar[Mapping[str, int]] = {"sample_rate": 4000, **_Settings.least}

    steps: int = 600
    batch: int = 32
    num_images: int = 2000
    num_held_out: int = 500
    sample_rate: int = 16000
    """samples per second of the sounds it knows"""
    seconds: float = 2.0
    """length of the sounds it is trained on, of each of which it sees a half at a time"""
    mel_window: int = 1024
    """samples of a window of the mel bands"""
    mel_hop: int = 256
    """samples from one window to the next"""
    num_mels: int = 64
    """mel bands from 0 to half the rate"""
