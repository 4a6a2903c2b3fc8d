"""Codebook.mix at its edges: second derivatives, graphs used twice, half precision, no tokens, random cases.

The definition is dense.py, as in test_mix.py.
"""

from __future__ import annotations

import random

import pytest
import torch
from whole import CODES, mine, normal, put

from vqscale.codes import dense, scan
from vqscale.codes.codebook import Codebook
from vqscale.codes.convex import exact, relaxed
from vqscale.codes.heads.flat import Head
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh

TOKENS = 24
# (processes, seed)
RANDOM = [*((1, seed) for seed in range(24)), *(pytest.param(3, seed, marks=pytest.mark.dist) for seed in range(8))]


def _everything(mixed):
    """One number in which every output of a mixture is."""
    total = mixed.mean_ND.square().sum() + mixed.code_ND.square().sum() + mixed.lse_N.sum()
    return total + mixed.entropy_N.square().sum() + mixed.columns_k.square().sum()


@pytest.mark.parametrize("temperature", [0.001, 1.0])  # by pairs, where a wrong derivative would be silent; in blocks
def test_second_derivatives_of_a_mixture_are_refused(temperature):
    x = torch.randn(5, 8).requires_grad_()
    out = Codebook(2000, 8).mix(x, temperature).mean_ND
    with pytest.raises(RuntimeError, match=r"Codebook\.mix has first derivatives only.*leave create_graph out"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: Head(50, 8).loss(x, torch.arange(5)),
        lambda x: relaxed.combine(x, Codebook(50, 8, similarity="euclid"), 0.1)[0],
        lambda x: exact.combine(x, Codebook(50, 8, similarity="euclid"), 0.1)[0],
    ],
)
def test_second_derivatives_of_other_closed_forms_are_refused(function):
    x = torch.randn(5, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="has first derivatives only"):
        torch.autograd.grad(function(x).sum(), x, create_graph=True)


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    codebook = put(Codebook(700, 6), normal(700, 6, seed=1))
    x = normal(TOKENS, 6, seed=2).requires_grad_()
    total = _everything(codebook.mix(x, 1.0, 0.05))
    first, second = (torch.autograd.grad(total, (x, codebook.rows), retain_graph=True) for _ in range(2))
    assert all(part.any() for part in first)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_saved_is_unpacked_once():
    """Checkpointing makes saved tensors again when they are asked for, and refuses to be asked twice."""
    unpacked = []

    def pack(x):
        return len(unpacked), unpacked.append(0), x

    def unpack(packed):
        unpacked[packed[0]] += 1
        return packed[2]

    codebook = Codebook(700, 6)
    x = torch.randn(TOKENS, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        total = _everything(codebook.mix(x, 1.0, 0.05))
    total.backward()
    assert set(unpacked) == {1}


def test_rows_that_change_before_the_backward_pass_are_an_error():
    codebook = Codebook(70, 6)
    out = codebook.mix(torch.randn(3, 6, requires_grad=True))
    codebook.replace(torch.tensor([3]), torch.ones(1, 6))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.mean_ND.sum().backward()


@pytest.mark.parametrize("similarity", ["dot", "euclid", "cosine"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_rows_in_half_precision_are_multiplied_in_float32(kind, similarity):
    whole = normal(300, 8, seed=1).to(kind)
    half, full = (put(Codebook(300, 8, similarity=similarity), rows) for rows in (whole, whole.float()))
    answers = []
    for codebook in (half, full):
        x = normal(TOKENS, 8, seed=2).to(kind).requires_grad_()
        mixed = codebook.mix(x, 0.5, 0.1)
        _everything(mixed).backward()
        ids, score = codebook.nearest(x)
        values = (ids, score, mixed.ids_N, mixed.mean_ND, mixed.lse_N, mixed.entropy_N, mixed.columns_k, x.grad)
        answers.append([value.detach() for value in values])
    for got, expected in zip(*answers, strict=True):
        assert torch.equal(got, expected)
    assert half.rows.grad.dtype == kind
    assert torch.equal(half.rows.grad, full.rows.grad.to(kind))


def _sent(codes):
    """Bytes of a forward and of a backward pass, without and with entropies, for two sizes of the codebook."""
    out = []
    for num_codes in (50, 900):
        codebook = Codebook(num_codes, 6, mesh=Mesh(1, codes))
        for entropy_temperature in (None, 0.1):
            x = torch.randn(TOKENS, 6, requires_grad=True)
            with ops.count_bytes() as forward:
                mixed = codebook.mix(x, 1.0, entropy_temperature)
            total = mixed.mean_ND.sum() + mixed.code_ND.sum()
            if mixed.entropy_N is not None:
                total = total + mixed.entropy_N.sum() + mixed.columns_k.square().sum()
            with ops.count_bytes() as backward:
                total.backward()
            out.append((forward["codes"], backward["codes"]))
    return out


@pytest.mark.dist
@pytest.mark.parametrize("codes", [2, 4])
def test_bytes_are_those_of_the_docstring_and_do_not_know_K(ranks, codes):
    each = TOKENS * (codes - 1)
    plain = (each * (4 * 6 + 24 + 16 + 8 * 6), each * (8 * 6 + 4 + 4 * 6))
    entropies = (plain[0] + each * 16, plain[1] + each * (4 + 8))
    for result in ranks(codes, _sent, codes):
        assert result == [plain, entropies] * 2


def _no_tokens(codes):
    out = []
    for similarity in ("dot", "euclid", "cosine"):
        codebook = Codebook(3, 4, mesh=Mesh(1, codes), similarity=similarity)
        x = torch.zeros(0, 4, requires_grad=True)
        ids, score = codebook.nearest(x)
        _everything(codebook.mix(x, 1.0, 0.1)).backward()
        shapes = [tuple(part.shape) for part in (ids, score, codebook.lookup(ids), x.grad)]
        out.append((shapes, bool(codebook.rows.grad.any()), codebook.rows.grad.shape == codebook.rows.shape))
    return out


@pytest.mark.parametrize("codes", CODES)
def test_no_tokens(ranks, codes):
    for result in ranks(codes, _no_tokens, codes):
        assert result == [([(0,), (0,), (0, 4), (0, 4)], False, True)] * 3


def _drawn(seed):
    """A case at random: sizes that fill no block, a few codes or many, twins among them, logits up to 1e4."""
    draw = random.Random(seed)
    num_codes, dim = draw.choice([1, 2, 5, 63, 64, 65, 130, 700, 1500]), draw.choice([1, 3, 8, 17])
    rows = normal(num_codes, dim, seed=seed).float()
    twins = torch.randint(0, num_codes, (2, num_codes // 4), generator=torch.Generator().manual_seed(seed))
    rows[twins[0]] = rows[twins[1]]
    similarity = draw.choice(["dot", "euclid", "cosine"])
    size = draw.choice([0.01, 1.0, 30.0, 1e4]) / dim**0.5
    x = normal(TOKENS, dim, seed=seed + 1).float() * size
    return (
        x,
        rows,
        similarity,
        draw.choice([0.05, 1.0, 3.0]),
        draw.choice([0.01, 0.3, 1.0]),
        draw.choice([1, 2**15, 2**26]),
    )


def _random(codes, seed):
    mesh = Mesh(1, codes)
    x, rows, similarity, temperature, entropy_temperature, budget = _drawn(seed)
    codebook = put(Codebook(len(rows), rows.shape[1], mesh=mesh, similarity=similarity), rows)
    codebook.budget = budget
    x = mine(x, mesh).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "TOKEN_BLOCK", 7 if seed % 2 else 2048)
        mixed = codebook.mix(x, temperature, entropy_temperature)
    weight = mine(normal(TOKENS, rows.shape[1], seed=5).float(), mesh)
    loss = (mixed.mean_ND * weight).sum() + mixed.lse_N.sum() + mixed.entropy_N.sum() + mixed.columns_k.square().sum()
    loss.backward()
    values = (mixed.ids_N, mixed.mean_ND, mixed.lse_N, mixed.entropy_N, mixed.columns_k, x.grad, codebook.rows.grad)
    return [value.detach() for value in values]


def _dense(seed, dtype):
    x, rows, similarity, temperature, entropy_temperature, _ = _drawn(seed)
    x, rows = (part.to(dtype).requires_grad_() for part in (x, rows))
    mixed = dense.mix(x, rows, similarity, temperature, entropy_temperature)
    weight = normal(TOKENS, rows.shape[1], seed=5).to(dtype)
    loss = (mixed.mean_ND * weight).sum() + mixed.lse_N.sum() + mixed.entropy_N.sum() + mixed.columns_K.square().sum()
    loss.backward()
    values = (mixed.mean_ND, mixed.lse_N, mixed.entropy_N, mixed.columns_K, x.grad, rows.grad)
    return dense.logits(x, rows, similarity).detach().double(), [value.detach().double() for value in values]


def _terms(seed):
    """How large what a softmax multiplies is: of it the share 2^-24 may be left out (pairs.py), whatever remains."""
    x, rows, similarity, temperature, entropy_temperature, _ = _drawn(seed)
    c, n = float(rows.norm(dim=1).max()), float(x.norm(dim=1).max())
    key, query = (1.0, 1.0) if similarity == "cosine" else (c, n)
    logit = 4 * c / temperature + 30 / entropy_temperature + 2 * TOKENS * 30 / entropy_temperature
    inner = 1 / float(x.norm(dim=1).min()) if similarity == "cosine" else 1.0
    outer = 1 / float(rows.norm(dim=1).min()) if similarity == "cosine" else 1.0
    return c, 1.0, 30.0, 1.0, logit * key * inner, logit * query * outer


@pytest.mark.parametrize(("codes", "seed"), RANDOM)
def test_random_cases_are_as_near_to_float64_as_the_dense_form(ranks, codes, seed):
    parts = list(zip(*ranks(codes, _random, codes, seed), strict=True))
    ids, *got = [torch.cat(part) for part in parts]
    logits, truth = _dense(seed, torch.float64)
    _, naive = _dense(seed, torch.float32)
    for value, plain, exactly, term in zip(got, naive, truth, _terms(seed), strict=True):
        error = float((value.double() - exactly).abs().max())
        assert error <= 4 * float((plain - exactly).abs().max()) + 4e-6 * float(exactly.abs().max()) + 2.0**-22 * term
    # the best logit up to rounding, and of rows that are twins the first
    chosen = logits.gather(1, ids[:, None])[:, 0]
    assert float((logits.amax(1) - chosen).max()) <= 4e-6 * float(logits.abs().max())
    rows = _drawn(seed)[1]
    first = torch.tensor([int((rows == row).all(1).nonzero()[0]) for row in rows])
    assert torch.equal(first[ids], ids)
