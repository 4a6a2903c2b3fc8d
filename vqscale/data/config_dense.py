"""Media of images with a label for every pixel, without torch: depth, and panoptic segments. What reads them is
data/depth.py and data/panoptic.py; what is common, a box and a flip that image and labels share, is data/dense.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from vqscale.data.config import DrawnConfig, ImagesConfig, Interpolation, ShardsConfig, box_problems

EvaluationCrop = Literal["whole", "eigen", "uvim"]
EVALUATION_CROPS: dict[EvaluationCrop, tuple[int, int, int, int] | None] = {
    "whole": None,
    "eigen": (41, 45, 601, 471),
    "uvim": (41, 54, 601, 480),
}
"The boxes (left, top, right, bottom) of NYU Depth v2 that depth is measured in, of images of 640 x 480."


@dataclass(frozen=True)
class DenseConfig(ShardsConfig):
    """WebDataset shards of images with labels of their pixels: a member `key.jpg` (jpeg, png, webp), and those of its
    labels, as large as the image.
    """

    suffixes: ClassVar[tuple[str, ...]] = ImagesConfig.suffixes
    seen: ClassVar[tuple[str, ...]] = ("image_size", "interpolation")
    asked: ClassVar[tuple[str, ...]] = seen
    channels: ClassVar[int]
    """of a sample: the three of its image in [-1, 1], then those of its labels"""

    image_size: int = 512
    "pixels of a side of the samples, to which what is cut out is stretched"
    crop: Literal["resized", "whole"] = "resized"
    "what training takes: a box of random area and aspect, or the whole image; evaluation never takes a random one"
    min_area: float = 0.05
    "smallest share of the image's area that crop: resized takes"
    flip: bool = True
    "mirror half of the training samples"
    interpolation: Interpolation = "sampled"
    "of the image; labels are those of the nearest pixel; sampled = bilinear without antialiasing, as published"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.channels, self.image_size, self.image_size

    @property
    def views(self) -> Mapping[str, tuple[str, ...]]:
        return {"center": ("whole",), "flip": ("whole", "whole mirrored")}

    @property
    def card(self) -> dict[str, Any]:
        return {"reading": (("image_size", self.image_size), ("interpolation", self.interpolation))}

    def stated(self) -> dict[str, Any]:
        """What `_info.json` beside the first shard says of the set; nothing where there is none, or it is damaged."""
        try:
            return dict(json.loads(Path(os.path.dirname(self.patterns[0]), "_info.json").read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        yield from box_problems(self.image_size, self.min_area)


@dataclass(frozen=True)
class CategoryConfig:
    """A category of segments, as COCO's files have them."""

    id: int
    "its number in panoptic.json, or in seg.png"
    name: str
    "what it is called"
    isthing: bool
    "whether its objects are counted; otherwise it is stuff, of which an image has one segment"


@dataclass(frozen=True)
class ScenesConfig(DrawnConfig):
    """Drawn scenes with the depth and the segments of every pixel, written to the shards that `shards` names when they
    do not exist."""

    plan: ClassVar[str] = "vqscale.data.made.scenes:scenes"
    things: ClassVar[str] = "scenes"
    least: ClassVar[Mapping[str, int]] = {"num_images": 1, "size": 8, "first_index": 0}
    categories: ClassVar[tuple[CategoryConfig, ...]] = tuple(
        CategoryConfig(number, name, isthing=number <= 5)
        for number, name in enumerate(
            ("ball", "box", "cone", "star", "ring", "tiles", "grass", "wall", "bricks", "sky"), start=1
        )
    )
    """of their segments"""

    num_images: int = 4096
    "scenes in all, spread evenly over the shards"
    size: int = 64
    "pixels of a side"
    first_index: int = 0
    "number of the first scene; a held-out set begins where the training set ends"
    seed: int = 0
    "which endless set of scenes"
    far: float = 3.8
    "metres to the farthest thing; small pictures show little of what is farther"
    source: Literal["scenes"] = "scenes"
    "what is drawn"

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        if not 2 <= self.far <= 8:
            yield "far", f"far is {self.far} m, but things stand between 1.5 m and 2 to 8 m away: change far"


