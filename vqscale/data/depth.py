"""The medium depth: an image, and a gray PNG of 16 bits with the depth of its pixels. A sample is (4, H, W): the image
in [-1, 1], and metres, 0 where depth is missing.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vqscale.data.config_dense import EVALUATION_CROPS, DepthConfig
from vqscale.data.dense import Box, Dense, Map

CROPPED = (640, 480)  # width and height of the images that the evaluation crops are of


class DepthMaps(Dense):
    """Images with their depth. ValueError where nothing says the unit of the files."""

    config: DepthConfig

    def __init__(self, config: DepthConfig) -> None:
        super().__init__(config)
        self.unit = config.unit

    def labels(self, members: Sequence[bytes]) -> Map:
        return steps(*members)[None]

    def settled(self, labels: Map) -> Map:
        return (labels * self.unit).astype(np.float32)

    def evaluated(self, size: tuple[int, int]) -> Box:
        return (EVALUATION_CROPS[self.config.evaluation_crop] if size == CROPPED else None) or (0, 0, *size)


def steps(data: bytes) -> Map:
    """(H, W): the 16-bit gray values of a PNG, as they are. ValueError for another kind of file, or 8 bits."""
    image = Image.open(io.BytesIO(data), formats=["PNG"])
    image.load()
    if not image.mode.startswith("I"):
        raise ValueError(
            f"its depth.png has the mode {image.mode}, of 8 bits and {len(image.getbands())} channels, but depth is "
            "gray of 16 bits: 256 steps are too few, write it again from the measurement"
        )
    return np.asarray(image).astype(np.int32)
