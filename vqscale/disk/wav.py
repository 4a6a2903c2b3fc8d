"""WAV files of 16 bits, which every player reads."""

from __future__ import annotations

import io
import wave
from typing import Any

import numpy as np
from numpy.typing import NDArray


def encoded(values: NDArray[Any], rate: int) -> bytes:
    """A file of one channel: int16 as they are, floating values between -1 and 1, clipped there, times 32767."""
    if values.dtype != np.int16:
        values = np.rint(values.clip(-1, 1) * 32767).astype(np.int16)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(values.astype("<i2").tobytes())
    return file.getvalue()
