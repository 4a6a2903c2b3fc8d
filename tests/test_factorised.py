"""Ids as digits: the distribution written out, in values, gradients and frequencies; one digit is the flat head."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from test_head_sampling import chi_square, likely
from whole import CODES, GRIDS, close, engine_gradient, mine, normal, put

from vqscale.codes import noise
from vqscale.codes.heads import HEADS, build, dense
from vqscale.codes.heads.config import HeadConfig, WithinConfig
from vqscale.codes.heads.factorised import Factorised
from vqscale.codes.heads.flat import Head
from vqscale.codes.rows import set_aside
from vqscale.config import load_class, parse
from vqscale.nets.transformer import rotary
from vqscale.parallel.mesh import Mesh

TOKENS, DIM = 24, 8
WITHIN = WithinConfig(num_layers=2, ffn_multiple=8, dropout=0.0, init_scale=0.3)
NARROW = WithinConfig(num_layers=1, width=4, ffn_multiple=8, dropout=0.0, init_scale=0.5)
# factors, ids per token, what binds the digits: fewer values than ranks, uneven ones, several ids, digits of several
SHAPES = [((3, 2), 1, None), ((3, 5), 1, WITHIN), ((2, 2, 2), 1, NARROW), ((4,), 3, WITHIN), ((2, 3), 2, WITHIN)]


def lively(factors, num_ids, within, mesh=None, **more):
    """A head with values as of a trained one, the same on any number of ranks."""
    options = {"factors": factors, "num_ids": num_ids, "within": within, "seed": 1, **more}
    head = Factorised(math.prod(factors), DIM, mesh, **options).double().eval()
    for place, digit in enumerate(head.heads):
        for name in ("outputs", "inputs") if digit.embedding == "rows" else ("outputs",):
            put(getattr(digit, name), normal(digit.num_codes, DIM, seed=10 * place + len(name)))
    return head


def whole_ids(num_codes, num_ids, count=TOKENS):
    shape = (count,) if num_ids == 1 else (count, num_ids)
    return torch.randint(num_codes, shape, generator=torch.Generator().manual_seed(num_codes))


def by_hand(ids, factors):
    """The digits of every id of every token, by dividing."""
    rows = []
    for token in ids.reshape(len(ids), -1).tolist():
        digits = []
        for number in token:
            own = []
            for size in reversed(factors):
                number, rest = divmod(number, size)
                own.insert(0, rest)
            digits += own
        rows.append(digits)
    return torch.tensor(rows)


def states(head, h_ND, digits, tables):
    """What predicts each digit, one position after the other from the beginning, in plain torch."""
    if head.within is None:
        return [h_ND] * len(tables)
    within, found = head.within, []
    turns = rotary(within.net.config, (len(tables) - 1,))
    x_NSD = torch.stack([h_ND, *(inputs[d] for (_, inputs), d in zip(tables, digits.unbind(1), strict=True))], 1)
    for length in range(1, len(tables) + 1):
        found.append(within.leave(within.net(within.enter(x_NSD[:, :length]), turns[:length]))[:, -1])
    return found


def definition(head, h_ND, ids, tables, label_smoothing=0.0, z_loss=0.0):
    """The loss of each token: the sum of torch's cross entropies of its digits."""
    digits, total = by_hand(ids, head.factors), 0.0
    for y_ND, (outputs, _), digit in zip(states(head, h_ND, digits, tables), tables, digits.unbind(1), strict=True):
        total = total + dense.loss(y_ND, outputs, digit, label_smoothing=label_smoothing, z_loss=z_loss)
    return total


OPTIONS = [{}, {"label_smoothing": 0.2, "z_loss": 0.1}]


