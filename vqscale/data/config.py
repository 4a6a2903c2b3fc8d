"""What a source of samples is asked for, without torch: the configs of data/samples.py, and which media there are.
Read before anything heavy is imported.

A medium is what lies in the shards and how its bytes become samples (images: pixels.py, of several shapes:
config_buckets.py and buckets.py; depth and segments: config_dense.py and dense.py; sounds: config_sounds.py and
sounds.py). To add one: its settings, a ShardsConfig with a class that reads, and its line in MEDIA.

Not here: the batch, the seed and the ranks (a run decides those), and anything that looks at the disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vqscale.config import Free, OneOf
from vqscale.data.as_trained import as_trained

# One line for each medium: its name in a config, and where its settings are.
MEDIA = {
    "images": "vqscale.data.config:ImagesConfig",
    "depth": "vqscale.data.config_dense:DepthConfig",
    "panoptic": "vqscale.data.config_dense:PanopticConfig",
    "sounds": "vqscale.data.config_sounds:SoundsConfig",
    "buckets": "vqscale.data.config_buckets:BucketsConfig",
}

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
class DrawnConfig:
    """Samples made by arithmetic, written to the shards that `shards` names when they do not exist."""

    plan: ClassVar[str]
    """what makes them, as `module:function`: of these settings a made.make.Plan"""
    things: ClassVar[str]
    """what they are called in messages"""
    least: ClassVar[Mapping[str, int]]
    """keys that have a least number, and that"""

    def problems(self) -> Iterable[tuple[str, str]]:
        """(key, message) of all that cannot be made."""
        for key, least in self.least.items():
            if getattr(self, key) < least:
                yield key, f"{key} is {getattr(self, key)}, but {self.things} can be made from {least} on: raise {key}"


# One line for each drawn source of pictures: its name in a config, and where its settings are.
DRAWN = {"shapes": "vqscale.data.config:ShapesConfig", "scenes": "vqscale.data.config_dense:ScenesConfig"}

if TYPE_CHECKING:
    PicturesMade = DrawnConfig
else:
    PicturesMade = OneOf(DRAWN)


@dataclass(frozen=True)
class ShapesConfig(DrawnConfig):
    """Pictures made by arithmetic, written to the shards that `shards` names when they do not exist."""

    plan: ClassVar[str] = "vqscale.data.made.make:shapes"
    things: ClassVar[str] = "shapes"
    least: ClassVar[Mapping[str, int]] = {"num_images": 1, "size": 8, "first_index": 0}
    without_name: ClassVar[bool] = True  # configs from before there were others

    num_images: int = 4096
    "pictures in all, spread evenly over the shards"
    size: int = 64
    "pixels of a side"
    first_index: int = 0
    "number of the first picture; a held-out set begins where the training set ends"
    seed: int = 0
    "which endless set of pictures"
    source: Literal["shapes"] = "shapes"
    "what is drawn"


@dataclass(frozen=True)
class ShardsConfig:
    """WebDataset tar shards of any medium, as they are: a member with a sample, further ones where it takes several,
    and `key.cls` or `key.json` for its label.
    """

    module: ClassVar[str]
    """what reads, as `module:Class`: see data/samples.py"""
    suffixes: ClassVar[tuple[str, ...]]
    """of the member that is read, the first of these that is there"""
    labels: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """of the members that a sample needs beside it, for each the suffixes that it may have"""
    kind: ClassVar[str]
    """what the samples are called in messages"""
    measure: ClassVar[str] = ""
    """what tells the sides of a sample by the head of its file, as `module:function`, where the index has them"""
    seen: ClassVar[tuple[str, ...]] = ()
    """keys that ids depend on, which the card of a tokenizer has from its training"""
    asked: ClassVar[tuple[str, ...]] = ()
    """of what may be asked of an encoding in place of that, what is about these samples"""

    shards: Free[str | tuple[str, ...]]
    "tar shards: paths or URLs with brace lists a-{0000..1023}.tar or *, joined by ::, pipe:COMMAND, or a list of these"
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

    @property
    def members(self) -> tuple[tuple[str, ...], ...]:
        """The members that are read, for each the suffixes that it may have: the first of these that is there."""
        return self.suffixes, *self.labels

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, *sides) of the samples that come out, all alike; of several shapes the one with the most values."""
        raise NotImplementedError

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """All shapes of the samples that come out; a batch has one of them."""
        return (self.shape,)

    @property
    def least_side(self) -> int:
        """The smallest side of any sample."""
        return min(side for _, *sides in self.shapes for side in sides)

    @property
    def sides(self) -> tuple[int, ...]:
        return self.shape[1:]

    @property
    def drawn(self) -> DrawnConfig | None:
        """What to make the shards of if they do not exist."""
        return None

    @property
    def views(self) -> Mapping[str, tuple[str, ...]]:
        """The views of a sample that an encoding may write, by the name of their choice; the first is evaluation's."""
        return {"center": ("center",)}

    @property
    def card(self) -> dict[str, Any]:
        """What ids depend on beside the shards: part of the identity of a token cache (data/tokens/format.py)."""
        raise NotImplementedError

    @classmethod
    def encoded(cls, card: Mapping[str, Any], asked: Mapping[str, Any], views: str) -> dict[str, Any]:
        """Keys for samples that a tokenizer encodes in these views: as asked for, or else as its card says."""
        return {key: found[key] for found in (card, asked) for key in cls.seen if found.get(key) is not None}

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
        for key, least in (("window_shards", 0), ("num_workers", 0), ("max_broken", 1)):
            if getattr(self, key) < least:
                yield key, f"{key} is {getattr(self, key)}, but must be at least {least}: raise {key}"
        if not self.cache_gb > 0:
            yield (
                "cache_gb",
                f"cache_gb is {self.cache_gb}, but a cache must hold at least the shards in use: raise cache_gb",
            )


