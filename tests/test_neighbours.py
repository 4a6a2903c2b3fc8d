"""Targets that are shared with the nearest codes: the table against sorting, the loss against its dense form."""

from __future__ import annotations

import pytest
import torch
from test_head import DIM, TOKENS, whole_targets
from whole import CODES, GRIDS, close, engine_gradient, mine, normal, put

from vqscale.codes.heads import dense, neighbours
from vqscale.codes.heads.config import FlatConfig
from vqscale.codes.heads.flat import Head
from vqscale.codes.rows import Rows
from vqscale.config import ConfigError, parse
from vqscale.parallel.mesh import Mesh

WIDTH = 5
CASES = [(3, 2, 1.0, {}), (13, 4, 0.7, {"z_loss": 0.3, "ignore": 0}), (131, 6, 2.0, {"label_smoothing": 0.2})]


def features(num_codes):
    """Some are equal, so that ties have to go to the lowest id."""
    vectors = normal(num_codes, WIDTH, seed=num_codes + 1)
    vectors[num_codes // 2] = vectors[0]
    return vectors


def _found(codes, num_codes, count):
    mesh = Mesh(1, codes)
    layout = Rows(num_codes, codes, mesh.codes.rank)
    found = neighbours.find(features(num_codes)[layout.start : layout.stop], layout, mesh.codes, count, 0.7)
    asked = torch.tensor([num_codes - 1, -1, 0])
    return found.ids_km, found.weights_km, found.of(asked)


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize(("num_codes", "count"), [(3, 3), (41, 5)])
def test_neighbours_are_those_of_sorting_all_distances(ranks, codes, num_codes, count):
    results = ranks(codes, _found, codes, num_codes, count)
    ids, weights = (torch.cat([result[part] for result in results]) for part in (0, 1))
    x = features(num_codes)
    for code in range(num_codes):
        apart = [round(float((x[code] - other).square().sum()), 9) for other in x]
        expected = sorted(range(num_codes), key=lambda other: (other != code, apart[other], other))[:count]
        assert ids[code].tolist() == expected
    shares = torch.zeros(num_codes, num_codes, dtype=weights.dtype).scatter(1, ids, weights)
    close(shares, dense.shares(x, count, 0.7))
    for _, _, (of_ids, of_weights) in results:
        assert of_ids.tolist() == [ids[-1].tolist(), [-1] * count, ids[0].tolist()]
        close(of_weights[1], torch.zeros(count).double())
        close(of_weights[2], weights[0])


def test_many_blocks_of_rows_and_codes_find_the_same(monkeypatch):
    whole = _found(1, 41, 5)
    monkeypatch.setattr(neighbours, "QUERIES", 7)
    monkeypatch.setattr(neighbours, "BLOCK", 4)
    blocks = _found(1, 41, 5)
    assert torch.equal(whole[0], blocks[0])
    close(whole[1], blocks[1])


def head_with(num_codes, count, temperature, mesh):
    options = {"embedding": "codebook", "feature_dim": WIDTH, "neighbours": count, "neighbour_temperature": temperature}
    head = Head(num_codes, DIM, mesh, **options).double()
    head.set_features(lambda ids: features(num_codes)[ids])
    put(head.outputs, normal(num_codes, DIM, seed=num_codes))
    return head


def _losses(data, codes):
    mesh, out = Mesh(data, codes), []
    for num_codes, count, temperature, options in CASES:
        head = head_with(num_codes, count, temperature, mesh)
        h = mine(normal(TOKENS, DIM, seed=2), mesh).requires_grad_()
        targets = mine(whole_targets(num_codes, options.get("ignore", -1)), mesh)
        losses = head.losses(h, targets, **options)
        (losses.whole_N * mine(normal(TOKENS, seed=3), mesh)).mean().backward()
        alone = head.eval().losses(h, targets, **options).whole_N.detach()
        out.append((losses.whole_N.detach(), h.grad, head.rows.grad, losses.cross_entropy_N, alone))
    return out


@pytest.mark.parametrize("grid", GRIDS)
def test_a_shared_loss_and_its_gradients_are_the_dense_ones(ranks, grid):
    results = ranks(grid[0] * grid[1], _losses, *grid)
    for case, (num_codes, count, temperature, options) in enumerate(CASES):
        h = normal(TOKENS, DIM, seed=2).requires_grad_()
        rows = normal(num_codes, DIM, seed=num_codes).requires_grad_()
        targets = whole_targets(num_codes, options.get("ignore", -1))
        shares = dense.shares(features(num_codes), count, temperature)
        expected = dense.loss(h, rows, targets, shares_KK=shares, **options)
        (expected * normal(TOKENS, seed=3)).mean().backward()
        got = [result[case] for result in results]
        close(torch.cat([part[0] for part in got]), expected.detach())
        close(torch.cat([part[1] for part in got]) / len(got), h.grad)
        close(engine_gradient([part[2] for part in got], grid[1]), rows.grad)
        alone = dense.loss(h, rows, targets, ignore=options.get("ignore", -1)).detach()
        close(torch.cat([part[3] for part in got]), alone)  # what is told is of the target alone
        close(torch.cat([part[4] for part in got]), dense.loss(h, rows, targets, **options).detach())


def test_the_dense_shares_are_a_distribution_that_falls_with_distance():
    x = torch.tensor([[0.0], [1.0], [3.0], [3.5]], dtype=torch.float64)
    shares = dense.shares(x, 3, 1.0)
    scale = (1.0 + 1.0 + 0.25 + 0.25) / 4
    weights = torch.tensor([1.0, 1.0, 9.0]).double().mul(torch.tensor([0.0, 1.0, 1.0]).double()).div(-scale).exp()
    close(shares[0], torch.cat([weights / weights.sum(), torch.zeros(1).double()]))
    assert (shares > 0).sum(1).tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"neighbours": 4}, "neighbours is 4 with embedding: rows"),
        ({"neighbours": -1, "embedding": "codebook"}, "neighbours is -1"),
        ({"neighbour_temperature": 0.0}, "neighbour_temperature is 0.0"),
    ],
)
def test_what_cannot_be_shared_is_refused(given, told):
    with pytest.raises(ConfigError, match=told):
        parse(FlatConfig, given, source="test")
    if given.get("neighbours", 0) > 1:
        with pytest.raises(ValueError, match="neighbours is 4 and embedding is rows, arguments of Head"):
            Head(10, DIM, **given)
