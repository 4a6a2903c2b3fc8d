"""The medium sounds, without torch: how recordings in shards become windows of one length and rate, and what is drawn
where there are none. What reads is sounds.py, what draws made/sounds.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vqscale.data.config import DrawnConfig, ShardsConfig

Short = Literal["repeat", "pad"]


@dataclass(frozen=True)
class DrawnSoundsConfig(DrawnConfig):
    """Sounds made by arithmetic (tones, chords, chirps, vowels, syllables, noise), with their class."""

    plan: ClassVar[str] = "vqscale.data.made.sounds:plan"
    things: ClassVar[str] = "sounds"
    least: ClassVar[Mapping[str, int]] = {"num_sounds": 1, "sample_rate": 4000, "first_index": 0}

    num_sounds: int = 2048
    "sounds in all, spread evenly over the shards"
    seconds: float = 2.0
    "length of each"
    sample_rate: int = 16000
    "samples per second of each"
    first_index: int = 0
    "number of the first sound; a held-out set begins where the training set ends"
    seed: int = 0
    "which endless set of sounds"

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        if not 0.1 <= self.seconds <= 600:
            yield "seconds", f"seconds is {self.seconds}, but sounds of 0.1 to 600 seconds are made: change seconds"


@dataclass(frozen=True)
class SoundsConfig(ShardsConfig):
    """WebDataset tar shards of recordings, as they are: members `key.flac` (wav, flac, mp3, ogg, opus).

    They are of any rate, length and number of channels; `key.cls` or `key.json` has a label. Training takes a window at
    a random place, evaluation the middle one.
    """

    module: ClassVar[str] = "vqscale.data.sounds:Sounds"
    suffixes: ClassVar[tuple[str, ...]] = ("wav", "flac", "mp3", "ogg", "opus")
    kind: ClassVar[str] = "sounds"
    seen: ClassVar[tuple[str, ...]] = ("sample_rate", "seconds", "short", "peak_db", "clip")
    asked: ClassVar[tuple[str, ...]] = ("seconds",)

    medium: Literal["sounds"] = "sounds"
    "what lies in the shards"
    sample_rate: int = 24000
    "samples per second of what comes out; recordings of another rate are resampled"
    seconds: float = 1.0
    "length of a window; times sample_rate it is rounded to whole samples"
    short: Short = "repeat"
    "a recording shorter than a window is repeated, or padded with zeros at its end"
    peak_db: tuple[float, float] | None = None
    "largest value of a whole recording, in dB of 1: drawn from here, the mean in evaluation; null leaves it as it is"
    clip: bool = False
    "bring values beyond 1, which lossy files decode to, back to 1; false leaves them as they are"
    make: DrawnSoundsConfig | None = None
    "if the shards do not exist, make them with these drawn sounds"

    @property
    def length(self) -> int:
        """Samples of a window."""
        return round(self.seconds * self.sample_rate)

    @property
    def shape(self) -> tuple[int, ...]:
        return 1, self.length

    @property
    def drawn(self) -> DrawnSoundsConfig | None:
        return self.make

    @classmethod
    def encoded(cls, card: Mapping[str, Any], asked: Mapping[str, Any], views: str) -> dict[str, Any]:
        known = super().encoded(card, asked, views)
        return {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}

    @property
    def reading(self) -> Mapping[str, Any]:
        """The settings that say how a recording becomes a window."""
        return {key: getattr(self, key) for key in self.seen}

    @property
    def card(self) -> dict[str, Any]:
        return {"reading": tuple(self.reading.items())}

    def problems(self) -> Iterable[tuple[str, str]]:
        """(key, message) of all that cannot be read, as far as one can say without looking at the disk."""
        yield from super().problems()
        if not 1000 <= self.sample_rate <= 384_000:
            yield (
                "sample_rate",
                f"sample_rate is {self.sample_rate}, but is from 1000 to 384000 samples per second: change sample_rate",
            )
        if self.length < 1:
            yield "seconds", f"seconds is {self.seconds}, a window without a sample: raise seconds"
        if self.peak_db is not None and not self.peak_db[0] <= self.peak_db[1] <= 0:
            yield (
                "peak_db",
                f"peak_db is {list(self.peak_db)}, but has the lower number first and none above 0: use [-6, -1], say",
            )
