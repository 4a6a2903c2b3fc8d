"""What a source of images, or of their ids, is asked for, without torch: the configs of data/images.py and
data/tokens/stream.py, read before anything heavy is imported.

Not here: the batch, the seed and the ranks (a run decides those), and anything that looks at the disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vqscale.config import Free

Interpolation = Literal["bicubic", "bilinear", "sampled"]
INTERPOLATIONS: tuple[Interpolation, ...] = ("bicubic", "bilinear", "sampled")
Views = Literal["center", "flip", "ten_crop"]
VIEWS: dict[Views, tuple[str, ...]] = {
    "center": ("center",),
    "flip": ("center", "center mirrored"),
    "ten_crop": tuple(
        f"{place}{mirrored}"
        for mirrored in ("", " mirrored")
        for place in ("center", "top left", "top right", "bottom left", "bottom right")
    ),
}
"The views of an image that an encoding writes, in their order."


@dataclass(frozen=True)
class ShapesConfig:
    """Pictures made by arithmetic, written to the shards that `shards` names when they do not exist."""

    num_images: int = 4096
    "pictures in all, spread evenly over the shards"
    size: int = 64
    "pixels of a side"
    first_index: int = 0
    "number of the first picture; a held-out set begins where the training set ends"
    seed: int = 0
    "which endless set of pictures"

    def problems(self) -> Iterable[tuple[str, str]]:
        """(key, message) of all that cannot be made."""
        for key, least in (("num_images", 1), ("size", 8), ("first_index", 0)):
            if getattr(self, key) < least:
                yield key, f"{key} is {getattr(self, key)}, but shapes can be made from {least} on: raise {key}"


@dataclass(frozen=True)
class ImagesConfig:
    """WebDataset tar shards of images, as they are: members `key.jpg` (jpeg, png, webp), and `key.cls` or `key.json`
    for a label.
    """

    shards: Free[str | tuple[str, ...]]
    "tar shards: paths or URLs with brace lists a-{0000..1023}.tar or *, joined by ::, pipe:COMMAND, or a list of these"
    image_size: int = 256
    "pixels of a side of the images that come out"
    resize: int | None = None
    "pixels that the short side is resized to before the crop; null = image_size"
    crop: Literal["random", "center", "resized"] = "random"
    "square that training takes; resized = random area and aspect, then resized; evaluation always takes center"
    min_area: float = 0.25
    "smallest share of the image's area that crop: resized takes"
    flip: bool = False
    "mirror half of the training images; false is the published augmentation"
    interpolation: Interpolation = "bicubic"
    "of the resize: a filter, with antialiasing; sampled = bilinear between the nearest pixels, without (OpenCV's)"
    window_shards: int = 32
    "shards whose samples are shuffled together: more mixes better, fewer reads closer together; 0 = all shards"
    num_workers: Free[int] = 2
    "processes per rank that read and decode; 0 = in the training process"
    max_broken: Free[int] = 100
    "broken samples in a row, and in a run in all, after which the run stops with an error"
    cache_dir: Free[str | None] = None
    "where shards that come from a command or a URL are kept; null = $XDG_CACHE_HOME/vqscale or ~/.cache/vqscale"
    cache_gb: Free[float] = 100.0
    "most gigabytes of such shards to keep; the least recently used go first"
    index_dir: Free[str | None] = None
    "where the list of samples is kept (a shared disk saves every machine the reading); null = cache_dir"
    make: ShapesConfig | None = None
    "if the shards do not exist, make them with these drawn pictures"

    @property
    def sides(self) -> tuple[int, int]:
        """Pixels of each side of the images that come out."""
        return self.image_size, self.image_size

    @property
    def short_side(self) -> int:
        """Pixels of the short side before the crop."""
        return self.image_size if self.resize is None else self.resize

    @property
    def patterns(self) -> tuple[str, ...]:
        """`shards` as a tuple, not expanded."""
        return (self.shards,) if isinstance(self.shards, str) else tuple(self.shards)

    def problems(self) -> Iterable[tuple[str, str]]:
        """(key, message) of all that cannot be read, as far as one can say without looking at the disk."""
        if not self.patterns or not all(self.patterns):
            yield (
                "shards",
                f"shards is {self.shards!r}, which names no shard: give a path such as data/train-{{000..127}}.tar",
            )
        for key, least in (("image_size", 1), ("window_shards", 0), ("num_workers", 0), ("max_broken", 1)):
            if getattr(self, key) < least:
                yield key, f"{key} is {getattr(self, key)}, but must be at least {least}: raise {key}"
        if self.resize is not None and self.resize < self.image_size:
            yield (
                "resize",
                f"the short side is resized to {self.resize}, from which no square of image_size {self.image_size} can "
                "be cut: raise resize or lower image_size",
            )
        if not 0 < self.min_area <= 1:
            yield (
                "min_area",
                f"min_area is {self.min_area}, but a share of an area is above 0 and at most 1: change min_area",
            )
        if not self.cache_gb > 0:
            yield (
                "cache_gb",
                f"cache_gb is {self.cache_gb}, but a cache must hold at least the shards in use: raise cache_gb",
            )


def as_trained(
    card: Mapping[str, Any], image_size: int | None, resize: int | None, interpolation: str | None
) -> dict[str, Any]:
    """These keys of ImagesConfig as asked for, or (None) as the card of a tokenizer says, or else 256 pixels,
    bicubic. The card's resize goes with its size. A tokenizer seen through another filter gives other numbers and ids.
    """
    return {
        "image_size": (card.get("image_size") or 256) if image_size is None else image_size,
        "resize": card.get("resize") if image_size is None and resize is None else resize,
        "interpolation": interpolation or card.get("interpolation") or "bicubic",
    }


@dataclass(frozen=True)
class TokensConfig:
    """A token cache: ids of images that `vqscale encode` has encoded."""

    path: Free[str]
    "folder of the cache"
    views: Literal["all", "first"] = "all"
    "views that training draws from, one per sample and epoch; first = the centre alone; evaluation always takes it"
    window_shards: int = 64
    "storage shards whose samples are shuffled together; a rank holds its part of two windows in memory; 0 = all"
    tokenizer: str | None = None
    "fingerprint, or how it begins, that the tokenizer of the cache must have; null = not asked for"

    def problems(self) -> Iterable[tuple[str, str]]:
        """(key, message) of all that cannot be read, as far as one can say without looking at the disk."""
        if not self.path:
            yield "path", "path is empty, which names no cache: give the folder that `vqscale encode` wrote"
        if self.window_shards < 0:
            yield (
                "window_shards",
                f"window_shards is {self.window_shards}, but must be at least 0 (all): raise window_shards",
            )
