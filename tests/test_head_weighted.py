"""`Head.weighted`: a sum of losses whose gradients are made with the logits, against plain torch, on any ranks.

Tokens are done some at a time; small limits make many blocks of small cases.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from whole import GRIDS, close, engine_gradient, integers, mine, normal, put

from vqscale.codes.heads import dense, passes
from vqscale.codes.heads.factorised import Factorised
from vqscale.codes.heads.flat import Head
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.parallel.spawn import RankError
from vqscale.plan.count import KernelCounter

TOKENS, DIM = 24, 6
# (K, bytes for blocks): fewer codes than four ranks, K not divisible, many blocks of rows
SHAPES = [(1, 2**26), (3, 2**26), (13, 2**26), (517, 1)]
LOSSES = [
    {},
    {"label_smoothing": 0.1, "right": True},
    {"z_loss": 0.3},
    {"label_smoothing": 0.4, "z_loss": 1e-2, "ignore": 0},
    {"label_smoothing": 1.0},
]
AT_ONCE = 5  # tokens, where the budget holds no more


def head_of(num_codes, mesh, dtype=torch.float64, scale=1.0, **options):
    head = Head(num_codes, DIM, mesh, **options)
    put(head.outputs, scale * normal(num_codes, DIM, seed=num_codes).to(dtype))
    return head


def targets_of(num_codes, ignore=-1):
    targets = torch.randint(num_codes, (TOKENS,), generator=torch.Generator().manual_seed(num_codes))
    targets[[1, 2, 11, 20]] = ignore
    targets[[0, 5]] = num_codes - 1
    return targets


def weights():
    return normal(TOKENS, seed=3).abs() / TOKENS


def weighted(head, h, targets, weight, **options):
    """(the sum, the losses, gradients of h and of the rows), where a third of the sum is what is minimised."""
    total, found = head.weighted(h, targets, weight, **options)
    (total / 3).backward()
    return total.detach(), found, h.grad, head.rows.grad


def _weighted(data, codes):
    mesh, out = Mesh(data, codes), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "LEAST_TOKENS", AT_ONCE)
        for num_codes, budget in SHAPES:
            for case, options in enumerate(LOSSES):
                head = head_of(num_codes, mesh)
                head.outputs.budget = budget
                h = mine(normal(TOKENS, DIM, seed=2), mesh).requires_grad_()
                targets = mine(targets_of(num_codes, options.get("ignore", -1)), mesh)
                assert head.tokens_at_once(TOKENS // data) == (AT_ONCE if budget == 1 else TOKENS // data)
                total, found, dh, drows = weighted(head, h, targets, mine(weights(), mesh), **options)
                plain = head.losses(h, targets, **options)
                for got, expected in zip(found, plain, strict=True):
                    assert (got is None) == (expected is None)
                    if got is not None:
                        assert not got.requires_grad
                        torch.testing.assert_close(got, expected.detach(), rtol=1e-10, atol=1e-10)
                out[num_codes, case] = total, dh, drows
    return out


@pytest.mark.parametrize("grid", GRIDS)
def test_the_sum_and_its_gradients_are_those_of_cross_entropy(ranks, grid):
    results = ranks(grid[0] * grid[1], _weighted, *grid)
    for num_codes, _ in SHAPES:
        for case, options in enumerate(LOSSES):
            h = normal(TOKENS, DIM, seed=2).requires_grad_()
            rows = normal(num_codes, DIM, seed=num_codes).requires_grad_()
            terms = {key: value for key, value in options.items() if key != "right"}
            loss = dense.loss(h, rows, targets_of(num_codes, options.get("ignore", -1)), **terms)
            expected = (loss * weights()).sum()
            (expected / 3).backward()
            got = [result[num_codes, case] for result in results]
            close(sum(part[0] for part in got), expected.detach())
            close(torch.cat([part[1] for part in got]), h.grad)
            world = grid[0] * grid[1]
            close(world * engine_gradient([part[2] for part in got], grid[1]), rows.grad)


def test_a_step_has_three_products_and_four_where_the_exponentials_would_be_too_many():
    product = 2 * 700 * 1000 * DIM
    for budget, count in ((2**26, 3), (1, 4)):
        head = head_of(1000, Mesh(), torch.float32)
        head.outputs.budget = budget
        h, targets = normal(700, DIM, seed=2).float().requires_grad_(), torch.arange(700)
        weighted(head, h, targets, torch.full((700,), 1 / 700))  # before the first product a machine may be looked at
        with KernelCounter() as counter:
            weighted(head, h, targets, torch.full((700,), 1 / 700))
        assert counter.operations == count * product


def test_how_many_tokens_are_done_at_once():
    mib = 2**20
    found = passes.tokens_at_once
    assert found(4096, 16384, 256, 4, 64 * mib) == 1024  # the budget holds as many
    assert found(4096, 2**18, 256, 4, 64 * mib) == 512  # two gradients of the rows
    assert found(4096, 2**18, 256, 2, 64 * mib) == 512
    assert found(4096, 2**18, 64, 4, 64 * mib) == 0
    assert found(100, 2**18, 64, 4, 128 * mib) == 100
    assert found(10**6, 10, 8, 4, 64 * mib) == 2048
    assert found(0, 10, 8, 4, mib) == 0


@pytest.mark.parametrize("blocks", [False, True])
def test_a_second_run_gives_the_same_bits_and_blocks_move_rounding_alone(monkeypatch, blocks):
    if blocks:
        monkeypatch.setattr(passes, "LEAST_TOKENS", AT_ONCE)

    def run(budget):
        head = head_of(300, Mesh(), torch.float32)
        head.outputs.budget = budget
        return weighted(head, normal(TOKENS, DIM, seed=2).float().requires_grad_(), targets_of(300), weights())[2:]

    for first, again, other in zip(run(1), run(1), run(2**26), strict=True):
        assert torch.equal(first, again)
        torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("products", "bound"), [("fp32", 1e-5), ("bf16", 2.0**-6)])
@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0])
def test_gradients_of_confident_tokens_are_near_too(products, bound, scale):
    """A target may have nearly all of the probability: what is left of one minus it is not what rounding leaves of it.
    The logits are exact in bfloat16, so that nothing else is rounded before it."""
    rows = integers(64, DIM, seed=1).double()
    h = scale * rows[torch.arange(TOKENS)]
    targets = (h @ rows.t()).argmax(1)
    exact_h, exact_rows = h.clone().requires_grad_(), rows.clone().requires_grad_()
    (dense.loss(exact_h, exact_rows, targets) * weights()).sum().div(3).backward()
    head = head_of(64, Mesh(), torch.float32, products=products)
    head.rows.data = rows.float()
    _, _, dh, drows = weighted(head, h.float().requires_grad_(), targets, weights())
    for got, exact in ((dh, exact_h.grad), (drows, exact_rows.grad)):
        assert (got - exact).norm() <= bound * exact.norm()


def test_huge_logits_and_what_is_not_a_number():
    rows = torch.tensor([[1.0], [-1.0], [0.0]])
    head = Head(3, 1)
    head.rows.data = rows.clone()
    h = torch.tensor([[3e4], [-3e4], [0.0]], requires_grad=True)
    total, _ = head.weighted(h, torch.tensor([0, 0, 2]), torch.ones(3))
    total.backward()
    torch.testing.assert_close(h.grad, torch.tensor([[0.0], [-2.0], [0.0]]))
    bad = torch.tensor([[1.0], [torch.nan], [2.0]], requires_grad=True)
    total, found = head.weighted(bad, torch.tensor([0, 0, 2]), torch.ones(3))
    total.backward()
    assert total.isnan()
    assert found.whole_N.isnan().tolist() == [False, True, False]
    assert bad.grad.isnan()[:, 0].tolist() == [False, True, False]


def test_gradients_only_where_they_are_asked_for_and_none_in_evaluation():
    h, targets = normal(TOKENS, DIM, seed=2), targets_of(13)
    head = head_of(13, Mesh())
    head.weighted(h, targets, weights())[0].backward()
    assert head.rows.grad is not None
    frozen = head_of(13, Mesh())
    frozen.rows.requires_grad_(False)
    frozen.weighted(h.requires_grad_(), targets, weights())[0].backward()
    assert h.grad is not None
    assert frozen.rows.grad is None
    with torch.no_grad():
        total, found = head.weighted(h, targets, weights())
    close(total, (found.whole_N * weights()).sum())
    assert not total.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_scaled_loss_reaches_half_precision_as_it_does_in_losses(dtype):
    """The scale leaves the range of float16, and without it the gradients do."""
    found = []
    for way in ("weighted", "losses"):
        head, h = head_of(13, Mesh(), torch.float32), normal(TOKENS, DIM, seed=2).to(dtype).requires_grad_()
        weight = torch.full((TOKENS,), 1e-9)
        if way == "weighted":
            total, _ = head.weighted(h, targets_of(13), weight)
        else:
            total = (head.losses(h, targets_of(13)).whole_N * weight).sum()
        (total * 1e9).backward()
        assert h.grad.dtype == dtype
        found.append((h.grad.double(), head.rows.grad))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_weights_have_no_gradient_however_it_is_done(monkeypatch):
    for at_once in (True, False):
        if not at_once:
            monkeypatch.setattr(passes, "tokens_at_once", lambda *_: 0)
        head, weight = head_of(13, Mesh()), weights().requires_grad_()
        head.weighted(normal(TOKENS, DIM, seed=2), targets_of(13), weight)[0].backward()
        assert head.rows.grad is not None
        assert weight.grad is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_sum_has_the_same_gradients(reentrant):
    found = []
    for again in (True, False):
        head, h = head_of(13, Mesh()), normal(TOKENS, DIM, seed=2).requires_grad_()

        def total(x, head=head):
            return head.weighted(2 * x, targets_of(13), weights())[0]

        (checkpoint(total, h, use_reentrant=reentrant) if again else total(h)).backward()
        found.append((h.grad, head.rows.grad))
    for got, expected in zip(*found, strict=True):
        close(got, expected)


def test_gradients_are_given_away_once():
    head = head_of(13, Mesh())
    h = normal(TOKENS, DIM, seed=2).requires_grad_()
    total, _ = head.weighted(h, targets_of(13), weights())
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"given away.*take Head\.losses"):
        total.backward()


def _different(codes):
    mesh = Mesh(1, codes)
    head = head_of(13, mesh)
    h = mine(normal(TOKENS, DIM, seed=2), mesh).requires_grad_()
    total, _ = head.weighted(h, mine(targets_of(13), mesh), mine(weights(), mesh))
    (total * (1 + mesh.codes.rank)).backward()


@pytest.mark.dist
def test_what_arrives_must_be_the_same_on_all_ranks(ranks):
    with pytest.raises(RankError, match=r"are \[1\.0, 2\.0\], from the ranks of a code group.*into the weights"):
        ranks(2, _different, 2, timeout_s=20.0)


def _sent(codes):
    mesh, out = Mesh(1, codes), []
    for num_codes in (2**10, 2**13):
        head = Head(num_codes, DIM, mesh)
        h = mine(normal(TOKENS, DIM, seed=2).float(), mesh).requires_grad_()
        with ops.count_bytes() as sent:
            head.weighted(h, mine(targets_of(num_codes), mesh), mine(weights(), mesh))[0].backward()
        out.append(sent["codes"])
    return out


@pytest.mark.dist
def test_bytes_are_those_of_losses_and_one_number_more(ranks):
    num = TOKENS // 2
    # gathered h, targets and weights; all-reduced top, sum and target logit; dh back; the number that arrives
    each = num * DIM * 4 + num * 8 + num * 4 + 2 * 3 * num * 4 + num * DIM * 4 + 4
    assert ranks(2, _sent, 2) == [[each, each]] * 2


def test_neighbours_share_a_target_as_they_do_in_losses():
    found = []
    for way in ("weighted", "losses"):
        head = Head(13, DIM, embedding="codebook", feature_dim=4, neighbours=3).double()
        head.set_features(lambda ids: normal(13, 4, seed=7)[ids])
        put(head.outputs, normal(13, DIM, seed=13))
        h, targets = normal(TOKENS, DIM, seed=2).requires_grad_(), targets_of(13)
        if way == "weighted":
            total, _ = head.weighted(h, targets, weights(), label_smoothing=0.1)
        else:
            total = (head.losses(h, targets, label_smoothing=0.1).whole_N * weights()).sum()
        total.backward()
        found.append((total.detach(), h.grad, head.rows.grad))
    for got, expected in zip(*found, strict=True):
        close(got, expected)


def test_the_sum_of_digits_is_that_of_their_losses():
    found = []
    for way in ("weighted", "losses"):
        head = Factorised(12, DIM, factors=(4, 3)).double()
        for place, digit in enumerate(head.heads):
            put(digit.outputs, normal(digit.num_codes, DIM, seed=place))
        h, targets = normal(TOKENS, DIM, seed=2).requires_grad_(), targets_of(12)
        if way == "weighted":
            total, parts = head.weighted(h, targets, weights(), right=True)
            assert parts.right_N is not None
        else:
            total = (head.losses(h, targets).whole_N * weights()).sum()
        total.backward()
        found.append((total.detach(), h.grad, *(digit.rows.grad for digit in head.heads)))
    for got, expected in zip(*found, strict=True):
        close(got, expected)
