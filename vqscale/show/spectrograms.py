"""Sounds on a page: spectra as pictures (time to the right, frequency upwards, brighter is louder), and players."""

from __future__ import annotations

import base64
import html
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqscale.disk import png, wav
from vqscale.metrics.sound import MelBands
from vqscale.show import page, pictures

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


def player(wave: NDArray[Any], rate: int, caption: str) -> str:
    """An HTML player that carries the wave."""
    data = base64.b64encode(wav.encoded(wave, rate)).decode()
    text = html.escape(caption)
    return f'<figcaption>{text}</figcaption><audio controls src="data:audio/wav;base64,{data}"></audio>'


def heard(name: str, wave: NDArray[np.floating], recon: NDArray[np.floating], bands: MelBands) -> str:
    """A recording above what was made of it, to look at and to listen to."""
    spectra = (bands(torch.from_numpy(x)[None]) for x in (wave, recon))
    shown = page.img(png.encoded(grid(*spectra)), f"{name}, original above reconstruction")
    return f"<h3>{html.escape(name)}</h3><figure>{shown}{player(wave, bands.rate, 'original')}" + (
        f"{player(recon, bands.rate, 'reconstruction')}</figure>"
    )
