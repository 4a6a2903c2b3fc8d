"""The drawn pictures: a pure function of their arguments, balanced, varied, and worth more codes."""

from __future__ import annotations

import numpy as np
import pytest

from vqscale.data.made.shapes import CLASS_NAMES, NUM_CLASSES, draw


def test_a_picture_depends_on_its_arguments_alone():
    before = [draw(i, 32, seed=3)[0] for i in range(12)]
    np.random.default_rng(0).random(5)
    again = [draw(i, 32, seed=3)[0] for i in reversed(range(12))][::-1]
    for first, second in zip(before, again, strict=True):
        assert first.dtype == np.uint8
        assert first.shape == (32, 32, 3)
        np.testing.assert_array_equal(first, second)


def test_index_and_seed_change_the_picture():
    keys = {draw(index, 24, seed)[0].tobytes() for index in range(40) for seed in range(3)}
    assert len(keys) == 120


def test_labels_are_balanced_and_named():
    labels = [draw(index, 16, seed=0)[1] for index in range(5 * NUM_CLASSES)]
    np.testing.assert_array_equal(np.bincount(labels), np.full(NUM_CLASSES, 5))
    assert len(set(CLASS_NAMES)) == NUM_CLASSES >= 8


def test_another_size_shows_the_same_scene():
    """The mean of 2x2 pixels of the large picture is the small one: antialiased, and no draw depends on the size."""
    errors = []
    for index in range(3 * NUM_CLASSES):
        large, small = (draw(index, size, seed=1)[0].astype(np.float64) for size in (128, 64))
        errors.append(np.abs(large.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3)) - small).mean())
    assert np.median(errors) < 2.0
    assert max(errors) < 10.0


def test_every_class_is_varied_and_uses_the_range():
    pictures = np.stack([draw(index, 16, seed=2)[0] for index in range(20 * NUM_CLASSES)]).astype(np.float64)
    by_class = pictures.reshape(20, NUM_CLASSES, -1)
    assert (by_class.std(axis=0).mean(axis=1) > 30).all(), "pictures of a class look alike"
    assert (pictures.reshape(len(pictures), -1).std(axis=1) > 3).all(), "an empty picture"
    assert pictures.min() < 5
    assert pictures.max() > 250


def test_more_codes_reconstruct_patches_better():
    """4 x 4 patches coded by their nearest of n others: the error keeps falling from 16 to 1024 codes."""

    def patches(first: int) -> np.ndarray:
        images = np.stack([draw(first + i, 32, seed=4)[0] for i in range(60)]).astype(np.float32) / 255
        return images.reshape(60, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 48)

    book, tokens = patches(0), patches(1000)[::5]
    book = book[np.random.default_rng(0).permutation(len(book))]
    distance = (tokens**2).sum(1)[:, None] - 2 * tokens @ book.T + (book**2).sum(1)
    error = {n: float(distance[:, :n].min(axis=1).mean()) for n in (16, 128, 1024)}
    assert error[128] < 0.75 * error[16]
    assert error[1024] < 0.75 * error[128]


def test_a_size_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="8 pixels or more, but size is 4"):
        draw(0, 4, seed=0)
