"""How near reconstructions are to their images: PSNR and SSIM, per image, and their sums over a data set on many ranks.

Both compare 8-bit images, as a person would save them: values in [-1, 1] are clamped and rounded to 0..255 first. The
definitions stand at the functions, because numbers by other definitions (one PSNR per batch, a 7x7 uniform window,
unrounded values) differ by tenths. Not here: FID and LPIPS, which need weights, and usage of codes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_WINDOW = 11
_SIGMA = 1.5


def to_bytes(images: Tensor) -> Tensor:
    """Values in [-1, 1], clamped -> uint8 values 0..255: round((x + 1) * 127.5), halves to even, same shape."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def psnr(images: Tensor, recon: Tensor) -> Tensor:
    """PSNR of each image in decibels: (B, C, H, W) twice, in [-1, 1], -> (B,) float64.

    10 log10(255^2 / m), m the mean squared difference of the 8-bit values of one image, all channels together. An image
    that is met exactly, with m = 0, counts as if one value of it were off by one, the best that is finite.
    """
    x, y = to_bytes(images).double(), to_bytes(recon).double()
    error = (x - y).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error.clamp(min=1 / x.shape[1:].numel()))


def ssim(images: Tensor, recon: Tensor) -> Tensor:
    """SSIM of each image (Wang et al. 2004): (B, C, H, W) twice, in [-1, 1], H and W at least 11, -> (B,) float64.

    On 8-bit values, channel by channel, with a Gaussian window of 11 x 11 and sigma 1.5 whose weights sum to one, only
    where the window lies inside the image: with means mx, my, variances vx, vy and covariance c under those weights (no
    correction of bias), C1 = (0.01 * 255)^2 and C2 = (0.03 * 255)^2,
        (2 mx my + C1) (2 c + C2) / ((mx^2 + my^2 + C1) (vx + vy + C2)),
    averaged over positions and channels.
    """
    if min(images.shape[-2:]) < _WINDOW:
        raise ValueError(
            f"SSIM has a window of {_WINDOW} x {_WINDOW} pixels, but the images have {images.shape[-2]} x "
            f"{images.shape[-1]}: evaluate larger images"
        )
    x, y = to_bytes(images).double(), to_bytes(recon).double()
    mx, my = _blur(x), _blur(y)
    vx, vy, c = _blur(x * x) - mx * mx, _blur(y * y) - my * my, _blur(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = (2 * mx * my + c1) * (2 * c + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return values.flatten(1).mean(1)


def _blur(x_BCHW: Tensor) -> Tensor:
    """The mean under the Gaussian window wherever it lies inside: (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    offsets = torch.arange(_WINDOW, dtype=x_BCHW.dtype, device=x_BCHW.device) - _WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    channels = x_BCHW.shape[1]
    rows = weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
    columns = weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    return F.conv2d(F.conv2d(x_BCHW, rows, groups=channels), columns, groups=channels)


class Reconstruction:
    """Sums over the images of this rank, made so that adding the `sums()` of all ranks gives the data set's.

        total = ops.sum_over(scores.sums(), mesh.world)
        Reconstruction.from_sums(total)      # {"psnr": 21.3, "ssim": 0.61, "images": 50000.0}

    Nothing is communicated here. Every image counts once, so unequal batches and ranks do not shift the means.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, images: Tensor, recon: Tensor, valid: Tensor | None = None) -> None:
        """Count (B, C, H, W) images and reconstructions; those where valid (B,) is false are padding and left out."""
        if valid is not None:
            images, recon = images[valid], recon[valid]
        if len(images):
            values = torch.stack([psnr(images, recon), ssim(images, recon)])
            self._sums[0] += len(images)
            self._sums[1:] += values.sum(1).to(self._sums.device)

    def sums(self) -> Tensor:
        """(3,) float64: images, sum of PSNR, sum of SSIM, of this rank."""
        return self._sums.clone()

    @staticmethod
    def from_sums(sums: Tensor) -> dict[str, float]:
        """Means from sums, of one rank or added over ranks; nan where there was no image."""
        images, total_psnr, total_ssim = sums.tolist()
        mean = 1 / images if images else float("nan")
        return {"psnr": total_psnr * mean, "ssim": total_ssim * mean, "images": images}