def _losses(data, codes):
    mesh, out = Mesh(data, codes), {}
    for case, (factors, num_ids, within) in enumerate(SHAPES):
        for which, options in enumerate(OPTIONS):
            head = lively(factors, num_ids, within, mesh)
            h = mine(normal(TOKENS, DIM, seed=2), mesh).requires_grad_()
            ids = mine(whole_ids(head.num_codes, num_ids), mesh)
            found = head.losses(h, ids, right=True, **options)
            x = head.embed(ids)
            ((found.whole_N + (x * h).sum(1)) * mine(normal(TOKENS, seed=3), mesh)).mean().backward()
            grads = {name: p.grad for name, p in head.named_parameters()}
            out[case, which] = (found.whole_N.detach(), found.cross_entropy_N, found.right_N, x.detach(), h.grad, grads)
    return out


@pytest.mark.parametrize("grid", GRIDS)
def test_values_and_gradients_are_those_of_the_definition(ranks, grid):
    results = ranks(grid[0] * grid[1], _losses, *grid)
    for case, (factors, num_ids, within) in enumerate(SHAPES):
        for which, options in enumerate(OPTIONS):
            head, h = lively(factors, num_ids, within), normal(TOKENS, DIM, seed=2).requires_grad_()
            tables = [(digit.outputs.rows, digit.inputs.rows) for digit in head.heads]
            ids = whole_ids(head.num_codes, num_ids)
            digits = by_hand(ids, factors)
            x = sum(inputs[digit] for (_, inputs), digit in zip(tables, digits.unbind(1), strict=True))
            expected = definition(head, h, ids, tables, **options)
            ((expected + (x * h).sum(1)) * normal(TOKENS, seed=3)).mean().backward()
            got = [result[case, which] for result in results]
            close(torch.cat([part[0] for part in got]), expected.detach())
            close(torch.cat([part[1] for part in got]), definition(head, h, ids, tables).detach())
            close(torch.cat([part[3] for part in got]), x.detach())
            close(torch.cat([part[4] for part in got]) / len(got), h.grad)
            each = zip(states(head, h, digits, tables), tables, digits.unbind(1), strict=True)
            right = torch.stack([(y @ out.t()).argmax(1) == digit for y, (out, _), digit in each]).all(0)
            assert torch.equal(torch.cat([part[2] for part in got]), right)
            for name, parameter in head.named_parameters():
                parts = [part[5][name] for part in got]
                if name.startswith("digits."):
                    close(engine_gradient(parts, grid[1]), parameter.grad)
                else:
                    close(sum(parts) / len(parts), parameter.grad)


def _one_digit(codes):
    mesh, out = Mesh(1, codes), []
    for kind in ("flat", "factorised"):
        for embedding in ("rows", "tied"):
            head = build(parse(HeadConfig, {"name": kind, "embedding": embedding}), 13, DIM, mesh, seed=4)
            tables = set_aside(torch.nn.ModuleList([head]))
            first = [table.rows.detach().clone() for table in tables.values()]
            for place, table in enumerate(tables.values()):
                put(table, normal(13, DIM, seed=place).float())
            h, ids = mine(normal(TOKENS, DIM, seed=2).float(), mesh), mine(whole_ids(13, 1), mesh)
            h.requires_grad_()
            found = head.losses(h, ids, label_smoothing=0.1, z_loss=0.2, right=True)
            (found.whole_N.mean() + head.embed(ids).square().mean()).backward()
            rule = {"temperature": 0.8, "top_k": 7, "unguided_ND": -h, "guidance": 1.7}
            drawn = head.sample(h, mine(noise.keys(3, torch.arange(TOKENS)), mesh), **rule)
            grads = [table.rows.grad for table in tables.values()]
            out.append([*first, *(x.detach() for x in found), h.grad, *grads, drawn])
    return out


@pytest.mark.parametrize("codes", CODES[:2])
def test_one_digit_is_the_flat_head_to_the_bit(ranks, codes):
    for result in ranks(codes, _one_digit, codes):
        for flat, one in zip(result[:2], result[2:], strict=True):
            assert len(flat) == len(one)
            for expected, got in zip(flat, one, strict=True):
                assert torch.equal(got, expected)


RULES = [
    {},
    {"temperature": 0.7, "top_k": 2},
    {"top_p": 0.7},
    {"temperature": 1.4, "guidance": 1.8},
    {"temperature": 0.0},
]
DRAWS = 6000


