"""The settings of the signal sounds. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from vqscale.data.config import MediumConfig
from vqscale.metrics.mel import empty_bands
from vqscale.signals.config import DistanceConfig, SignalSettings


@dataclass(frozen=True)
class SoundsSignal(SignalSettings):
    """Sounds that become sounds again: an autoencoder of waves of one rate, without context."""

    module: ClassVar[str] = "vqscale.signals.sounds:Sounds"
    media: ClassVar[tuple[str, ...]] = ("sounds",)
    distances: ClassVar[tuple[str, ...]] = ("mel", "mels")
    name: Literal["sounds"] = "sounds"
    """which signal"""
    sample_rate: int = 24000
    """samples per second"""
    mel_window: int = 1024
    """samples of the transform under the mel bands of the distance mel"""
    mel_hop: int = 256
    """samples from one transform to the next"""
    num_mels: int = 100
    """mel bands, from 0 to half the rate"""
    mels_windows: tuple[int, ...] = (2048, 1024, 512, 256, 128, 64)
    """samples of each transform under the distance mels, a quarter of it apart, with a band for every 16 of them"""
    quiet: float = 0.05
    """added to every band under the distance mels, so that what is much quieter does not count; a full sine has a
    quarter of the window"""

    def problems(self) -> Iterable[tuple[str, str]]:
        for key in ("sample_rate", "mel_window", "mel_hop", "num_mels"):
            if getattr(self, key) < 1:
                yield key, f"{key} is {getattr(self, key)}: use a positive number"
                return
        if empty := empty_bands(self.sample_rate, self.mel_window, self.num_mels):
            yield (
                "num_mels",
                f"of {self.num_mels} mel bands up to {self.sample_rate // 2} Hz {empty} meet no frequency of a window "
                f"of {self.mel_window} samples: lower num_mels or raise mel_window",
            )
        if not self.mels_windows or any(window < 64 or window % 16 for window in self.mels_windows):
            yield (
                "mels_windows",
                f"mels_windows are {list(self.mels_windows)}, but each has a band for every 16 samples, of which the "
                "fewest are 4: use multiples of 16 from 64 on",
            )
        if self.quiet <= 0:
            yield "quiet", f"quiet is {self.quiet}, and silence has no logarithm: use a positive number"

    def misfits(self, medium: MediumConfig, loss: DistanceConfig) -> Iterable[tuple[str, str]]:
        yield from super().misfits(medium, loss)
        rate = getattr(medium, "sample_rate", self.sample_rate)
        if rate != self.sample_rate:
            yield (
                "data.train.sample_rate",
                f"sounds come at {rate} samples per second, and tokenizer.signal.sample_rate is {self.sample_rate}: "
                "make them equal; recordings are resampled to data.train.sample_rate",
            )
        if medium.kind not in self.media:
            return
        windows = [("mel_window", self.mel_window)]
        if loss.reconstruction == "mels":
            windows.append(("mels_windows", max(self.mels_windows)))
            empty = [window for window in self.mels_windows if empty_bands(self.sample_rate, window, window // 16)]
            if empty:
                yield (
                    "loss.reconstruction",
                    f"at {self.sample_rate} samples per second bands of the distance mels meet no frequency of its "
                    f"windows {empty}: use loss.reconstruction: mel, or a lower sample_rate of signal and data",
                )
        for key, window in windows:
            if medium.sides[0] <= window // 2:
                yield (
                    "data.train.seconds",
                    f"a window of {medium.sides[0]} samples is not longer than half of tokenizer.signal.{key} "
                    f"{window}: raise data.train.seconds, or lower {key}",
                )
