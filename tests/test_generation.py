"""Scores of generated images against slow forms, on one and two processes, and the files that they come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from slow_metrics import Small, slow_frechet, slow_precision, slow_score

from vqscale.metrics.generation import InceptionScore, compare, describe, precision_recall, read_reference
from vqscale.metrics.sample_file import SampleFile
from vqscale.parallel.mesh import Axis, Mesh

ALONE = Axis("world")


def pictures(count, seed, side=8):
    """uint8 NHWC, coarse, so that averages of them differ."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    return coarse.repeat(side // 2, axis=1).repeat(side // 2, axis=2)


def saved(path, images, **more):
    np.savez(path, images, **more)
    return path


def test_inception_score_is_its_formula_in_any_order():
    logits = torch.randn(23, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    for part, count in ((5000, 23), (10, 23), (10, 20)):
        score = InceptionScore(count, 5, part=part)
        for begin, end in ((7, 13), (0, 7), (13, count)):
            score.add(logits[begin:end], begin)
        assert score.value(ALONE) == pytest.approx(slow_score(logits[:count].numpy(), part), rel=1e-12)
    certain = InceptionScore(6, 3)
    certain.add(torch.eye(3).repeat(2, 1) * 1e4, 0)  # sure of each of three classes
    assert certain.value(ALONE) == pytest.approx(3)


@pytest.mark.parametrize("block", [4, 1000])
def test_precision_and_recall_are_their_definition(block):
    draw = np.random.default_rng(2)
    reference, samples = draw.normal(size=(21, 3)), draw.normal(size=(17, 3)) * 1.5 + 0.5
    found = precision_recall(torch.from_numpy(reference), torch.from_numpy(samples), block=block)
    expected = slow_precision(reference, samples), slow_precision(samples, reference)
    assert found == pytest.approx(expected)
    assert 0 < expected[0] < expected[1] < 1, "a case in which neither is trivial, nor one the other"


def test_precision_and_recall_at_their_ends():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(3))
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)
    assert precision_recall(x, x[:1].expand(5, 4)) == (1.0, 1 / 9)  # one good sample, again and again
    with pytest.raises(ValueError, match="neighbour 3 of each image, but one of the sets has 3"):
        precision_recall(x, x[:3])


def test_sample_files_are_read_in_parts(tmp_path):
    images = pictures(11, 4)
    np.savez_compressed(tmp_path / "packed.npz", images)
    for path in (saved(tmp_path / "a.npz", images, labels=np.zeros(11)), tmp_path / "packed.npz"):
        file = SampleFile(path)
        assert len(file) == 11
        for world in (1, 2, 3):
            found = [part for rank in range(world) for part in file.batches(4, rank, world)]
            assert [first for first, _ in found] == np.cumsum([0, *[len(x) for _, x in found]])[:-1].tolist()
            assert max(len(x) for _, x in found) <= 4
            together = torch.cat([x for _, x in found])
            np.testing.assert_array_equal(together.permute(0, 2, 3, 1), images)


def test_files_that_are_no_samples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="are no file"):
        SampleFile(tmp_path / "none.npz")
    for images in (pictures(3, 0).astype(np.float32), pictures(3, 0)[0], pictures(3, 0)[..., :1], pictures(3, 0)[:0]):
        with pytest.raises(ValueError, match=r"arr_0 is .* of shape .*give an npz with uint8 images of N x height"):
            SampleFile(saved(tmp_path / "a.npz", images))
    np.savez(tmp_path / "b.npz", other=pictures(3, 0))
    with pytest.raises(ValueError, match=r"cannot be read .*arr_0"):
        SampleFile(tmp_path / "b.npz")
    cut = saved(tmp_path / "c.npz", pictures(9, 0))
    cut.write_bytes(cut.read_bytes()[:-700])
    with pytest.raises(ValueError, match="cut off or no npz"):
        SampleFile(cut)


def _compared(data, samples, reference, published, batch):
    mesh, network = Mesh(data=data), Small(published)
    described = describe(SampleFile(samples), network, mesh, batch=batch)
    return compare(described, read_reference(reference, network, mesh, batch=batch)), described.points_ND


@pytest.fixture
def sets(tmp_path):
    """(file of samples, file of a reference, their features)."""
    both = {"samples": pictures(13, 5), "reference": pictures(19, 6)}
    files = {name: saved(tmp_path / f"{name}.npz", images) for name, images in both.items()}
    found = {n: [y.numpy() for y in Small()(torch.from_numpy(x).permute(0, 3, 1, 2))] for n, x in both.items()}
    return files, found


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.dist)])
def test_all_scores_are_their_slow_forms_on_any_number_of_ranks(ranks, sets, world, monkeypatch):
    files, found = sets
    (pool, spatial, logits), (pool_r, spatial_r, _) = found["samples"], found["reference"]
    expected = {
        "fid": slow_frechet(pool, pool_r),
        "sfid": slow_frechet(spatial, spatial_r),
        "inception_score": slow_score(logits, 5000),
        "precision": slow_precision(pool_r, pool),
        "recall": slow_precision(pool, pool_r),
    }
    for scores, points in ranks(world, _compared, world, files["samples"], files["reference"], True, 4):
        assert scores == pytest.approx(expected, rel=1e-9)
        np.testing.assert_allclose(points, pool, rtol=1e-12)


def test_numbers_by_other_weights_have_other_names(sets):
    files, _ = sets
    scores, _ = _compared(1, files["samples"], files["reference"], False, 64)
    theirs, _ = _compared(1, files["samples"], files["reference"], True, 64)
    assert list(scores.values()) == list(theirs.values())
    assert not scores.keys() & theirs.keys()
    assert not any("fid" in name or name.startswith("inception_score") for name in scores)
    assert scores["distance_other_inception"] == theirs["fid"]


def test_a_reference_states_what_its_images_do_not_say(tmp_path, sets):
    files, found = sets
    pool, _, logits = found["samples"]
    other = np.random.default_rng(7).normal(size=(40, 6))
    mu, sigma = other.mean(0), np.cov(other, rowvar=False)
    both = saved(tmp_path / "both.npz", pictures(19, 6), mu=mu, sigma=sigma)
    scores, _ = _compared(1, files["samples"], both, True, 64)
    assert scores["fid"] == pytest.approx(slow_frechet(pool, other), rel=1e-9)  # as stated, not of the images
    assert scores["precision"] == pytest.approx(slow_precision(found["reference"][0], pool))
    np.savez(tmp_path / "stated.npz", mu=mu, sigma=sigma)
    scores, _ = _compared(1, files["samples"], tmp_path / "stated.npz", True, 64)
    assert scores == pytest.approx(
        {"fid": slow_frechet(pool, other), "inception_score": slow_score(logits, 5000)}, rel=1e-9
    )
    np.savez(tmp_path / "large.npz", mu=np.zeros(9), sigma=np.eye(9))
    with pytest.raises(ValueError, match="statistics of 6 and of 9 features"):
        _compared(1, files["samples"], tmp_path / "large.npz", True, 64)


def test_more_processes_than_images_is_an_error(tmp_path):
    class Crowd:
        device = "cpu"
        world = Axis("world", 5, 0)

    with pytest.raises(ValueError, match="has 4 images for 5 processes"):
        describe(SampleFile(saved(tmp_path / "few.npz", pictures(4, 0))), Small(), Crowd())
