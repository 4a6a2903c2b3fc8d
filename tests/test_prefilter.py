"""Search by a prefilter: bounds hold for every pair, the ids are those of float64 arithmetic, ties go to the lowest."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from similarities import NAMES, added
from whole import CODES, integers, mine, normal, put

from vqscale.codes import dense, scan
from vqscale.codes.codebook import Codebook
from vqscale.codes.search import bounds, prefilter
from vqscale.codes.search.bounds import Form
from vqscale.codes.similarity import SIMILARITIES
from vqscale.parallel.mesh import Mesh

BUDGET = 2**20  # many parts and many chunks


@pytest.fixture(autouse=True)
def _two_more():
    with added():
        yield


def form_of(rows, name="dot", bias_k=None):
    return Form(rows, SIMILARITIES[name], bias_k)


def expected(x, form):
    """(ids, scores) in float64, by the definition."""
    if form.bias_k is None:
        (name,) = (name for name, similarity in SIMILARITIES.items() if similarity is form.similarity)
        return dense.nearest(x.double(), form.rows_kD.double(), name)
    score = x.double() @ form.rows_kD.double().t() + form.bias_k.double()
    return score.argmax(1), score.amax(1)


def check(x, form, budget=BUDGET):
    score, ids = prefilter.best(x, form, budget)
    right, best = expected(x, form)
    assert torch.equal(ids, right)
    assert score.dtype == torch.float64
    # norms are about those of the largest numbers: what float64 loses
    torch.testing.assert_close(score, best, rtol=1e-10, atol=1e-10 * float(best.abs().max()) + 1e-300)


def f32(*shape, seed, scale=1.0):
    return (normal(*shape, seed=seed) * scale).float()


def near(num, dim, step=2.0**-22):
    """Rows that differ by about `step`."""
    return f32(1, dim, seed=1) + step * f32(num, dim, seed=2)


def aligned(*shape, seed):
    """Numbers that bfloat16 rounds all the same way, nearly as far as it can: the worst case of Cauchy and Schwarz."""
    power = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed))
    return torch.ldexp(torch.full(shape, 1 + 2.0**-8 * 0.998), power)


def families():
    """(name, x, rows) on which bounds are asked to hold."""
    for dim in (1, 2, 7, 64, 300):
        x, rows = f32(9, dim, seed=dim), f32(40, dim, seed=dim + 1)
        yield f"normal {dim}", x, rows
        yield f"all residuals aligned {dim}", aligned(9, dim, seed=1), aligned(40, dim, seed=2)
        yield f"residuals against each other {dim}", aligned(9, dim, seed=1), -aligned(40, dim, seed=2)
        yield f"already bfloat16 {dim}", x.bfloat16().float(), rows.bfloat16().float()
        yield f"far from the origin {dim}", x + 300, rows * 0.01 + 300
        yield f"norms over many orders {dim}", x, rows * torch.logspace(-12, 12, 40)[:, None]
        yield f"tokens over many orders {dim}", x * torch.logspace(-12, 12, 9)[:, None], rows
        yield f"tiny {dim}", x * 1e-20, rows * 1e-20
        yield f"denormal {dim}", x * 1e-39, rows
        yield f"zeros {dim}", torch.cat([x[:5], torch.zeros(4, dim)]), torch.cat([rows[:20], torch.zeros(20, dim)])
        yield f"large {dim}", x * 1e3, rows * 1e3


FAMILIES = list(families())


def u_of_all(form, x, score):
    """(u by the product, u by lines, what `least` makes of every pair's exact score)."""
    keys = bounds.make_keys(form, 0, len(form.rows_kD))
    queries = bounds.make_queries(x, keys, score)
    assert queries.fits_T.all()
    product = (keys.wide_rE @ queries.wide_TE.t()).t()[:, : len(form.rows_kD)]
    line, token = torch.meshgrid(torch.arange(keys.lines), torch.arange(len(x)), indexing="ij")
    lines = bounds.in_lines(keys, queries, line.flatten(), token.flatten())
    lines = lines.view(keys.lines, len(x), bounds.LINE).transpose(1, 2).flatten(0, 1).t()[:, : len(form.rows_kD)]
    top = torch.empty(keys.lines, len(x), dtype=torch.bfloat16)
    bounds.top_of_lines(keys, queries, top)
    exact = torch.stack([form.exact(x, torch.full((len(x),), j)) for j in range(len(form.rows_kD))], 1)
    least = torch.stack([queries.least(exact[:, j].contiguous()) for j in range(len(form.rows_kD))], 1)
    return keys, queries, product, lines, top, exact, least


@pytest.mark.slow
@pytest.mark.parametrize("similarity", [*NAMES, "bias"])
@pytest.mark.parametrize(("name", "x", "rows"), FAMILIES, ids=[name for name, _, _ in FAMILIES])
def test_no_row_has_a_bound_below_its_score(name, x, rows, similarity):
    bias = f32(len(rows), seed=5, scale=float(rows.abs().max())) if similarity == "bias" else None
    form = form_of(rows, bias_k=bias) if similarity == "bias" else form_of(rows, similarity)
    nothing = torch.full((len(x),), -torch.inf, dtype=torch.float64)
    *_, exact, _ = u_of_all(form, x, nothing)
    middle, top = exact.median(1).values, exact.amax(1)
    for beat in (nothing, middle, top):
        _, queries, product, lines, top_LT, _, least = u_of_all(form, x, beat)
        assert (product >= least).all()
        assert (lines >= least).all()
        # the maximum of a line, not below any of its rows that may beat the score
        of_line = top_LT.t().repeat_interleave(bounds.LINE, 1)[:, : len(rows)]
        can_win = exact >= beat[:, None]
        assert (of_line >= least)[can_win].all()
        if beat.isfinite().all() and bool((beat != 0).all()) and "tiny" not in name and "denormal" not in name:
            assert (queries.least(beat) > 0).all()  # or lines without a positive bound could hold the best


def test_without_the_measured_residuals_the_bounds_would_be_wrong(monkeypatch):
    """The aligned family is adversarial: what the columns of norms add is needed."""
    monkeypatch.setattr(bounds, "UP", 0.0)
    form = form_of(aligned(40, 64, seed=2))
    x = aligned(9, 64, seed=1)
    _, _, product, lines, _, _, least = u_of_all(form, x, expected(x, form)[1])
    assert not (product >= least).all()
    assert not (lines >= least).all()


def test_bounds_are_narrow():
    """At most a hundredth of |x| |c| above the score, so that few rows are left: wide bounds would hide mistakes."""
    x, rows = f32(50, 256, seed=1), f32(500, 256, seed=2)
    form = form_of(rows)
    exact = x.double() @ rows.double().t()
    keys = bounds.make_keys(form, 0, 500)
    queries = bounds.make_queries(x, keys, exact.amax(1))
    u = (keys.wide_rE.double() @ queries.wide_TE.double().t()).t()[:, :500]
    above = u - queries.shift_T[:, None] - (exact - queries.base_T[:, None])
    assert (above / (x.norm(dim=1)[:, None] * rows.norm(dim=1))).max() < 0.01
    assert above.min() > 0


@pytest.mark.parametrize("similarity", NAMES)
@pytest.mark.parametrize(
    ("tokens", "codes", "dim"), [(1, 1, 1), (5, 3, 2), (33, 63, 7), (40, 700, 64), (300, 5000, 33)]
)
def test_ids_are_those_of_float64(similarity, tokens, codes, dim):
    form = form_of(f32(codes, dim, seed=codes), similarity)
    check(f32(tokens, dim, seed=tokens), form)
    check(f32(tokens, dim, seed=tokens), form, budget=1)


def test_with_keys_of_ones_own():
    bias = f32(3000, seed=3, scale=5.0)
    check(f32(100, 48, seed=1), form_of(f32(3000, 48, seed=2), bias_k=bias))
    check(f32(100, 48, seed=1), form_of(f32(3000, 48, seed=2), bias_k=bias + 1e4))
    check(f32(100, 48, seed=1) * 1e-3, form_of(f32(3000, 48, seed=2), bias_k=bias))


@pytest.mark.parametrize("similarity", NAMES)
def test_ties_go_to_the_lowest(similarity):
    rows = integers(900, 4, seed=5)
    check(
        integers(200, 4, seed=6).float(),
        form_of(rows.float(), similarity if similarity in ("dot", "euclid") else "dot"),
    )
    some = f32(50, 40, seed=7)
    many = some[torch.randint(50, (6000,), generator=torch.Generator().manual_seed(1))]
    score, ids = prefilter.best(f32(70, 40, seed=8), form_of(many, similarity), BUDGET)
    right = expected(f32(70, 40, seed=8), form_of(some, similarity))[0]
    first = torch.stack([(many == some[j]).all(1).nonzero()[0, 0] for j in range(50)])
    assert torch.equal(ids, first[right])
    assert torch.isfinite(score).all()


@pytest.mark.parametrize("similarity", NAMES)
@pytest.mark.parametrize("distinct", [1, 10])
def test_rows_that_are_there_thousands_of_times(similarity, distinct, monkeypatch):
    """Too many rows are left: all is scored in float64, where the order of a sum must not decide between equal rows."""
    plain = []
    whole = Form.between
    monkeypatch.setattr(Form, "between", lambda form, x, rows: plain.append(len(x)) or whole(form, x, rows))
    some, x = f32(distinct, 40, seed=7), f32(70, 40, seed=8)
    x[5] = 0
    found = prefilter.best(x, form_of(some.repeat(8192 // distinct, 1), similarity), 2**25)
    assert max(plain) >= 60
    score, ids = found
    assert torch.equal(ids, expected(x, form_of(some, similarity))[0])
    right = expected(x, form_of(some, similarity))[1]
    torch.testing.assert_close(score, right, rtol=1e-10, atol=1e-12)


def test_limits_of_float64_products():
    x, rows = f32(30, 50, seed=1).double(), f32(2000, 50, seed=2)
    bias = f32(2000, seed=3)
    for form in (*(form_of(rows, name) for name in NAMES), form_of(rows, bias_k=bias)):
        low, high = form.between(x, slice(100, 1100))
        exact = form.exact(x.repeat_interleave(1000, 0), torch.arange(100, 1100).repeat(30)).view(30, 1000)
        assert (low <= exact).all()
        assert (exact <= high).all()
        assert (high - low).max() < 1e-11


@pytest.mark.parametrize("step", [2.0**-9, 2.0**-16, 2.0**-22])
@pytest.mark.parametrize("similarity", NAMES)
def test_near_ties_are_decided_as_float64_does(similarity, step):
    """Rows that differ by less than bfloat16, and scores by less than float32, can tell apart."""
    rows = near(4000, 96, step)
    x = f32(64, 96, seed=3) + f32(1, 96, seed=1)
    check(x, form_of(rows, similarity))
    single = dense.nearest(x, rows, similarity)[0]
    if step < 2.0**-20:
        assert (single != expected(x, form_of(rows, similarity))[0]).any()  # float32 does not decide


@pytest.mark.parametrize("similarity", NAMES)
@pytest.mark.parametrize(
    ("tokens", "codes"), [(1e4, 1.0), (1e2, 1e2), (1e-20, 1.0), (1.0, 1e-20), (1e-30, 1e-10), (1e25, 1e25)]
)
def test_extreme_magnitudes(similarity, tokens, codes):
    x, rows = f32(20, 32, seed=1) * tokens, f32(1500, 32, seed=2) * codes
    x[3] *= 1e-6
    rows[77] *= 1e6
    check(x, form_of(rows, similarity))


def test_tokens_and_rows_that_are_not_finite():
    x, rows = f32(30, 32, seed=1), f32(2000, 32, seed=2)
    right = expected(x, form_of(rows))[0]
    x[4, 3], x[9, 0], x[11, 5] = torch.nan, torch.inf, -torch.inf
    score, ids = prefilter.best(x, form_of(rows), BUDGET)
    broken = ~x.isfinite().all(1)
    assert torch.equal(ids[~broken], right[~broken])
    assert ids[broken].tolist() == [0, 0, 0]
    assert (score[broken] == -torch.inf).all()
    for bad in (torch.nan, torch.inf):
        rows[int(right[0])] = bad
        score, ids = prefilter.best(x, form_of(rows), BUDGET)
        rest = rows.clone()
        rest[int(right[0])] = 0
        assert torch.equal(ids[~broken], expected(x[~broken], form_of(rest))[0])
        assert score[~broken].isnan().all()


def test_nothing_to_search():
    for tokens, codes in ((0, 500), (3, 0), (0, 0)):
        score, ids = prefilter.best(torch.ones(tokens, 40), form_of(torch.ones(codes, 40)), BUDGET)
        assert ids.tolist() == [0] * tokens
        assert score.tolist() == [-torch.inf] * tokens


def test_sorted_rows_and_long_ones_cost_nothing_but_time():
    x = f32(300, 64, seed=1)
    rows = f32(5000, 64, seed=2)
    check(x, form_of(rows[(rows @ x[0]).argsort()].contiguous()))
    rows[::1000] *= 100
    check(x, form_of(rows, "euclid"))


def test_parts_cover_all_rows_and_follow_the_budget():
    for budget in (1, 2**20, 2**26):
        covered = list(prefilter.parts(70000, 256, 2048, budget))
        assert covered[0][0] == 0
        assert covered[-1][1] == 70000
        assert all(a[1] == b[0] for a, b in pairwise(covered))
        for start, stop in covered:
            need = (stop - start) * (2 * (256 + bounds.EXTRA) + 2 * 2048 / bounds.LINE)
            assert need <= budget / 2 or stop - start <= bounds.LINE * bounds.GROUP


@contextmanager
def everybody_served():
    """As if every size and every processor were one on which the prefilter is faster."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("LEAST_TOKENS", "LEAST_ROWS", "LEAST_PAIRS"):
            patch.setattr(prefilter, name, 0)
        patch.setattr(prefilter, "DIMS", (1, 4096))
        patch.setattr(prefilter.products, "fast_on_cpu", lambda: True)
        yield


@added()
def _search(codes):
    """All similarities, more ranks than codes, near-ties across ranks, given keys, a token that is not a number."""
    mesh, out = Mesh(1, codes), {}
    with everybody_served():
        for similarity in NAMES:
            for num_codes in (1, 3, 700):
                codebook = put(Codebook(num_codes, 24, mesh=mesh, similarity=similarity), f32(num_codes, 24, seed=4))
                out[similarity, num_codes] = codebook.nearest(mine(f32(16, 24, seed=5), mesh))
            codebook = put(Codebook(400, 24, mesh=mesh, similarity=similarity), near(400, 24))
            out[similarity, "near"] = codebook.nearest(mine(f32(16, 24, seed=6), mesh))
        codebook = put(Codebook(700, 24, mesh=mesh), f32(700, 24, seed=4))
        x = f32(16, 24, seed=5)
        bias = f32(700, seed=9)[codebook.layout.start : codebook.layout.stop]
        out["keys"] = codebook.nearest(mine(x, mesh), scan.Keys(2 * codebook.rows.detach(), bias))
        x[2] = torch.nan
        out["nan"] = codebook.nearest(mine(x, mesh))
    return out


@pytest.mark.dist
@pytest.mark.parametrize("codes", CODES)
def test_any_number_of_ranks_finds_the_same(ranks, codes):
    results = ranks(codes, _search, codes)

    def all_of(key, which):
        return torch.cat([result[key][which] for result in results])

    x = f32(16, 24, seed=5)
    for similarity in NAMES:
        for num_codes in (1, 3, 700):
            ids, score = expected(x, form_of(f32(num_codes, 24, seed=4), similarity))
            assert torch.equal(all_of((similarity, num_codes), 0), ids)
            got = all_of((similarity, num_codes), 1)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), score, rtol=1e-6, atol=1e-9)
        form = form_of(near(400, 24), similarity)
        assert torch.equal(all_of((similarity, "near"), 0), expected(f32(16, 24, seed=6), form)[0])
    form = form_of(2 * f32(700, 24, seed=4), bias_k=f32(700, seed=9))
    assert torch.equal(all_of("keys", 0), expected(x, form)[0])
    ids, score = all_of("nan", 0), all_of("nan", 1)
    assert ids[2] == 0
    assert score.isnan().nonzero().flatten().tolist() == [2]
    rest = torch.arange(16) != 2
    assert torch.equal(ids[rest], expected(x, form_of(f32(700, 24, seed=4)))[0][rest])


def test_who_is_served(monkeypatch):
    monkeypatch.setattr(prefilter.products, "fast_on_cpu", lambda: True)
    x, rows = torch.empty(2048, 256), torch.empty(8192, 256)
    assert prefilter.serves(x, form_of(rows))
    assert not prefilter.serves(x[:200], form_of(rows.expand(100, -1, -1).flatten(0, 1)))
    assert not prefilter.serves(x[:1024], form_of(rows))
    assert not prefilter.serves(x, form_of(rows[:256]))
    assert not prefilter.serves(x[:, :4], form_of(rows[:, :4]))
    assert not prefilter.serves(x.double(), form_of(rows.double()))
    assert not prefilter.serves(x.to("meta"), form_of(rows.to("meta")))
    monkeypatch.setattr(prefilter.products, "fast_on_cpu", lambda: False)
    assert not prefilter.serves(x, form_of(rows))
