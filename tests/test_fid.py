"""Sums of features, the Fréchet distance and files of statistics, against numpy, scipy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from slow_metrics import slow_frechet

from vqscale.metrics import fid
from vqscale.metrics.fid import Moments, Statistics, frechet
from vqscale.parallel.mesh import Axis, Mesh

ALONE = Axis("world")


def features(count, dim=6, seed=0, mean=0.0):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(count, dim)) @ np.random.default_rng(9).normal(size=(dim, dim)) + mean


def statistics(x, axis=ALONE):
    moments = Moments(x.shape[1])
    moments.add(torch.from_numpy(x))
    return moments.statistics(axis)


def diagonal(mean, variances):
    variances = torch.tensor(variances, dtype=torch.float64)
    return Statistics(torch.full((len(variances),), mean, dtype=torch.float64), variances.diag())


def test_moments_are_numpys_whatever_the_batches():
    x = features(50, mean=1e4)  # sums of squares about zero would lose eight digits here
    moments = Moments(6)
    for part in (x[:0], x[:7], x[7:8], x[8:]):
        moments.add(torch.from_numpy(part))
    found = moments.statistics(ALONE)
    assert found.count == 50
    np.testing.assert_allclose(found.mu_D, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.sigma_DD, np.cov(x, rowvar=False), rtol=1e-10)
    half = Moments(6)
    half.add(torch.from_numpy(x[:1]).float())
    with pytest.raises(ValueError, match="at least 2 images, and there are 1"):
        half.statistics(ALONE)


def _parts(sizes):
    mesh = Mesh(data=len(sizes))
    x = np.split(features(40, mean=30.0), np.cumsum(sizes)[:-1])[mesh.world.rank]
    return statistics(x, mesh.world)


@pytest.mark.dist
def test_moments_of_ranks_are_those_of_all(ranks):
    whole = statistics(features(40, mean=30.0))
    for sizes in ([13, 27], [0, 40]):
        for found in ranks(2, _parts, sizes):
            assert found.count == 40
            torch.testing.assert_close(found.mu_D, whole.mu_D, rtol=1e-13, atol=0)
            torch.testing.assert_close(found.sigma_DD, whole.sigma_DD, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("one", "other"), [(200, 300), (9, 300), (7, 8)])
def test_distance_is_scipys(one, other):
    x, y = features(one, seed=1), features(other, seed=2, mean=0.3) * 1.2
    found = frechet(statistics(x), statistics(y))
    assert found == pytest.approx(slow_frechet(x, y), rel=1e-9)
    assert found == pytest.approx(frechet(statistics(y), statistics(x)), rel=1e-12)
    assert found == pytest.approx(frechet(statistics(x + 7), statistics(y + 7)), rel=1e-9)


def test_distance_of_gaussians_that_are_known():
    a, b = diagonal(1.0, [4.0, 9.0, 0.25]), diagonal(3.0, [1.0, 16.0, 0.25])
    assert frechet(a, b) == pytest.approx(3 * 2.0**2 + (2 - 1) ** 2 + (3 - 4) ** 2)
    turn, _ = torch.linalg.qr(torch.from_numpy(features(3, 3)))
    turned = [Statistics(turn @ s.mu_D, turn @ s.sigma_DD @ turn.T) for s in (a, b)]
    assert frechet(*turned) == pytest.approx(frechet(a, b), rel=1e-12)
    # covariances without full rank: nothing in common, one inside the other, nothing at all
    assert frechet(diagonal(0.0, [4, 0, 0]), diagonal(0.0, [0, 9, 1])) == pytest.approx(4 + 9 + 1)
    assert frechet(diagonal(0.0, [4, 0, 0]), diagonal(0.0, [1, 9, 1])) == pytest.approx(1 + 9 + 1)
    assert frechet(diagonal(0.0, [0, 0, 0]), diagonal(2.0, [0, 0, 5])) == pytest.approx(12 + 5)


def test_fewer_images_than_features_cost_no_digits():
    """Rank 11 of 300: the root of a product would leave 1e-8 for each of the 289 eigenvalues that are rounding."""
    x, y = features(12, 300, seed=3, mean=5.0), features(12, 300, seed=4, mean=5.0)
    assert frechet(statistics(x), statistics(x)) <= 1e-10 * np.trace(np.cov(x, rowvar=False))
    a, b = (v - v.mean(0) for v in (x, y))
    crossed = np.linalg.svd(a @ b.T / 11, compute_uv=False).sum()  # of the 12 x 12 products, without covariances
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + ((a**2).sum() + (b**2).sum()) / 11 - 2 * crossed
    assert frechet(statistics(x), statistics(y)) == pytest.approx(expected, rel=1e-10)


def test_files_come_back_and_are_those_of_others_too(tmp_path):
    pool, spatial = statistics(features(20)), statistics(features(20, 4))
    facts = {"sha256": "ab12", "data": "val"}
    points = torch.from_numpy(features(4)).float()
    fid.save(tmp_path / "deep" / "a.npz", pool, spatial, facts, points)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.npz"]
    found = fid.read(tmp_path / "deep" / "a.npz", facts, (6, 4, 9))
    assert (found.facts, found.images, found.pool.count) == (facts, False, 20)
    assert torch.equal(found.points_ND, points)
    for mine, theirs in ((found.pool, pool), (found.spatial, spatial)):
        assert torch.equal(mine.mu_D, theirs.mu_D)
        assert torch.equal(mine.sigma_DD, theirs.sigma_DD)
    with np.load(tmp_path / "deep" / "a.npz") as file:  # as ADM's evaluator reads it
        np.testing.assert_array_equal(file["mu_s"], spatial.mu_D)
        np.testing.assert_array_equal(file["sigma"], pool.sigma_DD)
    mu, sigma = pool.mu_D.numpy().astype(np.float32), pool.sigma_DD.numpy()
    np.savez(tmp_path / "others.npz", mu=mu, sigma=sigma, arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    found = fid.read(tmp_path / "others.npz", facts)
    assert (found.images, found.spatial, found.pool.count, found.facts) == (True, None, None, {})
    assert found.points_ND is None
    np.savez(tmp_path / "images.npz", np.zeros((2, 8, 8, 3), np.uint8))
    assert fid.read(tmp_path / "images.npz").pool is None


def test_files_that_do_not_fit_are_refused(tmp_path):
    pool = statistics(features(20))
    path = tmp_path / "a.npz"
    fid.save(path, pool, None, {"sha256": "ab12"})
    with pytest.raises(ValueError, match=r"statistics of 2048 and of 6 features cannot be compared.*same network"):
        fid.read(path, dims=(2048, 2023))
    with pytest.raises(ValueError, match="of 6 and of 4 features"):
        frechet(pool, statistics(features(20, 4)))
    with pytest.raises(ValueError, match=r"made by the network whose weights have sha256 ab12.*here it is cd34"):
        fid.read(path, {"sha256": "cd34"})
    with pytest.raises(ValueError, match=r"are no file: give an npz with mu and sigma"):
        fid.read(tmp_path / "none.npz")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="cut off or no npz"):
        fid.read(path)
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="cut off or no npz"):
        fid.read(path)
    mu, sigma = np.zeros(3), np.eye(3)
    for arrays, message in (
        ({"x": mu}, "neither mu and sigma nor images"),
        ({"mu": mu}, r"mu has shape \(3,\) and sigma None"),
        ({"mu": mu, "sigma": sigma[:2]}, r"sigma \(2, 3\), and not \(D,\) and \(D, D\)"),
        ({"mu": mu, "sigma": sigma * np.nan}, "not finite"),
        (
            {"mu": mu, "sigma": sigma, "points": sigma[:, :2]},
            r"of shape \(3, 2\), and not floats of \(N, 3\)",
        ),
        ({"mu": mu, "sigma": sigma, "points": np.full((2, 3), np.inf)}, "values that are not finite"),
    ):
        np.savez(tmp_path / "b.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            fid.read(tmp_path / "b.npz")
