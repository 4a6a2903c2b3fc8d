"""What predictions of dense labels are compared with: the samples, stretched as they entered, or the labels of the
files at their own size, as published protocols have it.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from vqscale.data.config import MediumConfig
from vqscale.data.dense import Dense
from vqscale.data.samples import medium
from vqscale.data.shards.index import Index
from vqscale.data.shards.reader import Reader
from vqscale.signals import Sums


class Samples:
    """Predictions and samples are of one size."""

    def add(self, sums: Sums, samples: Tensor, predicted: Tensor, numbers: Tensor) -> None:
        """Count samples, and predictions of them; `numbers` are theirs in the data set."""
        sums.add(samples, predicted)


class Files:
    """Predictions are brought to the size of the file of each sample, every pixel from the nearest. A rank reads its
    own samples once more. ValueError for a medium without labels of pixels.
    """

    def __init__(self, config: MediumConfig, index: Index) -> None:
        reads = medium(config)
        if not isinstance(reads, Dense):
            raise ValueError(
                f"the shards hold {config.kind}, whose samples have no labels to be measured at their own size: leave "
                "out --own-size"
            )
        self.medium, self.reader = reads, Reader(config, index)
        self._numbers, self._truths = list[int](), list[Tensor]()

    def add(self, sums: Sums, samples: Tensor, predicted: Tensor, numbers: Tensor) -> None:
        for truth, one in zip(self.of(numbers.tolist()), predicted, strict=True):
            sums.add(truth.to(one.device)[None], brought(one, truth)[None])

    def of(self, numbers: list[int]) -> list[Tensor]:
        """Their truths, read once for all predictions of a batch."""
        if numbers != self._numbers:
            self._truths = [self.medium.truth(self.reader.read(number)) for number in numbers]
            self._numbers = numbers
        return self._truths


def brought(predicted: Tensor, truth: Tensor) -> Tensor:
    """A prediction (C, H, W) at the size of a truth (C', h, w), every pixel from the nearest."""
    return F.interpolate(predicted[None], truth.shape[1:], mode="nearest-exact")[0]
