"""Head.sample: frequencies, the sets of top-k and top-p, guidance; samples that do not know the ranks or the batch."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from whole import CODES, integers, mine, normal, put

from vqscale.codes import noise
from vqscale.codes.heads import dense, draw, restrict
from vqscale.codes.heads.flat import Head
from vqscale.codes.rows import Rows
from vqscale.parallel.mesh import Axis, Mesh

DIM = 6
# every kind of draw: (temperature, top_k, top_p)
RULES = [(1.0, 0, 1.0), (0.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (0.9, 20, 0.6), (2.0, 400, 0.99)]


def head_of(rows, mesh=None, budget=2**26):
    head = Head(len(rows), rows.shape[1], mesh)
    put(head.outputs, rows)
    head.outputs.budget = budget
    return head


def chi_square(ids, p_K):
    """(statistic, degrees of freedom) of drawn ids against probabilities; rare ids together in one bin."""
    counts, expected = torch.bincount(ids, minlength=len(p_K)).double(), len(ids) * p_K.double()
    assert not counts[p_K == 0].any(), "an id without probability was drawn"
    often = expected >= 5
    counts = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    used = expected > 0
    return float(((counts - expected).square() / expected)[used].sum()), int(used.sum()) - 1


def likely(statistic, freedom):
    """Within 4.5 deviations of chi-square (Wilson and Hilferty); an honest sampler fails once in 300,000."""
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread) < 4.5


DRAWS = 10000


@pytest.mark.parametrize(("num_codes", "rule"), [*((40, rule) for rule in RULES), (600, RULES[0]), (600, RULES[-1])])
def test_frequencies_are_the_dense_distribution(num_codes, rule):
    temperature, top_k, top_p = rule
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    rows, h = normal(num_codes, DIM, seed=1).float() / 2, normal(1, DIM, seed=2).float()
    keys = noise.keys(11, torch.arange(DRAWS) // 64, torch.arange(DRAWS) % 64)
    ids = head_of(rows).sample(h.expand(DRAWS, -1), keys, **options)
    p_K = dense.distribution(h, rows, **options)[0]
    assert ids.dtype == torch.int64
    statistic, freedom = chi_square(ids, p_K)
    if temperature == 0:
        assert (ids == p_K.argmax()).all()
    else:
        assert likely(statistic, freedom), (statistic, freedom)
        assert freedom > 2


def test_the_test_of_frequencies_sees_a_wrong_temperature():
    rows, h = normal(40, DIM, seed=1).float() / 2, normal(1, DIM, seed=2).float()
    ids = head_of(rows).sample(h.expand(DRAWS, -1), noise.keys(11, torch.arange(DRAWS)), temperature=1.1)
    assert not likely(*chi_square(ids, dense.distribution(h, rows)[0]))


def _draws(codes, order):
    """Samples of a global batch in the given order, with every rule and guidance, from small and large blocks."""
    mesh, out = Mesh(1, codes), {}
    for num_codes, rules, budget in CASES:
        rows = normal(num_codes, DIM, seed=num_codes).float()
        h, null = normal(24, DIM, seed=2).float()[order], normal(24, DIM, seed=3).float()[order]
        keys, scale = noise.keys(5, torch.arange(24)[order], 7), torch.linspace(0, 3, 24)[order]
        guided = {"unguided_ND": mine(null, mesh), "guidance": mine(scale, mesh)}
        head = head_of(rows, mesh, budget)
        for rule in rules:
            options = dict(zip(("temperature", "top_k", "top_p"), rule, strict=True))
            for name, more in (("plain", {}), ("guided", guided))[: 2 if rule in GUIDED else 1]:
                ids = head.sample(mine(h, mesh), mine(keys, mesh), **options, **more)
                out[num_codes, budget, rule, name] = ids
    return out


# (K, rules, bytes for blocks): fewer codes than ranks; all tokens at once; blocks of 64 rows, or of a few tokens
CASES = [(3, RULES[:3], 2**26), (517, RULES, 2**26), (517, RULES[:2], 1), (517, RULES[4:5], 80_000)]
GUIDED = [RULES[0], RULES[2]]


@pytest.mark.parametrize("codes", CODES)
def test_samples_do_not_know_the_ranks_the_batch_or_the_blocks(ranks, codes):
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    results = ranks(codes, _draws, codes, order)
    alone = _draws(1, torch.arange(24))
    for (num_codes, _, rule, name), expected in alone.items():
        assert torch.equal(expected, alone[num_codes, 2**26, rule, name])
    for key, expected in alone.items():
        assert torch.equal(torch.cat([result[key] for result in results]), expected[order]), key
    assert len(set(alone[517, 2**26, RULES[0], "plain"].tolist())) > 8


def _kept(codes):
    """Which ids remain, for logits with very many ties, some of them across ranks."""
    mesh, out = Mesh(1, codes), {}
    layout = Rows(50, mesh.codes.size, mesh.codes.rank)
    for (top_k, top_p), candidates in product(SETS, (1024, 0)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(restrict, "CANDIDATES", candidates)
            logits = integers(30, 50, seed=1, most=2)[:, layout.start : layout.stop].clone()
            restrict.mask_(logits, restrict.keep(logits, top_k, top_p, 50, mesh.codes), mesh.codes)
            out[top_k, top_p, candidates] = logits
    return out


SETS = [(1, 1.0), (7, 1.0), (49, 1.0), (0, 0.003), (0, 0.537), (13, 0.617), (30, 0.99)]


@pytest.mark.parametrize("codes", CODES)
def test_the_sets_of_top_k_and_top_p_are_exact_and_ties_go_to_the_lowest_ids(ranks, codes):
    logits = integers(30, 50, seed=1, most=2)
    results = ranks(codes, _kept, codes)
    for top_k, top_p in SETS:
        # rows that give these logits for unit vectors: distribution() then sorts them
        p_NK = dense.distribution(torch.eye(30), logits.t(), top_k=top_k, top_p=top_p)
        for candidates in (1024, 0):
            kept = torch.cat([result[top_k, top_p, candidates] for result in results], 1)
            assert torch.equal(kept > -1e29, p_NK > 0), (top_k, top_p, candidates)
            assert torch.equal(kept[p_NK > 0], logits[p_NK > 0])
        if top_k and top_p == 1:
            assert ((p_NK > 0).sum(1) == top_k).all()


def test_a_definition_by_hand():
    """Four codes of 0.4, 0.3, 0.2, 0.1: which remain, and with which shares."""
    rows = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()[:, None].double()
    cases = [
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.39}, [0, 1, 0, 0]),
        ({"top_p": 0.41}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.95}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 3, "top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"temperature": 0.5, "top_p": 0.52}, [0, 1, 0, 0]),
    ]
    for options, expected in cases:
        got = dense.distribution(torch.ones(1, 1).double(), rows, **options)[0]
        torch.testing.assert_close(got, torch.tensor(expected).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bisection_finds_numbers_of_every_size_to_the_bit(dtype):
    tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    numbers = torch.tensor(
        [[-huge, -3.5, -tiny, -0.0, 0.0, tiny, 1.0, 1.0 + torch.finfo(dtype).eps, huge]], dtype=dtype
    )
    order = restrict._ordered(numbers)
    assert torch.equal(restrict._number(order, dtype), numbers)
    assert (order.diff() >= 0).all()
    assert (order.diff() > 0).sum() == 7
    for num in range(1, 10):
        value, above = restrict._threshold(numbers, None, torch.tensor([num]).double(), Axis("codes"))
        assert value == numbers[0, 9 - num]
        assert above == (numbers > value).sum()


def test_guidance_of_one_is_no_guidance_and_of_zero_is_the_null_class():
    rows, h, null = normal(50, DIM, seed=1).float(), normal(30, DIM, seed=2), normal(30, DIM, seed=3).float()
    head, keys = head_of(rows), noise.keys(1, torch.arange(30))
    h = h.float()
    plain = head.sample(h, keys)
    assert torch.equal(head.sample(h, keys, unguided_ND=null, guidance=1.0), plain)
    assert torch.equal(head.sample(h, keys, unguided_ND=null, guidance=0.0), head.sample(null, keys))
    scales = torch.arange(30) % 2
    mixed = head.sample(h, keys, unguided_ND=null, guidance=scales.float())
    assert torch.equal(mixed, torch.where(scales == 1, plain, head.sample(null, keys)))
    best = head.sample(h, keys, unguided_ND=null, guidance=3.0, temperature=0.0)
    assert torch.equal(best, dense.distribution(h, rows, unguided_ND=null, guidance=3.0).argmax(1))


def test_guided_frequencies_come_before_temperature_and_top_p():
    rows, h, null = (normal(n, DIM, seed=n).float() / 2 for n in (40, 1, 2))
    options = {"temperature": 1.5, "top_p": 0.9, "guidance": 2.5}
    keys = noise.keys(3, torch.arange(DRAWS))
    ids = head_of(rows).sample(h.expand(DRAWS, -1), keys, unguided_ND=null[:1].expand(DRAWS, -1), **options)
    assert likely(*chi_square(ids, dense.distribution(h, rows, unguided_ND=null[:1], **options)[0]))


def test_ties_of_the_highest_logit_go_to_the_lowest_id():
    head = head_of(torch.tensor([[0.0], [2.0], [1.0], [2.0]]))
    assert head.sample(torch.ones(3, 1), noise.keys(1, torch.arange(3)), temperature=0.0).tolist() == [1, 1, 1]
    drawn = head.sample(torch.ones(300, 1), noise.keys(1, torch.arange(300)), top_k=1)
    assert drawn.unique().tolist() == [1]
    # half precision in, autocast on: the draw is that of the same numbers in float32
    h = normal(20, 1, seed=1).bfloat16()
    keys = noise.keys(2, torch.arange(20))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head.sample(h, keys), head.sample(h.float(), keys))


def _refusals(codes):
    """What is said of numbers that are not finite, in a token or in the last row; and what is drawn without them."""
    mesh, said, drawn = Mesh(1, codes), {}, {}
    keys = mine(noise.keys(5, torch.arange(8)), mesh)
    for rule in RULES:
        options = dict(zip(("temperature", "top_k", "top_p"), rule, strict=True))
        for place, value in NOT_FINITE:
            rows, h = normal(23, DIM, seed=1).float(), normal(8, DIM, seed=2).float()
            drawn[rule] = head_of(rows, mesh).sample(mine(h, mesh), keys, **options)
            (h[3] if place == "token" else rows[-1])[0] = float(value)
            try:
                said[rule, place, value] = head_of(rows, mesh).sample(mine(h, mesh), keys, **options)
            except FloatingPointError as error:
                said[rule, place, value] = str(error)
    return said, drawn


# where, what, and the tokens whose logits it spoils: those of an infinite row are -inf for some, which is never drawn
NOT_FINITE = {
    ("token", "nan"): [3],
    ("token", "inf"): [3],
    ("row", "nan"): [*range(8)],
    ("row", "inf"): (normal(8, 6, seed=2)[:, 0] > 0).nonzero()[:, 0].tolist(),
}


@pytest.mark.slow
@pytest.mark.parametrize("codes", CODES[:2])
def test_logits_that_are_not_finite_are_refused_on_all_ranks(ranks, codes):
    results, (_, alone) = ranks(codes, _refusals, codes), _refusals(1)
    for rule in RULES:
        for case, tokens in NOT_FINITE.items():
            named = ", ".join(map(str, tokens[:5])) + (" ..." if len(tokens) > 5 else "")
            expected = f"of {len(tokens)} of the 8 tokens of the code group are not (token {named}): the weights"
            for said, _ in results:
                assert expected in str(said[rule, *case]), (rule, case)
        assert torch.equal(torch.cat([drawn[rule] for _, drawn in results]), alone[rule])


def splitmix(seed, number):
    """Output `number` of SplitMix64, in whole numbers of any size."""
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def test_the_bits_are_those_of_splitmix64():
    keys = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)])
    got = noise.bits(keys, 2**33, 2**33 + 3)
    assert [[x % 2**64 for x in line] for line in got.tolist()] == [
        [splitmix(key % 2**64, 2**33 + j) for j in range(3)] for key in keys.tolist()
    ]
    # the published first outputs for the seed 1234567
    assert splitmix(1234567, 0) == 6457827717110365317
    assert splitmix(1234567, 1) == 3203168211198807973


def test_keys_depend_on_every_part_and_on_their_order():
    grid = noise.keys(1, torch.arange(50)[:, None], torch.arange(50))
    assert grid.shape == (50, 50)
    assert grid.unique().numel() == 2500
    assert grid[3, 4] == noise.keys(1, 3, 4) == noise.keys(torch.tensor(1), 3, torch.tensor(4))
    others = [noise.keys(2, 3, 4), noise.keys(1, 3), noise.keys(1, 3, 4, 0), noise.keys(3, 1, 4), noise.keys(-1, 3, 4)]
    assert len({int(key) for key in (*others, grid[3, 4], noise.keys(2**63 - 1, 3, 4))}) == 7
    assert noise.keys(2**64 - 1) == noise.keys(-1)


def test_uniform_numbers_are_uniform_and_neighbours_do_not_know_each_other():
    u = noise.uniform(noise.keys(7, torch.arange(64)), 0, 4096)
    assert u.min() > 0
    assert u.max() < 1
    statistic, freedom = chi_square((u * 256).long().flatten(), torch.full((256,), 1 / 256))
    assert likely(statistic, freedom)
    centred = (u.double() - 0.5) * math.sqrt(12)
    pairs = {
        "ids": (centred[:, 1:], centred[:, :-1]),
        "keys": (centred[1:], centred[:-1]),
        "far ids": (centred[:, 1024:], centred[:, :-1024]),
        "squares": (centred[1:].square() - 1, centred[:-1].square() - 1),
    }
    for name, (a, b) in pairs.items():
        assert abs(float((a * b).mean())) < 4.5 / math.sqrt(a.numel()), name
    both = (u[:, ::2] * 16).long() * 16 + (u[:, 1::2] * 16).long()
    assert likely(*chi_square(both.flatten(), torch.full((256,), 1 / 256)))
    ones = torch.stack([(noise.bits(noise.keys(1, torch.arange(64)), 0, 1024) >> bit) & 1 for bit in range(64)])
    assert (ones.double().mean((1, 2)) - 0.5).abs().max() < 4.5 * 0.5 / 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gumbel_numbers_are_gumbel_in_the_tail_that_decides(dtype):
    g = noise.gumbel(noise.keys(7, torch.arange(64)), 0, 8192, dtype)
    assert g.dtype == dtype
    assert torch.isfinite(g).all()
    assert abs(g.mean() - 0.5772157) < 4.5 * math.pi / math.sqrt(6 * g.numel())
    for level in (0.0, 2.0, 6.0, 9.0):
        share = 1 - math.exp(-math.exp(-level))
        assert abs(int((g > level).sum()) - share * g.numel()) < 4.5 * math.sqrt(share * g.numel())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1e-45}, "temperature is 1e-45"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"guidance": 2.0}, "guidance is 2.0, .* give unguided_ND"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Head(13, DIM).sample(torch.zeros(1, DIM), torch.zeros(1).long(), **options)


@pytest.mark.gpu
def test_a_gpu_draws_what_a_cpu_draws():
    keys = noise.keys(1, torch.arange(64))
    assert torch.equal(noise.bits(keys.cuda(), 5, 5000).cpu(), noise.bits(keys, 5, 5000))
    rows, h = normal(517, DIM, seed=1), normal(64, DIM, seed=2)
    for temperature, top_k, top_p in RULES:
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        expected = head_of(rows).sample(h, keys, **options)
        assert torch.equal(head_of(rows).cuda().sample(h.cuda(), keys.cuda(), **options).cpu(), expected)


def _laid_out(codes):
    """(as they are, laid out) samples of few tokens, and of more than are few."""
    mesh, out = Mesh(1, codes), {}
    rows = normal(517, DIM, seed=1).float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "PACKED_ROWS", 64)
        patch.setattr(draw, "FEW_TOKENS", 24)
        for tokens, rule, scale in product((24, 28), RULES, (1.0, 2.5)):
            h, null = (normal(tokens, DIM, seed=seed).float() for seed in (2, 3))
            options = dict(zip(("temperature", "top_k", "top_p"), rule, strict=True))
            options |= {"unguided_ND": mine(null, mesh), "guidance": scale}
            head = head_of(rows, mesh)
            given = (mine(h, mesh), noise.keys(5, mine(torch.arange(tokens), mesh)))
            plain, scored = head.sample(*given, **options), head.sample_scored(*given, **options)
            with head.laid_out():
                assert head._packed
                found = head.sample(*given, **options)
                assert torch.allclose(head.sample_scored(*given, **options).log_p_N, scored.log_p_N, atol=1e-5)
            assert not head._packed
            out[tokens, rule, scale] = plain, found
    return out


@pytest.mark.parametrize("codes", CODES)
def test_rows_that_are_laid_out_give_the_same_ids(ranks, codes):
    for result in ranks(codes, _laid_out, codes):
        for key, (plain, found) in result.items():
            assert torch.equal(plain, found), key
