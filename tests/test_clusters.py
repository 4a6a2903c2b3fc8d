"""Clusters of codes: k-means beside its slow twin in numpy, on any number of ranks to the last bit; clusters by digits;
the table that says in which cluster a code is.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from vqscale.codes import noise
from vqscale.codes.clusters import Clusters
from vqscale.codes.kmeans import Method, by_digits, kmeans
from vqscale.codes.rows import Rows
from vqscale.parallel.mesh import Mesh
from vqscale.seed import derive

CODES, DIM = 101, 5
WORLDS = [2, 4]
METHODS = [
    Method(7, "euclid"),
    Method(7, "cosine", seed=3),
    Method(10, "euclid", balanced=True),
    Method(10, "cosine", balanced=True, iterations=3),
]


def points(lattice=False):
    x_KD = torch.randn(CODES, DIM, generator=torch.Generator().manual_seed(4))
    return (x_KD * 1.5).round() if lattice else x_KD  # with many equal distances


def twin(x_KD, method):
    """The definition, over Python's whole numbers: no order of sums, no rounding, pairs by sorting."""
    x = x_KD.double().numpy()
    if method.metric == "cosine":
        x = x / np.sqrt((x * x).sum(1, keepdims=True)).clip(1e-300)
    unit = 2.0 ** ((51 - math.ceil(math.log2(DIM))) // 2)
    rows = [[round(float(v)) for v in row] for row in np.rint(x * (unit / np.abs(x).max()))]
    tickets = (noise.keys(derive(method.seed, "clusters"), torch.arange(CODES)) >> 11).tolist()
    drawn = sorted(range(CODES), key=lambda i: (-tickets[i], i))[: method.num_clusters]
    centres, cluster = [rows[i] for i in drawn], None

    def score(row, centre):
        dot = sum(a * b for a, b in zip(row, centre, strict=True))
        return 2 * dot - sum(b * b for b in centre) if method.metric == "euclid" else dot

    for _ in range(method.iterations):
        before, scores = cluster, [[score(row, centre) for centre in centres] for row in rows]
        cluster = matched(scores) if method.balanced else [max(range(len(s)), key=lambda g: (s[g], -g)) for s in scores]
        if cluster == before:
            break
        far = sorted(range(CODES), key=lambda i: (scores[i][cluster[i]] - sum(a * a for a in rows[i]), i))
        for g in range(len(centres)):
            members = [rows[i] for i in range(CODES) if cluster[i] == g]
            mean = (
                [sum(column) / len(members) for column in zip(*members, strict=True)] if members else rows[far.pop(0)]
            )
            if members and method.metric == "cosine":
                length = max(1.0, math.sqrt(float((np.array(mean) ** 2).sum())))
                mean = [v * (unit / length) for v in mean]
            centres[g] = [round(v) for v in mean]
    return torch.tensor(cluster)


def matched(scores):
    """All pairs of a row and a cluster, the best first, each taken where both are still free."""
    num = len(scores[0])
    room = [CODES // num + (g < CODES % num) for g in range(num)]
    cluster = [-1] * CODES
    for _, i, g in sorted((-s, i, g) for i, row in enumerate(scores) for g, s in enumerate(row)):
        if cluster[i] < 0 and room[g]:
            cluster[i], room[g] = g, room[g] - 1
    return cluster


def found(method, lattice, codes):
    mesh = Mesh(codes=codes)
    layout = Rows(CODES, codes, mesh.codes.rank)
    return kmeans(points(lattice)[layout.start : layout.stop], layout, mesh.codes, method)


def every_method(codes):
    few = [replace(method, iterations=2) for method in METHODS]
    return torch.stack([found(method, True, codes) for method in few])


@pytest.mark.parametrize("lattice", [False, True], ids=["normal", "lattice"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.metric} {method.balanced}")
def test_kmeans_is_its_twin_in_whole_numbers(method, lattice):
    cluster_K = found(method, lattice, 1)
    assert torch.equal(cluster_K, twin(points(lattice), method))
    sizes = torch.bincount(cluster_K, minlength=method.num_clusters)
    assert sizes.min() > 0
    if method.balanced:
        assert sizes.max() - sizes.min() <= 1


@pytest.mark.dist
@pytest.mark.parametrize("world", WORLDS)
def test_clusters_do_not_depend_on_the_number_of_ranks(ranks, world):
    results = ranks(world, every_method, world)
    assert torch.equal(torch.cat(results, 1), every_method(1))


def test_seeds_give_other_clusters_and_iterations_better_ones():
    def spread(method):
        x_KD, cluster_K = points(), found(method, False, 1)
        return sum(float((x_KD[cluster_K == g] - x_KD[cluster_K == g].mean(0)).square().sum()) for g in range(7))

    assert not torch.equal(found(Method(7), False, 1), found(Method(7, seed=1), False, 1))
    assert spread(Method(7)) < spread(Method(7, iterations=1)) < 0.9 * float(points().var(0).sum() * (CODES - 1))
    assert spread(Method(7)) < spread(Method(7, balanced=True))


def test_one_cluster_has_all_codes_and_as_many_as_codes_have_one_each():
    assert found(Method(1), False, 1).tolist() == [0] * CODES
    for balanced in (False, True):
        assert sorted(found(Method(CODES, balanced=balanced), False, 1).tolist()) == list(range(CODES))


def equal_rows(method):
    return kmeans(torch.ones(CODES, DIM), Rows(CODES), Mesh().codes, method)


def test_what_cannot_be_clustered_is_said():
    with pytest.raises(ValueError, match=r"102 clusters of 101 codes: .* ask for 1 to 101"):
        found(Method(102), False, 1)
    with pytest.raises(ValueError, match=r"3 of the 4 clusters are empty .*ask for fewer clusters, or for balanced"):
        equal_rows(Method(4))
    with pytest.raises(ValueError, match="some codes are not finite"):
        kmeans(torch.tensor([[1.0], [math.inf]]), Rows(2), Mesh().codes, Method(1))
    assert torch.bincount(equal_rows(Method(4, balanced=True))).tolist() == [26, 25, 25, 25]


def test_codes_of_a_cluster_by_digits_agree_in_the_leading_ones():
    cluster_K = by_digits((5, 3, 4), 15, Rows(60))
    digits = [(i // 12, i // 4 % 3) for i in range(60)]
    for i in range(60):
        for j in range(60):
            assert (cluster_K[i] == cluster_K[j]) == (digits[i] == digits[j])
    parts = [by_digits((5, 3, 4), 15, Rows(60, 4, rank)) for rank in range(4)]
    assert torch.equal(torch.cat(parts), cluster_K)
    with pytest.raises(ValueError, match=re.escape("the digits 5 x 3 x 4") + ".*ask for 1, 5, 15, 60 clusters"):
        by_digits((5, 3, 4), 12, Rows(60))


def asked(codes):
    mesh = Mesh(codes=codes)
    clusters = Clusters(13, 4, mesh)
    first = clusters.of(torch.arange(13))
    whole = torch.tensor([3, 0, 0, 1, 2, 3, 3, 3, 0, 1, 2, 2, 0])
    clusters.members()
    clusters.take(whole[clusters.layout.start : clusters.layout.stop])
    ids = torch.tensor([[12, 5], [3, 0]]) if mesh.codes.rank == 0 else torch.tensor([[1, 1], [4, 9]])
    members = clusters.members()
    mine = [
        (members.rows_k[a:b] + clusters.layout.start).tolist()
        for a, b in zip(members.start_H[:-1], members.start_H[1:], strict=True)
    ]
    return first, clusters.of(ids), whole[ids], mine, members.size_G, members.most_G


@pytest.mark.parametrize("world", [1, pytest.param(4, marks=pytest.mark.dist)])
def test_every_rank_is_told_the_clusters_of_its_ids(ranks, world):
    results = [asked(1)] if world == 1 else ranks(world, asked, world)
    for first, got, expected, _, size_G, _ in results:
        assert first.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
        assert torch.equal(got, expected)
        assert size_G.tolist() == [4, 2, 3, 4]
    whole = [[i for _, _, _, mine, _, _ in results for i in mine[g]] for g in range(4)]
    assert whole == [[1, 2, 8, 12], [3, 9], [4, 10, 11], [0, 5, 6, 7]]
    most = [max(len(mine[g]) for _, _, _, mine, _, _ in results) for g in range(4)]
    assert results[0][-1].tolist() == most


def test_clusters_know_what_ids_there_are():
    with pytest.raises(ValueError, match=r"num_clusters is 14, and there are 13 codes"):
        Clusters(13, 14, Mesh())
    for wrong in (-1, 13):
        with pytest.raises(ValueError, match=r"ids must be in 0 \.\. 12, for there are 13 codes, but"):
            Clusters(13, 4, Mesh()).of(torch.tensor([2, wrong]))
