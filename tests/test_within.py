"""The softmax within clusters beside the dense one with all other codes left out: losses, gradients, what is drawn."""

from __future__ import annotations

import math

import pytest
import torch

from vqscale.codes import noise
from vqscale.codes.clusters import Clusters
from vqscale.codes.heads import dense, within
from vqscale.codes.heads.draw import Rule
from vqscale.codes.heads.flat import Head
from vqscale.parallel.mesh import Mesh

CODES, DIM, TOKENS = 37, 6, 48
UNEVEN = torch.randint(5, (CODES,), generator=torch.Generator().manual_seed(1))
KINDS = {
    "uneven": UNEVEN,
    "even": torch.arange(CODES) % 5,
    "one": torch.zeros(CODES).long(),
    "all": torch.arange(CODES),
}
WORLDS = [1, pytest.param(2, marks=pytest.mark.dist), pytest.param(4, marks=pytest.mark.dist)]


def numbers():
    made = torch.Generator().manual_seed(2)
    ids_N = torch.randint(CODES, (TOKENS,), generator=made)
    return torch.randn(CODES, DIM, generator=made).double(), torch.randn(TOKENS, DIM, generator=made).double(), ids_N


def built(kind, mesh, scan_mib=1):
    head = Head(CODES, DIM, mesh, embedding="tied", scan_mib=scan_mib).double()
    with torch.no_grad():
        head.rows.copy_(numbers()[0][head.layout.start : head.layout.stop])
    clusters = Clusters(CODES, int(KINDS[kind].max()) + 1, mesh)
    clusters.take(KINDS[kind][clusters.layout.start : clusters.layout.stop])
    return head, clusters


def masked(logits_NK, kind, ids_N):
    return logits_NK.masked_fill(KINDS[kind] != KINDS[kind][ids_N, None], -math.inf)


def found(kind, more, codes):
    mesh = Mesh(codes=codes)
    head, clusters = built(kind, mesh)
    head.outputs.budget = 3000  # several blocks of tiles
    _, x_ND, ids_N = (x.chunk(codes)[mesh.codes.rank] for x in numbers())
    x_ND = x_ND.clone().requires_grad_()
    losses = within.losses(x_ND, head, clusters, clusters.of(ids_N), ids_N, **more)
    (losses.whole_N * torch.arange(1.0, 1 + len(ids_N))).sum().backward()
    assert losses.right_N is None
    judged = within.losses(x_ND, head, clusters, clusters.of(ids_N), ids_N, **more, right=True)
    assert all(torch.equal(a, b) for a, b in zip(judged[:3], losses[:3], strict=True))
    likeliest = within.sample(
        x_ND.detach(), head, clusters, clusters.of(ids_N), torch.zeros_like(ids_N), Rule(temperature=0.0)
    )
    assert torch.equal(judged.right_N, likeliest == ids_N)
    return [x.detach() for x in losses[:3]], x_ND.grad, head.rows.grad


CASES = [("uneven", {}), ("uneven", {"label_smoothing": 0.2, "z_loss": 0.05}), ("even", {}), ("one", {}), ("all", {})]


def every_case(codes):
    return [found(kind, more, codes) for kind, more in CASES]


@pytest.mark.parametrize("world", WORLDS)
def test_losses_and_gradients_are_those_of_the_masked_softmax(ranks, world):
    results = [every_case(1)] if world == 1 else ranks(world, every_case, world)
    for case, (kind, more) in enumerate(CASES):
        parts = [each[case] for each in results]
        rows_KD, x_ND, ids_N = numbers()
        rows_KD.requires_grad_()
        x_ND.requires_grad_()
        l_NK = masked(x_ND @ rows_KD.t(), kind, ids_N)
        log_NK, e = l_NK.log_softmax(1), more.get("label_smoothing", 0.0)
        plain_N = -log_NK.gather(1, ids_N[:, None])[:, 0]
        there_NK = l_NK.isfinite()
        even_N = -(log_NK.masked_fill(~there_NK, 0.0).sum(1) / there_NK.sum(1))
        square_N = l_NK.logsumexp(1).square()
        whole_N = (1 - e) * plain_N + e * even_N + more.get("z_loss", 0.0) * square_N
        weights = torch.arange(1.0, 1 + TOKENS // world).repeat(world)
        (whole_N * weights).sum().backward()
        for at, expected in enumerate((whole_N, plain_N, square_N)):
            torch.testing.assert_close(torch.cat([got[at] for got, _, _ in parts]), expected.detach())
        torch.testing.assert_close(torch.cat([dx for _, dx, _ in parts]), x_ND.grad)
        torch.testing.assert_close(torch.cat([dr for _, _, dr in parts]), rows_KD.grad)


RULES = [Rule(), Rule(0.7), Rule(1.0, top_k=3), Rule(1.3, top_p=0.6), Rule(1.0, 4, 0.8), Rule(0.0)]


def drawn(codes):
    mesh = Mesh(codes=codes)
    head, clusters = built("uneven", mesh)
    head.outputs.budget = 3000
    _, x_ND, ids_N = (x.chunk(codes)[mesh.codes.rank] for x in numbers())
    keys_N = noise.keys(7, torch.arange(TOKENS)).chunk(codes)[mesh.codes.rank]
    args = (x_ND, head, clusters, clusters.of(ids_N), keys_N)
    return [within.sample(*args, rule, -x_ND, 1.5) for rule in RULES] + [within.sample(*args, Rule())]


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_what_is_drawn_is_the_gumbel_maximum_of_the_members(ranks, world):
    kind, results = "uneven", [drawn(1)] if world == 1 else ranks(world, drawn, world)
    rows_KD, x_ND, ids_N = numbers()
    g_NK = noise.gumbel(noise.keys(7, torch.arange(TOKENS)), 0, CODES, torch.float64)
    for at, rule in enumerate([*RULES, Rule()]):
        x = x_ND if at == len(RULES) else 2 * x_ND  # guided: -x + 1.5 (x - -x)
        got_N = torch.cat([ids[at] for ids in results])
        for n in range(TOKENS):
            rows = (KINDS[kind] == KINDS[kind][ids_N[n]]).nonzero()[:, 0]
            how = {"temperature": rule.temperature, "top_k": rule.top_k, "top_p": rule.top_p}
            p_1S = dense.distribution(x[n : n + 1], rows_KD[rows], **how)
            noise_S = g_NK[n, rows] if rule.temperature else 0.0
            assert got_N[n] == rows[(p_1S[0].log() + noise_S).argmax()]


def test_within_one_cluster_it_is_the_flat_head_and_within_one_code_nothing():
    _, x_ND, ids_N = numbers()
    head, clusters = built("one", Mesh())
    flat, here = head.losses(x_ND, ids_N), within.losses(x_ND, head, clusters, clusters.of(ids_N), ids_N)
    torch.testing.assert_close(here.whole_N, flat.whole_N)
    keys_N = noise.keys(7, torch.arange(TOKENS))
    assert torch.equal(within.sample(x_ND, head, clusters, ids_N * 0, keys_N, Rule()), head.sample(x_ND, keys_N))
    head, clusters = built("all", Mesh())
    assert within.losses(x_ND, head, clusters, ids_N, ids_N).whole_N.abs().max() == 0
    assert torch.equal(within.sample(x_ND, head, clusters, ids_N, keys_N, Rule()), ids_N)
