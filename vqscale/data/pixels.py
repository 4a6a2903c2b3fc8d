"""The medium images, from the bytes of a file to pixels: decoding to RGB whatever the file holds, and augmentation by
an explicit seed.

Pillow decides what a file is by its content, not by its name. Colour profiles are not applied, as in the published
pipelines.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageChops, ImageOps, UnidentifiedImageError
from torch import Tensor

from vqscale.data.config import ImagesConfig, Interpolation, Views

# Pictures alone, decoded in this process: Pillow gives EPS to a program, which runs what is in the file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_LYING = (5, 6, 7, 8)  # orientations of EXIF that swap height and width
MOST_ASPECT = 16  # of an image that is enlarged or reduced whole
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
Box = tuple[float, float, float, float]
Places = NDArray[np.intp]


class Pictures:
    """How files of images become samples; pure functions of bytes, config and seed (data/samples.py: Reads)."""

    def __init__(self, config: ImagesConfig) -> None:
        self.config = config

    def sample(self, members: Sequence[bytes], seed: int | None, out: Tensor) -> bool:
        image = decode(*members)
        normalise(augment(image, self.config, seed), out)
        return min(image.size) < self.config.short_side

    def views(self, members: Sequence[bytes], kind: Views, out: Tensor) -> bool:
        image = decode(*members)
        for view, picture in zip(out, views(image, self.config, kind), strict=True):
            normalise(picture, view)
        return min(image.size) < self.config.short_side


def decode(data: bytes) -> Image.Image:
    """An RGB image, upright by its EXIF orientation. Transparency is put on white; 16 bits keep their high byte.

    Raises whatever the decoder raises on data that is not a whole image (OSError, SyntaxError, ...).
    """
    image = opened(data)
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


def sides_of(data: bytes) -> tuple[int, int]:
    """(height, width) of the image that a file begins with, upright as `decode` gives it, by its head alone. Raises
    whatever the decoder raises where the head is not whole."""
    image = opened(data)
    lies = image.getexif().get(ExifTags.Base.Orientation, 1) in _LYING
    return (image.width, image.height) if lies else (image.height, image.width)


def opened(data: bytes) -> Image.Image:
    """The image of a file, its header read. ValueError for what is in none of FORMATS."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(
            f"these {len(data)} bytes, {data[:8]!r} first, are no image in a format that is read ({', '.join(FORMATS)})"
        ) from None


def augment(image: Image.Image, config: ImagesConfig, seed: int | None) -> NDArray[np.uint8]:
    """uint8 (S, S, 3), S = image_size: a pure function of its arguments. Seed None is evaluation: centre, no flip."""
    size, how = config.image_size, config.interpolation
    draw = random.Random(seed)  # random() of one seed is the same in every version of Python
    if seed is None or config.crop == "center":
        image = resize_short(image, config.short_side, how)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    elif config.crop == "random":
        image = _random_crop(image, config.short_side, size, how, draw)
    else:
        image = resize(image, (size, size), how, _some_or_widest_box(image.size, config.min_area, draw))
    if seed is not None and config.flip and draw.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)  # which can be written, as torch asks of what it reads


