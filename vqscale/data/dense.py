"""Images with labels of their pixels, to samples: one box and one flip for all maps of a sample, a pure function of
bytes, config and seed.

The box is stretched to the size of the samples. The image is interpolated, labels are those of the nearest pixel: a
mean of two classes, or of two depths, is none of the picture's.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vqscale.data.config_dense import DenseConfig
from vqscale.data.pixels import decode, normalise, resize, some_box

Box = tuple[int, int, int, int]
Map = NDArray[Any]  # (H, W), or (n, H, W) where it says so
TRIES = 100  # boxes, of which none fitting means the whole image


class Dense(ABC):
    """How the files of such images become samples (data/samples.py: Reads); of each medium a class."""

    def __init__(self, config: DenseConfig) -> None:
        self.config = config

    @abstractmethod
    def labels(self, members: Sequence[bytes]) -> Map:
        """(n, H, W): what the members beside the image say of every pixel, to be looked up at the nearest."""

    def settled(self, labels: Map) -> Map:
        """(n, S, S) of a sample -> float32 (channels - 3, S, S), its last channels."""
        return labels.astype(np.float32)

    def evaluated(self, size: tuple[int, int]) -> Box:
        """The box of an image of this size (width, height) that evaluation looks at."""
        return 0, 0, *size

    def sample(self, members: Sequence[bytes], seed: int | None, out: Tensor) -> bool:
        image, labels = self._decoded(members)
        box, mirrored = self._augmentation(image.size, seed)
        self._put(image, labels, box, mirrored, out)
        return min(image.size) < self.config.image_size

    def views(self, members: Sequence[bytes], kind: str, out: Tensor) -> bool:
        image, labels = self._decoded(members)
        for number, view in enumerate(out):
            self._put(image, labels, self.evaluated(image.size), number == 1, view)
        return min(image.size) < self.config.image_size

    def truth(self, members: Sequence[bytes]) -> Tensor:
        """(C, h, w): what evaluation looks at, not stretched."""
        image, labels = self._decoded(members)
        left, top, right, bottom = box = self.evaluated(image.size)
        out = torch.empty(self.config.channels, bottom - top, right - left)
        self._fill(np.array(image.crop(box)), labels[:, top:bottom, left:right], out)
        return out

    def _decoded(self, members: Sequence[bytes]) -> tuple[Image.Image, Map]:
        image, labels = decode(members[0]), self.labels(members[1:])
        if labels.shape[1:] != (image.height, image.width):
            raise ValueError(
                f"its image is {image.width} x {image.height} and its {'/'.join(self.config.labels[0])} "
                f"{labels.shape[2]} x {labels.shape[1]}: labels are of the pixels of their image, make them again"
            )
        return image, labels

    def _augmentation(self, size: tuple[int, int], seed: int | None) -> tuple[Box, bool]:
        """(box, whether it is mirrored)."""
        if seed is None:
            return self.evaluated(size), False
        draw, box = random.Random(seed), None
        if self.config.crop == "resized":
            box = some_box(size, self.config.min_area, draw, TRIES)
        return box or (0, 0, *size), self.config.flip and draw.random() < 0.5

    def _put(self, image: Image.Image, labels: Map, box: Box, mirrored: bool, out: Tensor) -> None:
        side = self.config.image_size
        pixels = np.array(resize(image, (side, side), self.config.interpolation, box))
        found = nearest(labels, box, side)
        if mirrored:
            pixels, found = pixels[:, ::-1].copy(), found[..., ::-1]
        self._fill(pixels, found, out)

    def _fill(self, pixels: NDArray[np.uint8], labels: Map, out: Tensor) -> None:
        normalise(pixels, out[:3])
        out[3:].copy_(torch.from_numpy(np.ascontiguousarray(self.settled(labels))))


def nearest(maps: Map, box: Box, side: int) -> Map:
    """(n, H, W) -> (n, side, side): of the box (left, top, right, bottom), the pixel below the centre of each."""
    left, top, right, bottom = box
    rows, columns = (
        low + ((np.arange(side) + 0.5) * ((high - low) / side)).astype(np.intp)
        for low, high in ((top, bottom), (left, right))
    )
    return maps.take(rows, axis=1).take(columns, axis=2)