@dataclass(frozen=True)
class DepthConfig(DenseConfig):
    """WebDataset shards of images with their depth: members `key.jpg` (jpeg, png, webp) and `key.depth.png`, gray of 16
    bits, of which 0 is missing.
    """

    module: ClassVar[str] = "vqscale.data.depth:DepthMaps"
    labels: ClassVar[tuple[tuple[str, ...], ...]] = (("depth.png",),)
    kind: ClassVar[str] = "images with depth"
    channels: ClassVar[int] = 4

    medium: Literal["depth"] = "depth"
    "what lies in the shards"
    unit_m: float | None = None
    "metres that a step of depth.png is, 0.001 for millimetres; null = as `_info.json` beside the shards says"
    evaluation_crop: EvaluationCrop = "whole"
    "what evaluation takes of images of 640 x 480, those of NYU: eigen is rows 45..470, uvim rows 54..479"
    make: ScenesConfig | None = None
    "if the shards do not exist, make them with these drawn scenes"

    @property
    def drawn(self) -> ScenesConfig | None:
        return self.make

    @property
    def card(self) -> dict[str, Any]:
        reading = (*super().card["reading"], ("evaluation_crop", self.evaluation_crop), ("unit_m", self.unit_m))
        return {"reading": reading}

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        if self.unit_m is not None and not self.unit_m > 0:
            yield "unit_m", f"unit_m is {self.unit_m}, but a step of depth is above 0 metres: use 0.001 for millimetres"

    @property
    def unit(self) -> float:
        """Metres that a step of depth.png is. ValueError where nothing says it."""
        stated = self.stated().get("depth")
        unit = self.unit_m or (stated.get("unit_m") if isinstance(stated, dict) else None)
        if not isinstance(unit, float | int) or not unit > 0:
            raise ValueError(
                f"nothing says what a step of depth.png in {self.patterns[0]} is in metres: data.train.unit_m (val.) "
                f"is {self.unit_m}, and `_info.json` beside the shards has no depth.unit_m above 0: set unit_m, 0.001 "
                "where the files are in millimetres"
            )
        return float(unit)


@dataclass(frozen=True)
class PanopticConfig(DenseConfig):
    """WebDataset shards of images with their segments: members `key.jpg` (jpeg, png, webp), `key.panoptic.png` with
    the number of each pixel's segment, R + 256 G + 65536 B (0 = void), and `key.panoptic.json` with `segments_info`; or
    in place of these two `key.seg.png` with the id of each pixel's category, gray or by a palette (void = the largest
    number of its bits, 255 or 65535, and 0 where no category has it).
    """

    module: ClassVar[str] = "vqscale.data.panoptic:Segments"
    labels: ClassVar[tuple[tuple[str, ...], ...]] = (("panoptic.png", "seg.png"), ("seg.png", "panoptic.json"))
    """seg.png stands for both; beside panoptic.png it shows as the second"""
    kind: ClassVar[str] = "images with segments"
    channels: ClassVar[int] = 6

    medium: Literal["panoptic"] = "panoptic"
    "what lies in the shards"
    categories: str | tuple[CategoryConfig, ...] | None = None
    "path of a JSON file with a list of id, name, isthing, or the list; null = as `_info.json` beside the shards says"
    make: ScenesConfig | None = None
    "if the shards do not exist, make them with these drawn scenes"

    @property
    def drawn(self) -> ScenesConfig | None:
        return self.make

    def classes(self) -> tuple[CategoryConfig, ...]:
        """The categories in the order of their classes 1, 2, ...: things, then stuff, both as they are listed.
        ValueError where nothing says them.
        """
        found = self.categories if isinstance(self.categories, tuple) else _categories(self)
        numbers = [category.id for category in found]
        if not found or len(set(numbers)) < len(numbers):
            raise ValueError(
                f"{len(numbers)} categories for {self.patterns[0]} with {len(set(numbers))} different ids, from "
                f"{self.categories or '_info.json'}: list each id once, and at least one"
            )
        return tuple(sorted(found, key=lambda category: not category.isthing))

    def counts(self) -> tuple[int, int] | None:
        """(categories of things, of stuff); None where that cannot be had, which is said when the shards are read."""
        try:
            found = self.make.categories if self.make and not self.categories else self.classes()
        except ValueError:
            return None
        things = sum(category.isthing for category in found)
        return things, len(found) - things


def _categories(config: PanopticConfig) -> tuple[CategoryConfig, ...]:
    place = config.categories or f"`_info.json` beside {config.patterns[0]}"
    try:
        return categories_of(
            json.loads(Path(str(config.categories)).read_text()) if config.categories else config.stated()
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the categories of the segments cannot be had from {place} ({type(error).__name__}: {error}): set "
            "data.train.categories (val.) to the file of your set, panoptic_coco_categories.json for COCO"
        ) from None


def categories_of(known: Any) -> tuple[CategoryConfig, ...]:
    """The categories of what a JSON file holds: a list of id, name and isthing, or an object that has it under
    `categories`. ValueError, KeyError or TypeError where it holds neither."""
    found = known["categories"] if isinstance(known, dict) else known
    return tuple(CategoryConfig(int(x["id"]), str(x["name"]), bool(x["isthing"])) for x in found)


def as_stated(categories: Iterable[CategoryConfig]) -> list[dict[str, Any]]:
    """Categories as `_info.json` and COCO's files have them."""
    return [{**asdict(category), "isthing": int(category.isthing)} for category in categories]
