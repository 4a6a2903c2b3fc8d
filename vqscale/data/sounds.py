"""The medium sounds, from the bytes of a recording to a window: decoding whatever the file holds, one channel, another
rate, a place by an explicit seed.

soundfile decides what a file is by its content, not by its name, and decodes only what is needed: the window is cut
with a margin, resampled, and cut exactly, and is then what one would cut out of the whole recording resampled at once.
"""

from __future__ import annotations

import io
import math
import random
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqscale.data.config_sounds import SoundsConfig
from vqscale.errors import ExplainedError

Wave = NDArray[np.float32]

_MARGIN = 1024  # source samples on either side of a window that resampling may look at, times its ratio
_BLOCK = 1 << 20  # frames that are decoded at once where a whole recording is looked at
_HIGHEST = 1_000_000  # samples per second that a file may claim


class MissingDecoder(ExplainedError):
    """A package that reads recordings is not installed."""


def packages() -> tuple[ModuleType, ModuleType]:
    """(soundfile, soxr). MissingDecoder names the extra that brings them."""
    try:
        import soundfile
        import soxr
    except (ImportError, OSError) as error:  # OSError: the library that soundfile wraps
        raise MissingDecoder(
            f"recordings are read with the packages soundfile and soxr, and one of them is not there ({error}): "
            "pip install 'vqscale[audio]'"
        ) from None
    return soundfile, soxr


class Sounds:
    """How recordings become samples; pure functions of bytes, config and seed (data/samples.py: Reads)."""

    def __init__(self, config: SoundsConfig) -> None:
        packages()  # here, or each sample would count as a broken one
        self.config = config

    def sample(self, members: Sequence[bytes], seed: int | None, out: Tensor) -> bool:
        with opened(*members) as file:
            out[0].copy_(torch.from_numpy(window(file, self.config, seed)))
            return resampled_length(file, self.config.sample_rate) < self.config.length

    def views(self, members: Sequence[bytes], kind: Any, out: Tensor) -> bool:
        return self.sample(members, None, out[0])


@contextmanager
def opened(data: bytes) -> Iterator[Any]:
    """The soundfile of these bytes. ValueError for what is no whole recording: what cannot be found cheaply is an MP3
    without a Xing header that was cut, which only is shorter."""
    soundfile, _ = packages()
    if missing := _bytes_missing(data):
        raise ValueError(f"the recording was cut short: its header asks for {missing} bytes more than its {len(data)}")
    try:
        file = soundfile.SoundFile(io.BytesIO(data))
    except soundfile.LibsndfileError:
        raise ValueError(f"these {len(data)} bytes, {data[:8]!r} first, are no recording") from None
    with file:
        if not file.frames:
            raise ValueError("the recording has no samples")
        if not 1 <= file.samplerate <= _HIGHEST:
            raise ValueError(f"the recording claims {file.samplerate} samples per second, above {_HIGHEST}")
        _check_end(file, soundfile.LibsndfileError)
        yield file


def _bytes_missing(data: bytes) -> int:
    """How many bytes a file lacks by what it says of its own size; 0 where it says nothing."""
    if data[:4] in (b"RIFF", b"FORM") and len(data) >= 8:
        (size,) = struct.unpack("<I" if data[:4] == b"RIFF" else ">I", data[4:8])
        return 0 if size in (0, 0xFFFFFFFF) else max(0, size + 8 - len(data))  # these two are of a stream
    if data[:4] == b"OggS":
        page = data[data.rfind(b"OggS") :]
        table = page[27 : 27 + page[26]] if len(page) > 26 else b""
        return max(0, 27 + (page[26] + sum(table) if len(page) > 26 else 1) - len(page))
    return 0


def _check_end(file: Any, failure: type[Exception]) -> None:
    """Read the last frame that the header counts: a FLAC or MP3 that was cut has none."""
    try:
        file.seek(file.frames - 1)
        whole = len(file.read(1)) == 1
    except failure:
        whole = False
    if not whole:
        raise ValueError(f"the recording was cut short: frame {file.frames - 1} of those it counts cannot be read")


def resampled_length(file: Any, rate: int) -> int:
    """Samples of the whole recording at this rate."""
    return max(1, round(file.frames * rate / file.samplerate))


def window(file: Any, config: SoundsConfig, seed: int | None) -> Wave:
    """(length,) float32 of a recording at the config's rate: a pure function of bytes, config and seed. Seed None is
    evaluation: the middle. ValueError for values that are no numbers.
    """
    draw = random.Random(seed)  # random() of one seed is the same in every version of Python
    total, length = resampled_length(file, config.sample_rate), config.length
    room = max(0, total - length)
    start = room // 2 if seed is None else int(draw.random() * (room + 1))
    wave = _fill(stretch(file, config.sample_rate, start, min(length, total)), length, config.short)
    return _brought(wave, file, config, draw if seed is not None else None)


def whole(file: Any, config: SoundsConfig, most: int) -> tuple[Wave, bool]:
    """(the recording at the config's rate as in evaluation, cut after `most` samples; whether it was cut). ValueError
    for values that are no numbers."""
    total = resampled_length(file, config.sample_rate)
    return _brought(stretch(file, config.sample_rate, 0, min(total, most)), file, config, None), total > most


def _brought(wave: Wave, file: Any, config: SoundsConfig, draw: random.Random | None) -> Wave:
    """At the peak and in the range that the config asks for."""
    if config.peak_db is not None:
        low, high = config.peak_db
        wanted = (low + high) / 2 if draw is None else low + (high - low) * draw.random()
        wave = wave * np.float32(10 ** (wanted / 20) / max(_peak(file), 1e-8))
    return wave.clip(-1, 1) if config.clip else wave


def stretch(file: Any, rate: int, start: int, length: int) -> Wave:
    """`length` samples from `start` on of the recording at this rate, one channel."""
    source = file.samplerate
    if source == rate:
        return _fill(_mono(file, start, length), length, "pad")
    _, soxr = packages()
    step, grain = source // math.gcd(source, rate), rate // math.gcd(source, rate)
    margin = math.ceil(_MARGIN * max(1, source / rate))
    first = max(0, (start * source // rate - margin) // step)  # in steps, that both rates meet
    stop = min(file.frames, math.ceil((start + length) * source / rate) + margin)
    wave = soxr.resample(_mono(file, first * step, stop - first * step), source, rate)
    begin = start - first * grain
    return _fill(wave[begin : begin + length].astype(np.float32, copy=False), length, "pad")


def _mono(file: Any, start: int, length: int) -> Wave:
    """The mean of the channels. ValueError where the file ends early, or holds what is no number."""
    file.seek(start)
    values: Wave = file.read(length, dtype="float32", always_2d=True)
    if len(values) < min(length, file.frames - start):
        raise ValueError(f"the recording was cut short: it ends before frame {start + length} of {file.frames}")
    if not np.isfinite(values).all():
        raise ValueError("the recording has values that are no numbers (NaN or infinite)")
    return values[:, 0] if values.shape[1] == 1 else values.mean(axis=1, dtype=np.float32)


def _peak(file: Any) -> float:
    """The largest value of the whole recording, as one channel at its own rate."""
    starts = range(0, file.frames, _BLOCK)
    return max(float(np.abs(_mono(file, start, min(_BLOCK, file.frames - start))).max()) for start in starts)


def _fill(wave: Wave, length: int, short: str) -> Wave:
    if len(wave) >= length:
        return wave
    return np.resize(wave, length) if short == "repeat" else np.pad(wave, (0, length - len(wave)))
