"""Spectra of sounds as pictures: time to the right, frequency upwards, the brighter the louder."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vqscale.show import pictures

_QUIET, _LOUD = -9.0, 3.0  # logarithms that are black and white
_COLUMNS = 4


def coloured(log_mel_BMF: Tensor) -> Tensor:
    """(B, M, F) natural logarithms of bands -> (B, 3, M, F) in [-1, 1], the lowest band at the bottom."""
    import matplotlib

    table = torch.from_numpy(np.asarray(matplotlib.colormaps["magma"](np.arange(256)))[:, :3]).float()
    levels = ((log_mel_BMF.detach().float().cpu() - _QUIET) / (_LOUD - _QUIET)).clamp(0, 1)
    return (table[(levels * 255).round().long()] * 2 - 1).permute(0, 3, 1, 2).flip(2)


def grid(originals_BMF: Tensor, predicted_BMF: Tensor) -> pictures.Picture:
    """Rows of originals, below each what was made of it."""
    return pictures.grid(coloured(originals_BMF), coloured(predicted_BMF), columns=_COLUMNS)
