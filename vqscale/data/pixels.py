"""From the bytes of an image file to pixels: decoding to RGB whatever the file holds, and augmentation by an explicit
seed.

Pillow decides what a file is by its content, not by its name. Colour profiles are not applied, as in the published
pipelines.
"""

from __future__ import annotations

import io
import math
import random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from vqscale.data.config import ImagesConfig

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def decode(data: bytes) -> Image.Image:
    """An RGB image, upright by its EXIF orientation. Transparency is put on white; 16 bits keep their high byte.

    Raises whatever the decoder raises on data that is not a whole image (OSError, SyntaxError, ...).
    """
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError(f"these {len(data)} bytes, {data[:8]!r} first, are no image") from None
    image.load()
    # Pillow takes every CMYK JPEG for Adobe's, which stores inverted inks; a file without Adobe's mark does not.
    wrongly_inverted = image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info
    if "exif" in image.info or "Raw profile type exif" in image.info:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if wrongly_inverted:
        return ImageChops.invert(image).convert("RGB")
    if image.mode.startswith("I"):  # gray of 16 bits; convert() would clip it at 255
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def augment(image: Image.Image, config: ImagesConfig, seed: int | None) -> NDArray[np.uint8]:
    """uint8 (S, S, 3), S = image_size. A pure function of its arguments; seed None is evaluation: centre crop, no
    flip.
    """
    size, filter_ = config.image_size, _FILTERS[config.interpolation]
    draw = random.Random(seed)  # random() of one seed is the same in every version of Python
    if seed is not None and config.crop == "resized":
        image = image.resize((size, size), filter_, box=_some_box(image.size, config.min_area, draw))
    else:
        image = resize_short(image, config.short_side, filter_)
        width, height = image.size
        if seed is not None and config.crop == "random":
            left, top = int(draw.random() * (width - size + 1)), int(draw.random() * (height - size + 1))
        else:
            left, top = (width - size) // 2, (height - size) // 2
        if (width, height) != (size, size):
            image = image.crop((left, top, left + size, top + size))
    if seed is not None and config.flip and draw.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image)


def resize_short(image: Image.Image, short: int, filter_: Image.Resampling) -> Image.Image:
    """The image with its short side at `short` pixels, the long side in proportion, rounded down."""
    width, height = image.size
    if min(width, height) == short:
        return image
    if width <= height:
        return image.resize((short, max(short, short * height // width)), filter_)
    return image.resize((max(short, short * width // height), short), filter_)


def _some_box(size: tuple[int, int], min_area: float, draw: random.Random) -> tuple[int, int, int, int]:
    """A box of random area and aspect in [3/4, 4/3]; after ten misses the largest centred box of such an aspect."""
    width, height = size
    for _ in range(10):
        area = width * height * (min_area + (1 - min_area) * draw.random())
        aspect = math.exp(math.log(4 / 3) * (2 * draw.random() - 1))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draw.random() * (width - w + 1)), int(draw.random() * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, (width - w) // 2 + w, (height - h) // 2 + h
