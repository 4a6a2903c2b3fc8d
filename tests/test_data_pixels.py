"""Decoding of every colour mode to the expected pixels, and augmentation against slow forms."""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from vqscale.data.config import ImagesConfig
from vqscale.data.pixels import _some_or_widest_box, augment, decode, normalise, resize_short

NOISE = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def decoded(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def png_by_hand(pixels: np.ndarray, depth: int, kind: int) -> bytes:
    """A PNG that Pillow cannot write: (H, W, C) big-endian samples, unfiltered."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_rgb_is_kept(format: str, options: dict[str, Any]) -> None:
    assert np.array_equal(decoded(saved(Image.fromarray(NOISE), format, **options)), NOISE)


def test_jpeg_is_near() -> None:
    flat = np.full((16, 16, 3), (200, 40, 90), dtype=np.uint8)
    assert np.abs(decoded(saved(Image.fromarray(flat), "JPEG", quality=95)).astype(int) - flat).max() <= 3


def test_gray_and_one_bit_are_repeated() -> None:
    gray = NOISE[..., 0]
    assert np.array_equal(decoded(saved(Image.fromarray(gray), "PNG")), np.stack([gray] * 3, -1))
    bits = saved(Image.fromarray(gray).point(lambda v: 255 if v > 127 else 0, "1"), "PNG")
    assert np.array_equal(decoded(bits)[..., 1], np.where(gray > 127, 255, 0))


def test_a_palette_is_looked_up_and_its_transparent_colour_is_white() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    assert decoded(saved(image, "PNG")).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    assert decoded(saved(image, "PNG", transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_transparency_is_put_on_white(format: str) -> None:
    pixels = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], dtype=np.uint8)
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    found = decoded(saved(Image.fromarray(pixels), format, **options))
    alpha = pixels[..., 3:].astype(float) / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(found - expected).max() <= 1
    assert found[0, 1].tolist() == [255, 255, 255]
    gray = decoded(saved(Image.fromarray(pixels).convert("LA"), "PNG"))
    assert gray[0, 1].tolist() == [255, 255, 255]
    assert gray[0, 0, 0] == gray[0, 0, 2] < 200


def test_a_transparent_colour_of_rgb_is_white() -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8))
    assert decoded(saved(image, "PNG", transparency=(4, 5, 6))).tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_sixteen_bits_keep_their_high_byte() -> None:
    wide = np.array([[[0, 255, 256], [0x1234, 0xFF00, 0xFFFF]]], dtype=">u2")
    high = (wide >> 8).astype(np.uint8)
    assert decoded(png_by_hand(wide, 16, 2)).tolist() == high.tolist()
    for gray in (png_by_hand(wide[..., 1:2], 16, 0), saved(Image.fromarray(wide[..., 1].astype(np.uint16)), "PNG")):
        assert decoded(gray).tolist() == np.repeat(high[..., 1:2], 3, axis=-1).tolist()


def without_adobe_mark(jpeg: bytes) -> bytes:
    """The file without its APP14 segment."""
    begin = jpeg.index(b"\xff\xee")
    length = struct.unpack(">H", jpeg[begin + 2 : begin + 4])[0]
    assert jpeg[begin + 4 : begin + 9] == b"Adobe"
    return jpeg[:begin] + jpeg[begin + 2 + length :]


def test_cmyk_jpeg_inverted_by_adobe_or_not() -> None:
    inks = np.broadcast_to(np.array([0, 204, 51, 102], dtype=np.uint8), (16, 16, 4))  # C, M, Y, K of 255
    expected = [(255 - ink) * (255 - 102) / 255 for ink in (0, 204, 51)]
    adobe = saved(Image.fromarray(np.ascontiguousarray(inks), "CMYK"), "JPEG", quality=100)
    assert np.abs(decoded(adobe) - np.array(expected)).max() <= 3
    # Pillow stores 255 - ink as Adobe does; without the mark the stored numbers are the inks themselves
    plain = without_adobe_mark(saved(Image.fromarray(255 - inks, "CMYK"), "JPEG", quality=100))
    assert np.abs(decoded(plain) - np.array(expected)).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    # what each orientation stores of an upright image: rows and columns of the upright image, by the EXIF table
    upright = np.zeros((16, 24, 3), dtype=np.uint8)
    upright[:8, :8], upright[:8, 16:], upright[8:, :8] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    turn = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a.swapaxes(0, 1)[::-1],
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: a.swapaxes(0, 1)[:, ::-1],
    }
    stored = np.ascontiguousarray(turn[orientation](upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    found = decoded(saved(Image.fromarray(stored), format, exif=exif, **options))
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() <= 6


@pytest.mark.parametrize("data", [b"", b"not an image", saved(Image.fromarray(NOISE), "PNG")[:200]])
def test_what_is_no_whole_image_raises(data: bytes) -> None:
    with pytest.raises(Exception, match=r"no image|truncated|broken"):
        decode(data)


def slow_resize(pixels: np.ndarray, width: int, height: int, cubic: bool) -> np.ndarray:
    """Antialiased resize as a matrix product along each side: the kernel is stretched by the scale when it shrinks."""

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        if not cubic:
            return np.clip(1 - x, 0, None)
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * (x**3 - 5 * x**2 + 8 * x - 4)  # Keys, a = -1/2
        return np.where(x < 1, near, np.where(x < 2, far, 0))

    def matrix(old: int, new: int) -> np.ndarray:
        scale = old / new
        centres = (np.arange(new)[:, None] + 0.5) * scale
        weights = kernel((np.arange(old)[None] + 0.5 - centres) / max(scale, 1))
        return weights / weights.sum(axis=1, keepdims=True)

    tall = np.einsum("yh,hwc->ywc", matrix(pixels.shape[0], height), pixels.astype(float))
    return np.clip(np.einsum("xw,ywc->yxc", matrix(pixels.shape[1], width), tall), 0, 255)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("short", [8, 12, 20])
@pytest.mark.parametrize("upright", [False, True])
def test_the_short_side_is_resized_with_antialiasing(interpolation: Any, short: int, upright: bool) -> None:
    smooth = np.clip(np.add.outer(np.arange(12) * 9, np.arange(17) * 5)[..., None] + NOISE // 4, 0, 255).astype(
        np.uint8
    )
    pixels = smooth.swapaxes(0, 1) if upright else smooth
    image = Image.fromarray(np.ascontiguousarray(pixels))
    config = ImagesConfig("x", image_size=short, interpolation=interpolation)
    found = np.asarray(resize_short(image, short, interpolation))
    long = 17 * short // 12
    expected = slow_resize(pixels, *((short, long) if upright else (long, short)), cubic=interpolation == "bicubic")
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1.5
    middle = (long - short) // 2
    centre = found[middle : middle + short] if upright else found[:, middle : middle + short]
    assert np.array_equal(augment(image, config, None), centre)


@pytest.mark.parametrize(("height", "width"), [(41, 67), (67, 41), (9, 30), (16, 17)])
def test_sampled_looks_at_two_pixels_a_side(height: int, width: int) -> None:
    """As OpenCV and torch without antialiasing, larger and smaller, whole and as the square of a random crop."""
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)
    config = ImagesConfig("x", image_size=16, interpolation="sampled")
    found = np.asarray(resize_short(Image.fromarray(pixels), 16, "sampled"))
    whole = F.interpolate(torch.from_numpy(pixels).permute(2, 0, 1)[None].double(), found.shape[:2], mode="bilinear")[0]
    expected = whole.permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 0.5 + 1e-3, "values are rounded to the nearest"
    assert min(found.shape[:2]) == 16
    for seed in range(5):
        square = augment(Image.fromarray(pixels), config, seed).astype(int)
        places = [(y, x) for y in range(found.shape[0] - 15) for x in range(found.shape[1] - 15)]
        assert min(np.abs(found[y : y + 16, x : x + 16] - square).max() for y, x in places) <= 1


def numbered(height: int, width: int) -> Image.Image:
    """An image in which every pixel is another."""
    place = np.arange(height * width).reshape(height, width)
    return Image.fromarray(np.stack([place % 256, place // 256, place * 0], -1).astype(np.uint8))


def test_random_crops_are_squares_of_the_image_at_every_place() -> None:
    config = ImagesConfig("x", image_size=6, resize=8)
    image = numbered(8, 9)
    whole = np.asarray(image)
    places = {(top, left): whole[top : top + 6, left : left + 6].tobytes() for top in range(3) for left in range(4)}
    counts = dict.fromkeys(places.values(), 0)
    for seed in range(1200):
        counts[np.ascontiguousarray(augment(image, config, seed)).tobytes()] += 1
    assert min(counts.values()) > 60  # 100 expected at each of 12 places
    assert np.array_equal(augment(image, config, 7), augment(image, config, 7))


def test_flip_mirrors_half_of_the_training_images() -> None:
    image = numbered(8, 8)
    whole = np.asarray(image)
    config = ImagesConfig("x", image_size=8, flip=True)
    mirrored = 0
    for seed in range(400):
        found = augment(image, config, seed)
        mirrored += np.array_equal(found, whole[:, ::-1])
        assert np.array_equal(found, whole) or np.array_equal(found, whole[:, ::-1])
    assert 160 < mirrored < 240
    assert np.array_equal(augment(image, config, None), whole)


@pytest.mark.parametrize(("width", "height"), [(100, 100), (60, 200), (300, 50), (1, 1), (7, 900)])
def test_boxes_of_a_resized_crop_lie_inside_and_have_the_area(width: int, height: int) -> None:
    areas = []
    for seed in range(200):
        left, top, right, bottom = _some_or_widest_box((width, height), 0.25, random.Random(seed))
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        areas.append((right - left) * (bottom - top) / (width * height))
        if min(width, height) > 20:
            assert 0.7 < (right - left) / (bottom - top) < 1.4
    if (width, height) == (100, 100):
        assert 0.23 < min(areas) < 0.3
        assert max(areas) > 0.9
        assert np.std(areas) > 0.15


def test_a_resized_crop_is_the_resize_of_its_box() -> None:
    config = ImagesConfig("x", image_size=6, crop="resized", min_area=0.3)
    image = numbered(40, 30)
    for seed in range(5):
        box = _some_or_widest_box(image.size, 0.3, random.Random(seed))
        expected = image.resize((6, 6), Image.Resampling.BICUBIC, box=box)
        assert np.array_equal(augment(image, config, seed), np.asarray(expected))
        assert augment(image, config, None).shape == (6, 6, 3)


def test_a_random_crop_is_cut_out_of_the_resized_image() -> None:
    config = ImagesConfig("x", image_size=24, resize=30)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (75, 55, 3), dtype=np.uint8))
    whole = np.asarray(image.resize((30, 30 * 75 // 55), Image.Resampling.BICUBIC)).astype(int)
    places = set()
    for seed in range(60):
        found = augment(image, config, seed).astype(int)
        squares = {(t, left): whole[t : t + 24, left : left + 24] for t in range(17) for left in range(7)}
        place = min(squares, key=lambda at: np.abs(squares[at] - found).max())
        assert np.abs(squares[place] - found).max() <= 1
        assert np.mean(squares[place] != found) < 0.005
        places.add(place)
    assert len(places) > 35


def test_levels_are_minus_one_to_one() -> None:
    picture = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    out = torch.empty(3, 16, 16)
    normalise(picture, out)
    expected = picture.transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert np.array_equal(out.numpy(), expected)
    assert (out.min(), out.max()) == (-1, 1)
