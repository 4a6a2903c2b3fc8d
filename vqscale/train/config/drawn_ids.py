"""The settings of ids that a prior has drawn, for a decoder to learn from. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vqscale.config import Free


@dataclass(frozen=True)
class DrawnIdsConfig:
    """A share of every batch gives the decoder ids that a prior has drawn, of the image's class where there are any.
    There is no image of such ids, so that the discriminator alone says what the decoder makes of them."""

    from_: Free[str]
    """the cache that `vqscale sample --ids` wrote of the tokenizer that init takes"""
    share: float = 0.25
    """so large a share of the images gives drawn ids in the place of its own, a whole number of every process"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if not self.from_:
            yield "from", "from is empty, which names no cache: give the one that `vqscale sample --ids` wrote"
        if not 0 < self.share < 1:
            yield "share", f"share is {self.share}: use more than 0 and less than 1, or drawn: null for none"

    def count(self, images: int) -> int:
        """How many of so many images give drawn ids. ValueError where that is none, all or no whole number."""
        count = round(self.share * images)
        if abs(count - self.share * images) > 0.01 or not 0 < count < images:
            raise ValueError(
                f"drawn.share is {self.share}, and a process has {images} images at a time (data.batch / processes / "
                f"engine.accumulation), of which that is {self.share * images:g}: use a whole number of them that "
                f"leaves some, as {max(1, min(count, images - 1)) / images:g}, or another data.batch"
            )
        return count
