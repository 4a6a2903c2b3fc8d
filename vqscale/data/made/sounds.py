"""Sounds made by arithmetic: a labelled source of sounds that needs no download, for tests and first runs.

Every sound is a pure function of (index, seed) at a length and a rate: tones, chords, chirps, clicks, noise, and a
voice of harmonics under formants that sings vowels and speaks syllables. There is enough pitch, timbre, level and noise
in it for many codes to pay. It is no benchmark of speech.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from vqscale.data.config_sounds import DrawnSoundsConfig
from vqscale.data.made.make import Plan, Sample
from vqscale.disk import wav
from vqscale.seed import derive

CLASS_NAMES = ("tone", "chord", "chirp", "vibrato", "clicks", "noise", "ah", "ee", "oo", "speech")

Wave = NDArray[np.float32]

_FRAMES_PER_S = 100  # at which a voice changes its formants
_FORMANTS = {  # Hz of the first three, of a voice of scale 1
    "ah": (730, 1090, 2440),
    "ee": (270, 2290, 3010),
    "oo": (300, 870, 2240),
    "eh": (530, 1840, 2480),
    "aw": (570, 840, 2410),
    "er": (490, 1350, 1690),
}
_WIDTHS = (80, 110, 160)  # Hz of these formants


@dataclass(frozen=True)
class _Canvas:
    """The length and the rate of a sound, and its random numbers."""

    length: int
    rate: int
    rng: np.random.Generator

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.rng.random())

    def geometric(self, low: float, high: float) -> float:
        return low * (high / low) ** float(self.rng.random())

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def track(self, values: Sequence[float]) -> NDArray[np.float64]:
        """Numbers that go from one value to the next, over the whole sound."""
        return np.interp(np.linspace(0, 1, self.length), np.linspace(0, 1, len(values)), values)

    def swell(self) -> Wave:
        """A level that rises, falls and changes on the way."""
        inner = [self.between(0.3, 1) for _ in range(int(self.rng.integers(2, 6)))]
        edge = max(1, int(self.rate * self.between(0.005, 0.05)))
        level = self.track(inner)
        level[:edge] *= np.linspace(0, 1, edge)
        level[-edge:] *= np.linspace(1, 0, edge)
        return level.astype(np.float32)


def _harmonics(c: _Canvas, pitch: NDArray[np.float64], amplitudes: NDArray[np.float32]) -> Wave:
    """Sum over h of amplitudes[h, t] sin((h + 1) phase): amplitudes (H, length) or (H, 1) under a pitch in Hz."""
    turn = np.exp(2j * np.pi * np.cumsum(pitch / c.rate)).astype(np.complex64)
    total, power = np.zeros(c.length, np.float32), np.ones_like(turn)
    for number, amplitude in enumerate(amplitudes, 1):
        power *= turn
        audible = pitch * number < c.rate / 2
        if not audible.any():
            break
        total += np.where(audible, amplitude, 0) * power.imag
    return total


def _pure(c: _Canvas, pitch: NDArray[np.float64]) -> Wave:
    """A few harmonics that fall off."""
    count, fall = int(c.rng.integers(1, 6)), c.between(0.2, 0.8)
    return _harmonics(c, pitch, np.array([[fall**n] for n in range(count)], np.float32)) * c.swell()


def _tone(c: _Canvas) -> Wave:
    return _pure(c, c.track([c.geometric(90, 2500)]))


def _chord(c: _Canvas) -> Wave:
    root = c.geometric(90, 500)
    steps = [0, *c.rng.choice([3, 4, 5, 7, 9, 12, 16, 19], size=int(c.rng.integers(2, 4)), replace=False)]
    return np.sum([_pure(c, c.track([root * 2 ** (step / 12)])) for step in steps], axis=0, dtype=np.float32)


def _chirp(c: _Canvas) -> Wave:
    knots = [np.log(c.geometric(80, 0.4 * c.rate)) for _ in range(int(c.rng.integers(2, 5)))]
    return _pure(c, np.exp(c.track(knots)))


def _vibrato(c: _Canvas) -> Wave:
    depth, speed, time = c.between(0.02, 0.15), c.between(3, 9), np.arange(c.length) / c.rate
    return _pure(c, c.geometric(120, 1500) * (1 + depth * np.sin(2 * np.pi * speed * time)))


def _clicks(c: _Canvas) -> Wave:
    """Short decaying tones, at a beat or at random."""
    pulses = np.zeros(c.length, np.float32)
    gap = c.geometric(0.03, 0.3) * c.rate
    places = np.cumsum(gap * (1 + c.between(0, 0.8) * (c.rng.random(2 + int(c.length / gap)) - 0.5)))
    places = places[places < c.length].astype(np.int64)
    pulses[places] = c.rng.uniform(0.3, 1, len(places))
    time = np.arange(int(0.1 * c.rate)) / c.rate
    ring = np.exp(-time * c.geometric(30, 400)) * np.sin(2 * np.pi * c.geometric(200, 0.35 * c.rate) * time + 1)
    return _convolved(pulses, ring)


def _convolved(wave: Wave, kernel: NDArray[np.float64]) -> Wave:
    size = 1 << (len(wave) + len(kernel) - 1).bit_length()
    found = np.fft.irfft(np.fft.rfft(wave, size) * np.fft.rfft(kernel, size), size)
    return found[: len(wave)].astype(np.float32)


def _hiss(c: _Canvas, length: int, low: float, high: float) -> Wave:
    """Noise with most of its power between two frequencies."""
    spectrum = np.fft.rfft(c.rng.standard_normal(length, dtype=np.float32))
    octaves = np.log2(np.maximum(np.fft.rfftfreq(length, 1 / c.rate), 1))
    middle, width = (np.log2(low) + np.log2(high)) / 2, max(np.log2(high / low) / 2, 0.1)
    shape = np.exp(-0.5 * ((octaves - middle) / width) ** 2)
    found = np.fft.irfft(spectrum * shape, length)
    return (found / max(float(np.abs(found).max()), 1e-9)).astype(np.float32)


def _noise(c: _Canvas) -> Wave:
    total = np.zeros(c.length, np.float32)
    for _ in range(int(c.rng.integers(1, 4))):
        low = c.geometric(60, 0.25 * c.rate)
        total += _hiss(c, c.length, low, min(low * c.geometric(1.2, 8), 0.49 * c.rate)) * c.swell()
    return total


def _voice(c: _Canvas, vowels: Sequence[str], level: Wave) -> Wave:
    """A sung or spoken line through these vowels, evenly in time, at a pitch that moves."""
    low, scale = c.geometric(85, 260), c.between(0.9, 1.25)
    pitch = c.track([low * c.between(0.85, 1.3) for _ in range(len(vowels) + 2)])
    frames = -(-c.length * _FRAMES_PER_S // c.rate) + 1
    places = np.linspace(0, len(vowels) - 1, frames)
    formants = [
        np.interp(places, np.arange(len(vowels)), [scale * _FORMANTS[vowel][number] for vowel in vowels])
        for number in range(3)
    ]
    count = int(0.5 * c.rate / pitch.min())
    at = np.arange(1, count + 1)[:, None] * pitch[np.linspace(0, c.length - 1, frames).astype(int)]
    gains = np.sum([_resonance(at, f, w) * 0.5**n for n, (f, w) in enumerate(zip(formants, _WIDTHS, strict=True))], 0)
    gains = (gains / np.sqrt(np.arange(1, count + 1))[:, None]).astype(np.float32)
    return _harmonics(c, pitch, _between_frames(gains, c.length)) * level


def _resonance(at: NDArray[np.float64], centre: NDArray[np.float64], width: float) -> NDArray[np.float64]:
    return 1 / (1 + ((at - centre) / width) ** 2)


def _between_frames(values: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """(H, frames) -> (H, length), linear from one frame to the next."""
    steps = values.shape[1] - 1
    size = -(-length // steps)
    ramp = np.linspace(0, 1, size, endpoint=False, dtype=np.float32)
    found = values[:, :-1, None] + np.diff(values, axis=1)[:, :, None] * ramp
    return found.reshape(len(values), -1)[:, :length]


def _vowel(name: str) -> Callable[[_Canvas], Wave]:
    return lambda c: _voice(c, [name, name], c.swell())


def _speech(c: _Canvas) -> Wave:
    """Syllables: a hiss or a pause, then a vowel, some four of them a second."""
    names = sorted(_FORMANTS)
    count = max(2, round(c.length / c.rate * c.between(3, 5)))
    vowels = [names[int(n)] for n in c.rng.integers(len(names), size=count)]
    ends = np.linspace(0, c.length, count + 1).astype(int)
    level, consonants = np.zeros(c.length, np.float32), np.zeros(c.length, np.float32)
    for begin, end in itertools.pairwise(ends):
        middle = begin + int((end - begin) * c.between(0.15, 0.4))
        level[middle:end] = np.sin(np.linspace(0, np.pi, end - middle)) ** 0.5 * c.between(0.5, 1)
        if c.chance(0.7) and middle - begin > 16:
            low = c.geometric(1200, 0.3 * c.rate)
            consonants[begin:middle] = _hiss(c, middle - begin, low, min(2 * low, 0.48 * c.rate)) * c.between(0.1, 0.5)
    spoken = _voice(c, vowels, level)
    return spoken / max(float(np.abs(spoken).max()), 1e-9) + consonants


_KINDS: dict[str, Callable[[_Canvas], Wave]] = {
    "tone": _tone,
    "chord": _chord,
    "chirp": _chirp,
    "vibrato": _vibrato,
    "clicks": _clicks,
    "noise": _noise,
    "ah": _vowel("ah"),
    "ee": _vowel("ee"),
    "oo": _vowel("oo"),
    "speech": _speech,
}


def draw(index: int, length: int, rate: int, seed: int) -> tuple[NDArray[np.int16], int]:
    """Sound `index` of the endless set `seed`: int16 (length,) at this rate, and its label, index mod 10.

    Depends on the arguments alone. Its largest value is 3 to 20 dB below 1.
    """
    label = index % len(CLASS_NAMES)
    c = _Canvas(length, rate, np.random.default_rng(derive("sounds", seed, index)))
    sound = _KINDS[CLASS_NAMES[label]](c)
    sound = sound / max(float(np.abs(sound).max()), 1e-9)
    if c.chance(0.5):
        sound = sound + np.float32(c.geometric(1e-3, 2e-2)) * _hiss(c, length, 100, 0.4 * rate)
    loud = c.geometric(0.1, 0.7) / max(float(np.abs(sound).max()), 1e-9)
    return np.rint(sound * loud * 32767).astype(np.int16), label


def plan(config: DrawnSoundsConfig) -> Plan:
    """Drawn sounds as WAV, with their class."""
    length = round(config.seconds * config.sample_rate)

    def sample(number: int) -> Sample:
        index = config.first_index + number
        values, label = draw(index, length, config.sample_rate, config.seed)
        facts = json.dumps({"label": label, "class": CLASS_NAMES[label]})
        made = {"wav": wav.encoded(values, config.sample_rate), "cls": str(label).encode(), "json": facts.encode()}
        return {"__key__": f"{index:08d}", **made}

    return Plan(config.num_sounds, {"source": "sounds", **asdict(config), "classes": list(CLASS_NAMES)}, sample)
