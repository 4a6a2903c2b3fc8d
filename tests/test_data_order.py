"""The order of samples: each once an epoch, the same global batch on any number of ranks and workers, exact resume."""

from __future__ import annotations

import numpy as np
import pytest

from vqscale.data.order import Order, permutation


def test_permutation_is_frozen_and_a_permutation() -> None:
    assert permutation(8, 5).tolist() == [7, 4, 3, 5, 6, 2, 0, 1]
    assert sorted(permutation(1000, 3).tolist()) == list(range(1000))


@pytest.mark.parametrize("window", [0, 1, 2, 3, 100])
@pytest.mark.parametrize("counts", [[5], [3, 0, 4], [0, 7, 0, 0, 2, 5, 1], [10] * 7])
def test_each_sample_once_an_epoch(counts: list[int], window: int) -> None:
    order = Order(np.array(counts), seed=1, window_shards=window)
    total = sum(counts)
    epochs = [[order[number] for number in range(e * total, (e + 1) * total)] for e in range(3)]
    for e, epoch in enumerate(epochs):
        assert [when for when, _ in epoch] == [e] * total
        assert sorted(sample for _, sample in epoch) == list(range(total))
    if total > 10:
        assert epochs[0] != [(0, sample) for _, sample in epochs[1]]
