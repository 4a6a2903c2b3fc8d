"""PNG files, in memory."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def encoded(picture: NDArray[Any] | Image.Image) -> bytes:
    """A file of a picture: uint8 (H, W, 3), gray uint8 or uint16 (H, W), or one of Pillow's."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(np.ascontiguousarray(picture))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
