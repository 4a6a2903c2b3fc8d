"""Signals: what is tokenized, one file each. A sample is (B, C, *sides), its ids are (B, *grid).

A signal says what of a sample enters the encoder and what context encoder and decoder both see, what the tokenizer is
trained for, what its output says, how that is measured and how it is shown. How bytes become samples is its medium's
(data/config.py: MEDIA). Images without context are one entry, not a special case: the loop, evaluation and encoding
speak to this interface and know no pictures.

To add one: a file here, its settings, and its line in SIGNALS, both in config.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

from vqscale.config import load_class
from vqscale.data.config import MediumConfig
from vqscale.signals.config import SIGNALS, DistanceConfig, SignalConfig

__all__ = ["SIGNALS", "Distance", "Distances", "Signal", "Sums", "build", "check_reads"]

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from vqscale.parallel.mesh import Mesh
    from vqscale.show.pictures import Picture


class Distance(NamedTuple):
    """One of the losses of a signal: a mean over this rank's samples, and what it is multiplied by."""

    weight: float
    value: Tensor


# (output of the decoder, samples, the engine's autocast) -> losses by name, in the order in which they are added
Distances = Callable[["Tensor", "Tensor", Callable[[], AbstractContextManager[Any]]], Mapping[str, Distance]]


class Sums(ABC):
    """Metrics of samples and predictions as sums, which add over batches and over ranks."""

    statistics: Mapping[str, Any] = {}
    """what else is known with the numbers, for files: Inception's statistics of sets of images"""

    @abstractmethod
    def add(self, samples: Tensor, predicted: Tensor) -> None:
        """Count this rank's samples (B, C, *sides), where B may be 0, and what was predicted of them."""

    @abstractmethod
    def numbers(self) -> dict[str, float]:
        """The metrics by name, and `images`, the samples counted; the same on every rank. Collective."""

    def by_class(self) -> dict[int, dict[str, float]]:
        """The metrics of each class that labels have, by its number; none where they have no classes. Collective."""
        return {}


class Signal(ABC):
    """What is tokenized. It takes and returns tensors of this rank; only what says so is collective."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def enter(self, samples: Tensor) -> tuple[Tensor, ...]:
        """(what enters the encoder,) or (what enters, the context that both sides see); the decoder gives back what
        entered, and a discriminator tells the two apart."""

    @abstractmethod
    def distances(self, config: DistanceConfig, mesh: Mesh) -> Distances:
        """What the tokenizer is trained for. ValueError for files that are not what they should be."""

    @abstractmethod
    def predict(self, output: Tensor) -> Tensor:
        """What an output of the decoder says, in the form in which it is measured and shown; float32."""

    @abstractmethod
    def sums(self, mesh: Mesh, measures: Any = None) -> Sums:
        """Empty sums; `measures` are networks with weights that the signal has a use for, None in training."""

    @abstractmethod
    def picture(self, samples: Tensor, predicted: Tensor) -> Picture:
        """Samples and what was predicted of them, for people to look at."""

    # what was drawn from a prior, in files: as images have it, unless a signal says otherwise

    def stored(self, drawn: Tensor) -> NDArray[Any]:
        """Outputs of the decoder as they are kept, sample by sample: uint8 (B, *sides, C)."""
        from vqscale.metrics.reconstruction import to_bytes

        return to_bytes(drawn).movedim(1, -1).contiguous().cpu().numpy()

    def tiles(self, stored: NDArray[Any]) -> Tensor:
        """What is kept as pictures, uint8 (B, 3, H, W)."""
        import torch

        return torch.from_numpy(stored).movedim(-1, 1)

    def file(self, stored: NDArray[Any]) -> tuple[str, bytes] | None:
        """(suffix, bytes) of a file for one kept sample alone; None where that is not usual."""
        return None


def check_reads(config: SignalConfig, medium: MediumConfig) -> None:
    """ValueError for samples of a medium that are not this signal's."""
    loss = DistanceConfig(config.distances[0])
    problems = [message for _, message in config.misfits(medium, loss)]
    if problems:
        raise ValueError("; ".join(problems))


def build(config: SignalConfig) -> Signal:
    """The signal of a config."""
    signal: Signal = load_class(config.module)(config)
    return signal
