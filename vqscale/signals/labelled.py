"""Signals whose context says much of what is predicted: labels of the pixels of an image, and its colours. What the
evaluation of guiding codes asks of them beside what every signal has (programs/dense.py).
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from vqscale.show import pictures
from vqscale.signals import Signal


class Labelled(Signal):
    """A signal with a context, an image."""

    @abstractmethod
    def label_sums(self, samples: Tensor) -> Tensor:
        """What the best prediction that is the same for all samples needs to know of these; it adds over samples."""

    @abstractmethod
    def constant(self, sums: Tensor, samples: Tensor) -> Tensor:
        """That prediction from the sums over a training set, for each of samples."""

    @abstractmethod
    def shown(self, samples: Tensor, *predicted: Tensor) -> list[Tensor]:
        """uint8 (B, 3, H, W): the context, the truth, and each of the predictions, for people to look at."""

    def picture(self, samples: Tensor, predicted: Tensor) -> pictures.Picture:
        """Contexts, below each the truth and what was predicted of it."""
        return pictures.stacked(self.shown(samples, predicted), scale=pictures.scale(*samples.shape[2:]))

    def beside(self, samples: Tensor, *predicted: Tensor) -> pictures.Picture:
        """A row for each sample: the context, the truth, and each of the predictions."""
        shown = torch.stack(self.shown(samples, *predicted), 1)
        return pictures.tiles(shown.flatten(0, 1), shown.shape[1], pictures.scale(*samples.shape[2:]))
