"""The recordings of a data set by number, whole and at one rate: what an evaluation of any length reads.

Their order is that of the shards, and nothing is replaced. Nothing communicates.
"""

from __future__ import annotations

from vqscale.data.config_sounds import SoundsConfig
from vqscale.data.shards.index import build
from vqscale.data.shards.reader import Reader
from vqscale.data.sounds import Wave, opened, packages, whole


class Recordings:
    """All recordings that a config names, as one channel at its rate, each at most so many seconds of it."""

    def __init__(self, config: SoundsConfig, most_s: float) -> None:
        packages()
        self.config, self.most = config, max(1, round(most_s * config.sample_rate))
        self.index = build(config)
        self._reader = Reader(config, self.index)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, number: int) -> tuple[Wave, bool]:
        """(samples (T,), whether the recording is longer than these). ValueError that says which and why, for one that
        cannot be read."""
        try:
            with opened(*self._reader.read(number)) as file:
                return whole(file, self.config, self.most)
        except (ValueError, OSError, RuntimeError) as error:  # soundfile's errors are RuntimeErrors
            raise ValueError(f"{self._reader.describe(number)}: {error}") from error
