"""Head.sample_scored: the ids that `sample` draws, and their log p from the same pass over split rows."""

from __future__ import annotations

import pytest
import torch
from whole import CODES, close, mine, normal, put

from vqscale.codes import noise
from vqscale.codes.heads.flat import Head
from vqscale.parallel.mesh import Mesh

DIM, TOKENS = 6, 24
# (temperature, top_k, top_p); and K, bytes for blocks: fewer codes than ranks, uneven K, blocks of 64 rows
RULES = [(1.0, 0, 1.0), (0.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 20, 0.6)]
CASES = [(3, 2**26), (517, 2**26), (517, 1)]


def dense_log_p(h, rows, ids, temperature, null=None, guidance=1.0):
    """Of the ids, the logits minus their log-sum-exp, written out."""
    logits = h @ rows.t()
    if null is not None:
        unknown = null @ rows.t()
        logits = unknown + guidance * (logits - unknown)
    logits = logits / (temperature or 1.0)
    return (logits - logits.logsumexp(1, keepdim=True)).gather(1, ids[:, None])[:, 0]


def _scored(codes):
    """(ids, log p, the ids of `sample`) of a global batch, for every case, with guidance and without."""
    mesh, out = Mesh(1, codes), {}
    h, null = (mine(normal(TOKENS, DIM, seed=seed), mesh) for seed in (2, 3))
    keys = mine(noise.keys(5, torch.arange(TOKENS)), mesh)
    for num_codes, budget in CASES:
        head = Head(num_codes, DIM, mesh)
        put(head.outputs, normal(num_codes, DIM, seed=num_codes))
        head.outputs.budget = budget
        for rule in RULES:
            options = dict(zip(("temperature", "top_k", "top_p"), rule, strict=True))
            for guidance in (1.0, 2.5):
                guided = {"unguided_ND": null, "guidance": guidance} if guidance != 1 else {}
                found = head.sample_scored(h, keys, **options, **guided)
                plain = head.sample(h, keys, **options, **guided)
                out[num_codes, budget, rule, guidance] = (*found, plain)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("codes", CODES)
def test_log_p_is_that_of_the_dense_definition_and_the_ids_are_those_of_sample(ranks, codes):
    results = ranks(codes, _scored, codes)
    h, null = normal(TOKENS, DIM, seed=2), normal(TOKENS, DIM, seed=3)
    for key in results[0]:
        num_codes, _, rule, guidance = key
        ids, log_p, plain = (torch.cat(parts) for parts in zip(*(result[key] for result in results), strict=True))
        assert torch.equal(ids, plain), key
        rows = normal(num_codes, DIM, seed=num_codes)
        expected = dense_log_p(h, rows, ids, rule[0], null if guidance != 1 else None, guidance)
        close(log_p, expected)


def test_equal_logits_have_equal_scores_to_the_bit_and_a_sure_id_has_none_above_zero():
    head = Head(517, DIM)
    found = head.sample_scored(normal(TOKENS, DIM, seed=2).float(), noise.keys(1, torch.arange(TOKENS)))
    assert found.ids_N.unique().numel() > 8
    assert found.log_p_N.unique().numel() == 1
    close(found.log_p_N[:1], -torch.tensor([517.0]).log(), 1e-6)
    sure = Head(DIM, DIM)
    put(sure.outputs, 100 * torch.eye(DIM))
    assert (sure.sample_scored(torch.eye(DIM), torch.arange(DIM)).log_p_N == 0).all()


def test_log_p_is_minus_the_loss():
    head = Head(40, DIM)
    put(head.outputs, normal(40, DIM, seed=1))
    h = normal(TOKENS, DIM, seed=2)
    ids, log_p = head.sample_scored(h, torch.arange(TOKENS))
    close(log_p, -head.loss(h, ids).detach())