if TYPE_CHECKING:
    MediumConfig = ShardsConfig
else:
    MediumConfig = OneOf(MEDIA)


@dataclass(frozen=True)
class ImagesConfig(ShardsConfig):
    """WebDataset tar shards of images, as they are: members `key.jpg` (jpeg, png, webp), and `key.cls` or `key.json`
    for a label.
    """

    module: ClassVar[str] = "vqscale.data.pixels:Pictures"
    suffixes: ClassVar[tuple[str, ...]] = ("jpg", "jpeg", "png", "webp")
    kind: ClassVar[str] = "images"
    seen: ClassVar[tuple[str, ...]] = ("image_size", "resize", "interpolation")
    asked: ClassVar[tuple[str, ...]] = seen
    without_name: ClassVar[bool] = True  # configs without a medium are of images

    medium: Literal["images"] = "images"
    "what lies in the shards"
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
    make: PicturesMade | None = None
    "if the shards do not exist, make them with these drawn pictures"

    @property
    def shape(self) -> tuple[int, ...]:
        return 3, self.image_size, self.image_size

    @property
    def drawn(self) -> DrawnConfig | None:
        return self.make

    @property
    def views(self) -> Mapping[str, tuple[str, ...]]:
        return {str(kind): views for kind, views in VIEWS.items()}

    @property
    def card(self) -> dict[str, Any]:
        return {"image_size": self.image_size, "short_side": self.short_side, "interpolation": self.interpolation}

    @classmethod
    def encoded(cls, card: Mapping[str, Any], asked: Mapping[str, Any], views: str) -> dict[str, Any]:
        size = asked.get("image_size") or card.get("image_size")
        if size is None:  # there is no more to say before a tokenizer is looked at
            return {"crop": "center"}
        known = as_trained(card, asked.get("image_size"), asked.get("resize"), asked.get("interpolation"))
        resize = asked.get("resize") or (int(size * 1.1) if views == "ten_crop" else known["resize"] or size)
        if views == "ten_crop" and resize == size:
            raise ValueError(f"--resize {resize} is the size of the images: the places of ten_crop are one; raise it")
        return {**known, "resize": resize, "crop": "center"}

    @property
    def short_side(self) -> int:
        """Pixels of the short side before the crop."""
        return self.image_size if self.resize is None else self.resize

    def problems(self) -> Iterable[tuple[str, str]]:
        """(key, message) of all that cannot be read, as far as one can say without looking at the disk."""
        yield from super().problems()
        yield from box_problems(self.image_size, self.min_area)
        if self.resize is not None and self.resize < self.image_size:
            yield (
                "resize",
                f"the short side is resized to {self.resize}, from which no square of image_size {self.image_size} can "
                "be cut: raise resize or lower image_size",
            )


def box_problems(image_size: int, min_area: float) -> Iterable[tuple[str, str]]:
    """(key, message) of what is no size of images, and no share of an area that a box is drawn from."""
    if image_size < 1:
        yield "image_size", f"image_size is {image_size}, but must be at least 1: raise image_size"
    if not 0 < min_area <= 1:
        yield "min_area", f"min_area is {min_area}, but a share of an area is above 0 and at most 1: change min_area"