def distribution(head, h_D, null_D, rule):
    """The probability of every id (or combination of ids) by enumeration: a product over digits."""
    tables = [(digit.outputs.rows, digit.inputs.rows) for digit in head.heads]
    sizes = head.factors * head.num_ids
    every = torch.tensor(list(itertools.product(*map(range, sizes))))
    total = torch.ones(len(every), dtype=torch.float64)
    guided = states(head, null_D.expand(len(every), -1), every, tables)
    for place, y in enumerate(states(head, h_D.expand(len(every), -1), every, tables)):
        away = {"unguided_ND": guided[place]} if "guidance" in rule else {}
        p = dense.distribution(y, tables[place][0], **rule, **away)
        total *= p.gather(1, every[:, place, None])[:, 0]
    return every, total


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("factors", "num_ids", "within"), [((3, 2), 1, None), ((2, 3), 1, WITHIN), ((2,), 3, NARROW)])
@torch.no_grad()
def test_frequencies_are_the_product_of_the_digits(factors, num_ids, within, rule):
    head, (h_D, null_D) = lively(factors, num_ids, within), normal(2, DIM, seed=5)
    away = {"unguided_ND": null_D.expand(DRAWS, -1)} if "guidance" in rule else {}
    drawn = head.sample(h_D.expand(DRAWS, -1), noise.keys(3, torch.arange(DRAWS)), **rule, **away)
    assert drawn.dtype == torch.int64
    assert drawn.shape == ((DRAWS,) if num_ids == 1 else (DRAWS, num_ids))
    every, p = distribution(head, h_D, null_D, rule)
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-9)
    digits = by_hand(drawn, factors)
    place = (digits[:, None] == every[None]).all(2).float().argmax(1)
    if rule == {"temperature": 0.0}:
        assert (place == p.argmax()).all()
    else:
        assert likely(*chi_square(place, p))
        assert int((p > 0).sum()) > 1
    whole = {key: value for key, value in rule.items() if key == "guidance" or (key == "temperature" and value)}
    scored = head.sample_scored(h_D.expand(DRAWS, -1), noise.keys(3, torch.arange(DRAWS)), **rule, **away)
    assert torch.equal(scored.ids_N, drawn)
    close(scored.log_p_N, distribution(head, h_D, null_D, whole)[1].log()[place])
    if rule == {}:  # and the losses are those of this distribution
        ids = head.join(every)
        close((-head.losses(h_D.expand(len(every), -1), ids).whole_N).exp(), p)


def _draws(codes):
    mesh = Mesh(1, codes)
    head = lively((3, 5), 2, WITHIN, mesh)
    h, null = (mine(normal(TOKENS, DIM, seed=seed), mesh) for seed in (2, 3))
    keys = mine(noise.keys(3, torch.arange(TOKENS)), mesh)
    return [head.sample(h, keys, **rule, **({"unguided_ND": null} if "guidance" in rule else {})) for rule in RULES]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("codes", [2, 4])
def test_draws_do_not_know_the_ranks(ranks, codes):
    results = ranks(codes, _draws, codes)
    for place, expected in enumerate(_draws(1)):
        assert torch.equal(torch.cat([result[place] for result in results]), expected)


@torch.no_grad()
def test_guidance_of_one_is_none_and_of_zero_is_the_null_condition():
    head, (h, null) = lively((3, 5), 1, WITHIN), normal(2, TOKENS, DIM, seed=2)
    keys = noise.keys(3, torch.arange(TOKENS))
    plain = head.sample(h, keys)
    assert torch.equal(head.sample(h, keys, unguided_ND=null), plain)
    assert torch.equal(head.sample(h, keys, unguided_ND=null, guidance=0.0), head.sample(null, keys))
    scales = (torch.arange(TOKENS) % 2).double()
    mixed = head.sample(h, keys, unguided_ND=null, guidance=scales)
    assert torch.equal(mixed, torch.where(scales == 1, plain, head.sample(null, keys)))


