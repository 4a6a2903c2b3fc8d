"""The medium of images of several shapes, without torch: every image comes out in the bucket whose aspect is nearest to
its own, and a batch is of one bucket. What reads them is buckets.py, their order is order_buckets.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vqscale.data.as_trained import as_trained
from vqscale.data.config import DrawnConfig, ImagesConfig, Interpolation, PicturesMade, ShardsConfig

Sides = tuple[int, int]


@dataclass(frozen=True)
class BucketsConfig(ShardsConfig):
    """WebDataset tar shards of images as medium images takes them, which keep their aspect as far as the buckets go.

    An image is resized until it covers its bucket, and what is left over on one axis is cut off. The index reads the
    head of every file once, for its sides.
    """

    module: ClassVar[str] = "vqscale.data.buckets:BucketPictures"
    suffixes: ClassVar[tuple[str, ...]] = ImagesConfig.suffixes
    kind: ClassVar[str] = ImagesConfig.kind
    measure: ClassVar[str] = "vqscale.data.pixels:sides_of"
    seen: ClassVar[tuple[str, ...]] = ("buckets", "interpolation")

    medium: Literal["buckets"] = "buckets"
    "what lies in the shards"
    buckets: tuple[tuple[int, int], ...] = ((256, 256), (224, 288), (288, 224), (192, 336), (336, 192))
    "height and width in pixels of the images of each bucket"
    crop: Literal["random", "center"] = "random"
    "what training cuts off; evaluation always takes the centre"
    flip: bool = False
    "mirror half of the training images"
    interpolation: Interpolation = "bicubic"
    "of the resize: a filter, with antialiasing; sampled = bilinear between the nearest pixels, without (OpenCV's)"
    make: PicturesMade | None = None
    "if the shards do not exist, make them with these drawn pictures"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple((3, *sides) for sides in self.buckets)

    @property
    def shape(self) -> tuple[int, ...]:
        return max(self.shapes, key=math.prod)

    @property
    def drawn(self) -> DrawnConfig | None:
        return self.make

    @property
    def card(self) -> dict[str, Any]:
        return {"reading": (("buckets", self.buckets), ("interpolation", self.interpolation))}

    def problems(self) -> Iterable[tuple[str, str]]:
        """(key, message) of all that cannot be read, as far as one can say without looking at the disk."""
        yield from super().problems()
        if not self.buckets or min(side for sides in self.buckets for side in sides) < 1:
            yield "buckets", f"buckets are {list(self.buckets)}: give one [height, width] at least, of 1 pixel or more"
            return
        aspects: dict[float, tuple[int, int]] = {}
        for sides in self.buckets:
            aspect = sides[1] / sides[0]
            if aspect in aspects:
                yield (
                    "buckets",
                    f"the buckets {aspects[aspect]} and {sides} have one aspect, so nothing tells which of them an "
                    "image goes into: leave one of them out",
                )
            aspects[aspect] = sides


def images_as_trained(
    shards: str,
    workers: int,
    card: Mapping[str, Any],
    image_size: int | None,
    buckets: Sequence[Sides] | None,
    interpolation: Interpolation | None,
) -> ImagesConfig | BucketsConfig:
    """Images to look at once: squares of a size, or in buckets of (height, width); where neither is asked for as the
    card of a tokenizer says."""
    known = as_trained(card, image_size, None, interpolation)
    if buckets is None and image_size is None and card.get("buckets"):
        buckets = _sides(card["buckets"])
    if buckets is None:
        return ImagesConfig(shards, num_workers=workers, **known)
    return BucketsConfig(shards, num_workers=workers, buckets=tuple(buckets), interpolation=known["interpolation"])


def _sides(found: Any) -> list[Sides]:
    """The buckets in a card. ValueError for what is none: a card may be a stranger's."""
    whole = isinstance(found, list | tuple)
    if not whole or not all(isinstance(pair, list | tuple) and [*map(type, pair)] == [int, int] for pair in found):
        raise ValueError(
            f"the card of the tokenizer has buckets {found}, and buckets are pairs of a height and a width in pixels: "
            "give --image-size or --buckets"
        )
    return [(height, width) for height, width in found]
