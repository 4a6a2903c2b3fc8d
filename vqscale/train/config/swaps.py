"""The settings of ids that a decoder is trained on beside those of its images. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class SwapsConfig:
    """Of every image a share of the ids is swapped for near ones before the decoder is given them."""

    share: float = 0.2
    """at most so large a share of an image's ids, drawn for each image between 0 and this"""
    neighbours: int = 8
    """an id is swapped for one of so many codes nearest to its own, found exactly"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if not 0 < self.share <= 1:
            yield (
                "share",
                f"share is {self.share}: use more than 0 and at most 1, or swaps: null for none",
            )
        if self.neighbours < 1:
            yield "neighbours", f"neighbours is {self.neighbours}: use at least 1"