def test_a_digit_knows_the_digits_before_it_and_none_after():
    head, h = lively((2, 3, 2), 1, WITHIN), normal(1, DIM, seed=2).expand(12, -1)
    every = torch.arange(12)
    digits = by_hand(every, (2, 3, 2))
    for place, y_ND in enumerate(head._states(h, digits)):
        for one, other in itertools.combinations(range(12), 2):
            same = bool((digits[one, :place] == digits[other, :place]).all())
            assert torch.allclose(y_ND[one], y_ND[other], atol=1e-12) == same


def test_a_new_head_has_the_loss_log_K_and_the_vectors_of_nobody_are_zero():
    head = Factorised(60, DIM, factors=(3, 4, 5), within=WITHIN)
    loss = head.losses(normal(TOKENS, DIM, seed=2).float(), whole_ids(60, 1)).whole_N
    close(loss.detach(), torch.full((TOKENS,), math.log(60)), 1e-6)
    ids = torch.tensor([[3, -1], [59, 0]])
    assert head.embed(ids).shape == (2, 2, DIM)
    assert not head.embed(ids)[0, 1].any()
    several = Factorised(4, DIM, num_ids=2, within=WITHIN)
    assert several.embed(torch.tensor([[[3, 1], [-1, -1]]])).shape == (1, 2, DIM)
    ignored = head.losses(torch.zeros(2, DIM), torch.tensor([5, -1]), right=True)
    assert ignored.whole_N[1] == 0
    assert not ignored.right_N[1]


def test_digits_and_ids_are_one_to_one_beyond_what_floats_hold():
    head = Factorised(2**18, 2, factors=(2**6, 2**12))
    ids = torch.tensor([0, 4095, 4096, 2**18 - 1, 123456])
    assert head.split(ids).tolist() == [[0, 0], [0, 4095], [1, 0], [63, 4095], [30, 576]]
    assert torch.equal(head.join(head.split(ids)), ids)
    assert head.split(torch.tensor([-1])).tolist() == [[-1, -1]]


def _refused(codes):
    """What is said where the last rank alone has a wrong id."""
    mesh, said = Mesh(1, codes), []
    head, h = Factorised(6, DIM, mesh, factors=(2, 3)), torch.zeros(2, DIM)
    for call, wrong in ((lambda ids: head.losses(h, ids, ignore=-7), 6), (head.embed, 6), (head.embed, -2)):
        with pytest.raises(ValueError) as error:
            call(torch.full((2,), wrong if mesh.codes.rank == codes - 1 else 0))
        said.append(str(error.value))
    return said


@pytest.mark.parametrize("codes", CODES[:2])
def test_ids_outside_are_refused_on_all_ranks_by_the_whole_id(ranks, codes):
    for targets, high, low in ranks(codes, _refused, codes):
        assert "targets must be in 0 .. 5, for there are 6 codes" in targets
        assert "ids to embed must be in -1 .. 5" in high
        assert "they go from -2 to" in low


def test_its_tables_are_set_aside_and_the_transformer_stays():
    model = torch.nn.Module()
    with torch.device("meta"):
        model.head = Factorised(2**18, 16, factors=(2**6, 2**12), within=WithinConfig(width=8, ffn_multiple=8))
    tables = set_aside(model)
    assert {name: (table.num_codes, table.dim) for name, table in tables.items()} == {
        f"head.digits.{place}.{part}": (size, 16)
        for place, size in enumerate((64, 4096))
        for part in ("outputs", "inputs")
    }
    left = {name for name, _ in model.named_parameters()}
    assert {"head.within.enter.weight", "head.within.leave.weight", "head.within.net.norm.weight"} <= left
    assert not any("digits" in name for name in left)


