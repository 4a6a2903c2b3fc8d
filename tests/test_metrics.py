"""PSNR and SSIM against slow forms in numpy, sums over unequal parts, and pictures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from vqscale.metrics.reconstruction import Reconstruction, psnr, ssim, to_bytes
from vqscale.show import pictures


def pair(batch=3, height=14, width=17, noise=0.2):
    generator = torch.Generator().manual_seed(4)
    coarse = torch.rand(batch, 3, height // 2, width // 2 + 1, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear") * 2 - 1
    return images, images + noise * torch.randn(images.shape, generator=generator)


def slow_bytes(image):
    return np.array([min(max(round((float(v) + 1) * 127.5), 0), 255) for v in image.flatten()]).reshape(image.shape)


def slow_psnr(image, recon):
    x, y = slow_bytes(image), slow_bytes(recon)
    return 10 * math.log10(255**2 / np.mean((x - y).astype(float) ** 2))


def slow_ssim(image, recon):
    """Wang et al. 2004, window by window."""
    x, y = slow_bytes(image).astype(float), slow_bytes(recon).astype(float)
    weights = np.array([[math.exp(-(u * u + v * v) / (2 * 1.5**2)) for u in range(-5, 6)] for v in range(-5, 6)])
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for channel in range(x.shape[0]):
        for top in range(x.shape[1] - 10):
            for left in range(x.shape[2] - 10):
                a, b = (image[channel, top : top + 11, left : left + 11] for image in (x, y))
                ma, mb = (weights * a).sum(), (weights * b).sum()
                va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
                cov = (weights * (a - ma) * (b - mb)).sum()
                values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return np.mean(values)


def test_bytes_clamp_and_round():
    values = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0, 1 / 127.5 * 0.49, 1 / 127.5 * 0.51])
    assert to_bytes(values).tolist() == [0, 0, 128, 255, 255, 128, 128]
    assert to_bytes(torch.arange(256) / 127.5 - 1).tolist() == list(range(256))


def test_psnr_is_its_formula_per_image():
    images, recon = pair()
    expected = [slow_psnr(x, y) for x, y in zip(images, recon, strict=True)]
    assert max(expected) - min(expected) > 0.05, "the images should differ, or a mean over the batch would pass"
    torch.testing.assert_close(psnr(images, recon), torch.tensor(expected, dtype=torch.float64))


def test_psnr_by_hand():
    black, gray = -torch.ones(1, 3, 4, 4), -torch.ones(1, 3, 4, 4) + 2 * 51 / 255
    assert psnr(black, gray).item() == pytest.approx(20 * math.log10(5))
    # met exactly: as good as one value of 48 off by one
    assert psnr(gray, gray).item() == pytest.approx(10 * math.log10(255**2 * 48))


def test_ssim_is_its_formula_per_image():
    images, recon = pair()
    expected = torch.tensor([slow_ssim(x, y) for x, y in zip(images, recon, strict=True)], dtype=torch.float64)
    assert (expected > 0.05).all()
    assert (expected < 0.95).all()
    torch.testing.assert_close(ssim(images, recon), expected, rtol=1e-9, atol=1e-12)


def test_ssim_ends():
    images, _ = pair()
    torch.testing.assert_close(ssim(images, images), torch.ones(3, dtype=torch.float64))
    assert (ssim(images, -images) < 0).all()
    with pytest.raises(ValueError, match="11 x 11 pixels, but the images have 10 x 17"):
        ssim(images[:, :, :10], images[:, :, :10])


def test_sums_over_unequal_parts_are_the_means_over_all():
    images, recon = pair(batch=5)
    parts = [Reconstruction(), Reconstruction(), Reconstruction()]
    parts[0].add(images[:2], recon[:2])
    parts[0].add(images[2:3], recon[2:3])
    padded = torch.cat([images[3:], torch.full_like(images[:2], 9.0)])
    parts[1].add(padded, torch.cat([recon[3:], images[:2]]), torch.tensor([True, True, False, False]))
    parts[2].add(images[:0], recon[:0])
    parts[2].add(images[:1], recon[:1], torch.tensor([False]))
    total = sum(part.sums() for part in parts)
    assert total.dtype == torch.float64
    means = Reconstruction.from_sums(total)
    assert means["images"] == 5
    assert means["psnr"] == pytest.approx(np.mean([slow_psnr(x, y) for x, y in zip(images, recon, strict=True)]))
    assert means["ssim"] == pytest.approx(np.mean([slow_ssim(x, y) for x, y in zip(images, recon, strict=True)]))
    nothing = Reconstruction.from_sums(parts[2].sums())
    assert nothing["images"] == 0
    assert math.isnan(nothing["psnr"])


def test_sums_are_a_copy():
    scores = Reconstruction()
    scores.sums().add_(1)
    assert scores.sums().tolist() == [0, 0, 0]


def test_grid_shows_originals_above_reconstructions():
    images, recon = torch.rand(2, 5, 3, 4, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1
    picture = pictures.grid(images, recon, columns=3)
    assert picture.shape == (2 * 2 * 4, 3 * 6, 3)
    assert picture.dtype == np.uint8
    for index in range(5):
        top, left = index // 3 * 8, index % 3 * 6
        for offset, batch in ((0, images), (4, recon)):
            expected = slow_bytes(batch[index]).transpose(1, 2, 0)
            assert (picture[top + offset : top + offset + 4, left : left + 6] == expected).all()
    assert (picture[8:, 12:] == 0).all()
    assert pictures.grid(images[:2], recon[:2]).shape == (8, 12, 3)
    with pytest.raises(ValueError, match="one shape"):
        pictures.grid(images, recon[:3])
    with pytest.raises(ValueError, match="at least one"):
        pictures.grid(images[:0], recon[:0])


def test_save_writes_a_lossless_png(tmp_path):
    picture = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    path = pictures.save(tmp_path / "deep" / "er" / "a.png", picture)
    assert (np.asarray(Image.open(path)) == picture).all()
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    pictures.save(path, torch.from_numpy(255 - picture))
    assert (np.asarray(Image.open(path)) == 255 - picture).all()


@pytest.mark.slow
def test_usage_picture_depends_on_the_counts_alone():
    counts = torch.zeros(5000, dtype=torch.int64)
    counts[:37] = torch.arange(37) * 5 + 1
    picture = pictures.usage(counts)
    assert picture.shape[2] == 3
    assert picture.dtype == np.uint8
    shuffled = counts[torch.randperm(5000, generator=torch.Generator().manual_seed(0))]
    assert (pictures.usage(shuffled) == picture).all(), "the order of the codes should not matter"
    assert (pictures.usage(counts.roll(1)[:4000]) != picture).any()
    assert pictures.usage(torch.zeros(8)).shape == picture.shape
    assert pictures.usage([3]).shape == picture.shape