def views(image: Image.Image, config: ImagesConfig, kind: Views) -> NDArray[np.uint8]:
    """uint8 (V, S, S, 3), the V views in the order of VIEWS[kind]: squares of the image with its short side at
    short_side, no randomness. The first is the centre, as in evaluation.

    `ten_crop` is LlamaGen's (extract_codes_c2i.py): the corners are those of the largest centred square.
    """
    size, short = config.image_size, config.short_side
    image = resize_short(image, short, config.interpolation)
    places = [((image.width - size) // 2, (image.height - size) // 2)]
    if kind == "ten_crop":
        left, top, far = (image.width - short) // 2, (image.height - short) // 2, short - size
        places += [(left, top), (left + far, top), (left, top + far), (left + far, top + far)]
    pixels = np.asarray(image)
    squares = [pixels[top : top + size, left : left + size] for left, top in places]
    mirrored = [square[:, ::-1] for square in squares] if kind != "center" else []
    return np.stack([*squares, *mirrored])


def normalise(picture: NDArray[np.uint8], out: Tensor) -> None:
    """uint8 (H, W, 3) into float32 (3, H, W): v / 127.5 - 1, picture by picture, so that it stays in the caches."""
    out.copy_(torch.from_numpy(picture).permute(2, 0, 1))
    out.div_(127.5).sub_(1.0)


def _random_crop(image: Image.Image, short: int, size: int, how: Interpolation, draw: random.Random) -> Image.Image:
    """A square at a random place of the image with its short side at `short`. Only the square is resized: a third
    faster, and the same as cutting it out of the whole but for rounding (1 level in 1 of 5000 values).
    """
    width, height = _resized(image.size, short)
    left, top = int(draw.random() * (width - size + 1)), int(draw.random() * (height - size + 1))
    if (width, height) == image.size:
        return image.crop((left, top, left + size, top + size))
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return resize(image, (size, size), how, box)


def _resized(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Width and height with the short side at `short`, the long side in proportion and rounded down."""
    width, height = size
    if width <= height:
        return short, max(short, short * height // width)
    return max(short, short * width // height), short


def resize_short(image: Image.Image, short: int, how: Interpolation) -> Image.Image:
    """The image with its short side at `short` pixels; of one that is longer than MOST_ASPECT of them, the middle."""
    image = _middle(image)
    size = _resized(image.size, short)
    return image if size == image.size else resize(image, size, how, (0, 0, *image.size))


def _middle(image: Image.Image) -> Image.Image:
    """Without the ends of a long side of which no view sees anything, so that a thin file does not grow into a huge
    image."""
    width, height = (min(side, MOST_ASPECT * min(image.size)) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image if (width, height) == image.size else image.crop((left, top, left + width, top + height))


def resize(image: Image.Image, size: tuple[int, int], how: Interpolation, box: Box) -> Image.Image:
    """The box (left, top, right, bottom) of an image at another size."""
    if how != "sampled":
        return image.resize(size, _FILTERS[how], box=box)
    x, y = (_between(box[i], box[i + 2], size[i], image.size[i]) for i in (0, 1))
    pixels = np.asarray(image)[:, x[0].min() : x[1].max() + 1]
    left = x[0].min()
    down = _lerp(pixels[y[0]], pixels[y[1]], y[2][:, None, None])  # rows first: they lie together
    down = _lerp(down.take(x[0] - left, 1), down.take(x[1] - left, 1), x[2][:, None])
    return Image.fromarray(np.rint(down).astype(np.uint8))


def _lerp(one: NDArray[Any], other: NDArray[Any], share: NDArray[np.float32]) -> NDArray[np.float32]:
    found = np.subtract(other, one, dtype=np.float32)
    found *= share
    found += one
    return found


def _between(low: float, high: float, count: int, size: int) -> tuple[Places, Places, NDArray[np.float32]]:
    """For `count` pixels over [low, high) of a side of `size`: the two pixels about each centre, the second's share."""
    places = low + (np.arange(count) + 0.5) * ((high - low) / count) - 0.5
    places = places.clip(0, size - 1)
    before = places.astype(np.intp)
    return before, np.minimum(before + 1, size - 1), (places - before).astype(np.float32)


def _some_or_widest_box(size: tuple[int, int], min_area: float, draw: random.Random) -> tuple[int, int, int, int]:
    """A box of random area and aspect; after ten misses the largest centred box with an aspect in [3/4, 4/3]."""
    if box := some_box(size, min_area, draw, tries=10):
        return box
    width, height = size
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (width - w) // 2, (height - h) // 2, (width - w) // 2 + w, (height - h) // 2 + h


def some_box(
    size: tuple[int, int], min_area: float, draw: random.Random, tries: int
) -> tuple[int, int, int, int] | None:
    """A box with a share of the area of at least min_area and an aspect in [3/4, 4/3], both random; None where none of
    so many tries lay inside.
    """
    width, height = size
    for _ in range(tries):
        area = width * height * (min_area + (1 - min_area) * draw.random())
        aspect = math.exp(math.log(4 / 3) * (2 * draw.random() - 1))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draw.random() * (width - w + 1)), int(draw.random() * (height - h + 1))
            return left, top, left + w, top + h
    return None