def test_first_values_follow_from_the_seed_alone():
    torch.manual_seed(0)
    one = Factorised(6, DIM, factors=(2, 3), within=WITHIN, seed=5)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)  # torch's own generator is as it was
    again, other = (Factorised(6, DIM, factors=(2, 3), within=WITHIN, seed=seed) for seed in (5, 6))
    for (name, x), y, z in zip(one.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(x, y), name
        assert torch.equal(x, z) == (x.unique().numel() == 1), name
    assert not torch.equal(one.heads[0].inputs.rows, one.heads[1].inputs.rows[:2])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"factors": []}, r"factors is \[\]: give at least one factor"),
        ({"factors": [4, 0]}, r"factors is \[4, 0\]"),
        ({"within": {"width": 3}}, r"width is 3: use an even number"),
        ({"within": {"num_layers": 0}}, r"num_layers is 0"),
        ({"within": {"dropout": 1.0}}, r"dropout is 1.0, but a share"),
        ({"embedding": "codebook"}, r"embedding"),
        ({"init_scale": -1.0}, r"init_scale is -1.0"),
    ],
)
def test_settings_that_are_none(keys, said):
    with pytest.raises(ValueError, match=said):
        parse(HeadConfig, {"name": "factorised", **keys})
    with pytest.raises(ValueError, match=r"factors \[4, 5\] multiply to 20, .* num_codes is 21"):
        Factorised(21, DIM, factors=(4, 5))


def test_a_width_of_any_size_has_heads_of_about_64_numbers():
    found = {width: WithinConfig().net(width).num_heads for width in (16, 64, 96, 768, 1000, 1024, 1280, 1536)}
    assert found == {16: 1, 64: 1, 96: 1, 768: 12, 1000: 10, 1024: 16, 1280: 20, 1536: 24}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_every_head_that_takes_several_ids_says_so(name):
    config = parse(HeadConfig, {"name": name})
    assert type(config) is load_class(HEADS[name])
    assert bool(list(config.misfits(16, 2))) == (not config.several_ids)
    assert not list(config.misfits(16, 1))
    num_ids = 2 if config.several_ids else 1
    assert build(config, 16, DIM, Mesh(), seed=1, num_ids=num_ids).num_ids == num_ids


def test_right_is_what_the_highest_logit_says_ties_to_the_lowest_id():
    head = Head(5, 1)
    put(head.outputs, torch.tensor([[1.0], [2.0], [0.0], [2.0], [1.0]]))
    found = head.losses(torch.tensor([[1.0]]).expand(5, 1), torch.arange(5), right=True)
    assert found.right_N.tolist() == [False, True, False, False, False]
    assert Head(5, 1).losses(torch.ones(5, 1), torch.arange(5), right=True).right_N.tolist() == [True] + [False] * 4
    assert head.losses(torch.ones(1, 1), torch.tensor([1])).right_N is None


def _right(codes):
    mesh, out = Mesh(1, codes), []
    for num_codes in (3, 517):
        head = Head(num_codes, DIM, mesh)
        put(head.outputs, normal(num_codes, DIM, seed=1))
        head.outputs.budget = 1
        h = mine(normal(TOKENS, DIM, seed=2), mesh)
        best = mine((normal(TOKENS, DIM, seed=2) @ normal(num_codes, DIM, seed=1).t()).argmax(1), mesh)
        off = (best + torch.arange(len(best)) % 2) % num_codes
        out.append((head.losses(h, off, right=True).right_N, best == off))
        ignored = head.losses(h, best, ignore=int(best[0]), right=True).right_N
        out.append((ignored, best != best[0]))
    return out


@pytest.mark.parametrize("codes", CODES)
def test_right_is_that_of_all_rows_on_any_number_of_ranks(ranks, codes):
    for result in ranks(codes, _right, codes):
        for got, expected in result:
            assert torch.equal(got, expected)


def test_half_precision_of_the_trunk_is_taken():
    head = Factorised(6, DIM, factors=(2, 3), within=WITHIN).eval()
    h = normal(TOKENS, DIM, seed=2).float()
    with torch.autocast("cpu", torch.bfloat16):
        low = head.losses(h.bfloat16(), whole_ids(6, 1)).whole_N
        assert head.sample(h.bfloat16(), torch.arange(TOKENS)).max() < 6
    assert low.dtype == torch.float32
    assert F.mse_loss(low, head.losses(h, whole_ids(6, 1)).whole_N) < 1e-3
