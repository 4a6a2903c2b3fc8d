"""VQ: the formula of the paper, its gradients, and what nearest means under each similarity."""

from __future__ import annotations

import pytest
import torch
from whole import close, normal, put

from vqscale import quantizers

K, DIM, TOKENS = 13, 4, 24


def _vq(**settings):
    quantizer = quantizers.build({"name": "vq", "num_codes": K, "dim": DIM, "init": "normal", **settings})
    put(quantizer.codebook, normal(K, DIM, seed=1))
    return quantizer


def test_losses_and_gradients_are_those_of_the_paper():
    quantizer, x = _vq(commitment_weight=0.3, codebook_weight=0.7), normal(TOKENS, DIM, seed=2).requires_grad_()
    g = normal(TOKENS, DIM, seed=3)
    rows = normal(K, DIM, seed=1)
    ids = torch.cdist(x.detach(), rows).argmin(1)
    c = rows[ids]
    out = quantizer(x)
    assert torch.equal(out.ids, ids)
    close(out.losses["codebook"].detach(), 0.7 * (x.detach() - c).square().mean())
    close(out.losses["commitment"].detach(), 0.3 * (x.detach() - c).square().mean())
    (sum(out.losses.values()) + (out.z * g).sum()).backward()
    step = 2 / (TOKENS * DIM)
    close(x.grad, g + 0.3 * step * (x.detach() - c))
    expected = torch.zeros(K, DIM, dtype=torch.float64).index_add_(0, ids, 0.7 * step * (c - x.detach()))
    close(quantizer.codebook.rows.grad, expected)


def test_nearest_is_what_the_similarity_says():
    # ibq.md's case of a long code: (1, 0) is at distance 0, (3, 0.1) has the larger product
    rows, x = torch.tensor([[1.0, 0.0], [3.0, 0.1], [0.0, -9.0]]), torch.tensor([[1.0, 0.0]])
    for similarity, expected in (("euclid", 0), ("cosine", 0), ("dot", 1)):
        quantizer = quantizers.build({"name": "vq", "num_codes": 3, "dim": 2, "similarity": similarity})
        put(quantizer.codebook, rows)
        out = quantizer(x)
        assert out.ids.tolist() == [expected]
        assert torch.equal(out.z, rows[[expected]]), "the value of a code is its row, whatever the similarity"


@pytest.mark.parametrize("similarity", ["dot", "euclid", "cosine"])
def test_permuted_codes_give_permuted_ids(similarity):
    quantizer, x = _vq(similarity=similarity), normal(TOKENS, DIM, seed=2)
    ids = quantizer.encode(x)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(1))
    put(quantizer.codebook, normal(K, DIM, seed=1)[order])
    assert torch.equal(order[quantizer.encode(x)], ids)


def test_update_gives_the_rows_whose_moments_are_to_be_forgotten():
    quantizer = _vq(revive_every=1, revive_after=1, revive_most=5, window_decay=0.5)
    quantizer.begin()
    x = normal(K, DIM, seed=1)[:5].clone()  # codes 0 to 4 are hit, the other 8 are dead; 5 tokens can replace 5
    quantizer(x)
    ((parameter, local),) = quantizer.update()
    assert parameter is quantizer.codebook.rows
    assert len(local) == 5
    assert set(local.tolist()) <= set(range(5, K))
