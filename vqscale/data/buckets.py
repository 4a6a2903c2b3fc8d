"""The medium of images of several shapes: an image is resized until it covers the picture that is asked for, and cut to
it. Which bucket an image is in is not decided here (order_buckets.py): what comes out has the shape of what is filled.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vqscale.data.config_buckets import BucketsConfig
from vqscale.data.pixels import decode, normalise, resize


class BucketPictures:
    """How files of images become samples; pure functions of bytes, config and seed (data/samples.py: Reads)."""

    def __init__(self, config: BucketsConfig) -> None:
        self.config = config

    def sample(self, members: Sequence[bytes], seed: int | None, out: Tensor) -> bool:
        return self._fill(decode(*members), seed, out)

    def views(self, members: Sequence[bytes], kind: Any, out: Tensor) -> bool:
        return self._fill(decode(*members), None, out[0])

    def _fill(self, image: Image.Image, seed: int | None, out: Tensor) -> bool:
        """Seed None is evaluation: the centre, no flip. Whether the image had to be enlarged."""
        config, (height, width) = self.config, out.shape[1:]
        draw = random.Random(seed)  # random() of one seed is the same in every version of Python
        scale = max(height / image.height, width / image.width)
        enlarged = scale > 1
        along = draw.random() if seed is not None and config.crop == "random" else 0.5
        across, down = min(image.width, width / scale), min(image.height, height / scale)
        left, top = (image.width - across) * along, (image.height - down) * along  # one of the two is 0
        box = (left, top, left + across, top + down)
        image = resize(image, (width, height), config.interpolation, box)
        if seed is not None and config.flip and draw.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        normalise(np.array(image), out)  # an array that can be written, as torch asks of what it reads
        return enlarged
