"""Head: loss and embedding against plain torch, on any number of ranks; what they send; what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from whole import CODES, GRIDS, close, engine_gradient, mine, normal, put, table

import vqscale
from vqscale.codes.heads import dense, passes
from vqscale.codes.heads.config import FlatConfig
from vqscale.codes.heads.flat import Head
from vqscale.codes.rows import Rows, draw, set_aside
from vqscale.config import parse
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.parallel.spawn import RankError

TOKENS, DIM = 24, 6
# (K, bytes for blocks): fewer codes than four ranks, K not divisible, many blocks of rows
SHAPES = [(1, 2**26), (3, 2**26), (13, 2**26), (517, 1)]
LOSSES = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.3},
    {"label_smoothing": 0.4, "z_loss": 1e-2, "ignore": 0},
    {"label_smoothing": 1.0},
]


def whole_head(num_codes, mesh, dtype=torch.float64, scale=1.0, **options):
    head = Head(num_codes, DIM, mesh, **options)
    put(head.outputs, scale * normal(num_codes, DIM, seed=num_codes).to(dtype))
    return head


def whole_targets(num_codes, ignore):
    targets = torch.randint(num_codes, (TOKENS,), generator=torch.Generator().manual_seed(num_codes))
    targets[[1, 2, 11, 20]] = ignore
    targets[[0, 5]] = num_codes - 1
    return targets


def _losses(data, codes):
    mesh = Mesh(data, codes)
    out = {}
    for num_codes, budget in SHAPES:
        for case, options in enumerate(LOSSES):
            head = whole_head(num_codes, mesh)
            head.outputs.budget = budget
            h = mine(normal(TOKENS, DIM, seed=2), mesh).requires_grad_()
            targets = mine(whole_targets(num_codes, options.get("ignore", -1)), mesh)
            loss = head.loss(h, targets, **options)
            (loss * mine(normal(TOKENS, seed=3), mesh)).mean().backward()
            out[num_codes, case] = (loss.detach(), h.grad, head.rows.grad)
    return out


@pytest.mark.parametrize("grid", GRIDS)
def test_loss_and_its_gradients_are_those_of_cross_entropy(ranks, grid):
    results = ranks(grid[0] * grid[1], _losses, *grid)
    for num_codes, _ in SHAPES:
        for case, options in enumerate(LOSSES):
            h = normal(TOKENS, DIM, seed=2).requires_grad_()
            rows = normal(num_codes, DIM, seed=num_codes).requires_grad_()
            targets = whole_targets(num_codes, options.get("ignore", -1))
            expected = dense.loss(h, rows, targets, **options)
            (expected * normal(TOKENS, seed=3)).mean().backward()
            got = [result[num_codes, case] for result in results]
            loss = torch.cat([part[0] for part in got])
            close(loss, expected.detach())
            assert (loss[targets == options.get("ignore", -1)] == 0).all()
            # each rank's loss is a mean over its own tokens: its gradients are world times those of the global mean
            close(torch.cat([part[1] for part in got]) / len(got), h.grad)
            close(engine_gradient([part[2] for part in got], grid[1]), rows.grad)


def test_the_dense_loss_is_cross_entropy_plus_the_square_of_the_normaliser():
    h, rows = normal(5, 3, seed=1), normal(7, 3, seed=2)
    targets = torch.tensor([0, 6, -1, 3, 3])
    logits = h @ rows.t()
    own = [torch.logsumexp(line, 0) - line[t] for line, t in zip(logits, targets, strict=True)]
    squares = torch.logsumexp(logits, 1).square()
    expected = (torch.stack(own) + 0.5 * squares) * (targets >= 0)
    close(dense.loss(h, rows, targets, z_loss=0.5), expected)


def _at_zero(codes):
    mesh = Mesh(1, codes)
    out = []
    for num_codes in (3, 10, 70001):
        head = Head(num_codes, DIM, mesh)
        loss = head.loss(mine(normal(TOKENS, DIM, seed=2).float(), mesh), torch.zeros(TOKENS // codes).long())
        out.append(loss.detach())
    return out


@pytest.mark.parametrize("codes", CODES)
def test_a_new_head_has_the_loss_log_K_to_the_bit(ranks, codes):
    for result in ranks(codes, _at_zero, codes):
        for loss, num_codes in zip(result, (3, 10, 70001), strict=True):
            assert loss.dtype == torch.float32
            assert torch.equal(loss, torch.full_like(loss, num_codes).log())
            assert abs(float(loss[0]) - math.log(num_codes)) < 1e-6


def test_logits_far_apart_neither_overflow_nor_lose_the_target():
    rows = torch.tensor([[1.0], [-1.0], [0.0]])
    head = put_rows(Head(3, 1), rows)
    h = torch.tensor([[3e4], [-3e4], [0.0]], requires_grad=True)
    loss = head.loss(h, torch.tensor([0, 0, 2]))
    torch.testing.assert_close(loss.detach(), torch.tensor([0.0, 6e4, math.log(3)]))
    loss.sum().backward()
    torch.testing.assert_close(h.grad, torch.tensor([[0.0], [-2.0], [0.0]]))


def put_rows(head, rows):
    head.rows.data = rows.clone()
    return head


def test_gradients_only_where_they_are_asked_for():
    head = whole_head(13, Mesh())
    h, targets = normal(TOKENS, DIM, seed=2), whole_targets(13, -1)
    head.loss(h, targets).sum().backward()
    assert head.rows.grad is not None
    frozen = whole_head(13, Mesh())
    frozen.rows.requires_grad_(False)
    frozen.loss(h.requires_grad_(), targets).sum().backward()
    assert h.grad is not None
    assert frozen.rows.grad is None
    head.rows.grad = None
    head.loss(h, torch.full((TOKENS,), -1)).sum().backward()
    assert not head.rows.grad.any()


def _half(codes):
    """A bf16 h under autocast, beside the same numbers in float32 without; and bf16 products."""
    mesh = Mesh(1, codes)
    out = {}
    for name, lower, products in (("full", False, "fp32"), ("half", True, "fp32"), ("products", True, "bf16")):
        head = whole_head(300, mesh, torch.float32, products=products)
        h = mine(normal(TOKENS, DIM, seed=2), mesh).bfloat16()
        h = (h if lower else h.float()).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            loss = head.loss(h, mine(whole_targets(300, -1), mesh), z_loss=0.1)
            loss.mean().backward()
        out[name] = (loss.detach(), h.grad, head.rows.grad)
    return out


@pytest.mark.parametrize("codes", CODES)
def test_autocast_does_not_lower_the_precision_and_bf16_products_do_a_little(ranks, codes):
    for result in ranks(codes, _half, codes):
        (loss, dh, drows), (half, half_dh, half_drows) = result["full"], result["half"]
        assert half.dtype == half_drows.dtype == torch.float32
        assert torch.equal(half, loss)
        assert torch.equal(half_drows, drows)
        assert half_dh.dtype == torch.bfloat16
        assert torch.equal(half_dh, dh.bfloat16())
        rounded, rounded_dh, rounded_drows = result["products"]
        assert rounded.dtype == rounded_drows.dtype == torch.float32
        assert not torch.equal(rounded, loss)
        torch.testing.assert_close(rounded, loss, rtol=1e-2, atol=3e-2)
        for got, exact in ((rounded_dh, half_dh), (rounded_drows, drows)):
            assert (got.float() - exact.float()).norm() < 2e-2 * exact.float().norm()


def test_rows_gradients_of_bf16_products_accumulate_in_float32(monkeypatch):
    """Over many blocks of tokens the error is that of one rounding, not of a sum kept in bf16."""
    monkeypatch.setattr(passes.scan, "TOKEN_BLOCK", 4)
    head, exact = (put_rows(Head(8, 4, products=kind), torch.zeros(8, 4)) for kind in ("bf16", "fp32"))
    h = normal(4096, 4, seed=1).float() + 3.0
    targets = torch.arange(4096) % 8
    for each in (head, exact):
        each.loss(h, targets).sum().backward()
    error = (head.rows.grad - exact.rows.grad).abs().max()
    assert error < 4e-3 * h.sum(0).abs().max() / 8
    expected = (1 / 8 - F.one_hot(targets, 8).float()).t() @ h
    torch.testing.assert_close(exact.rows.grad, expected, rtol=1e-4, atol=1e-2)


def _embed(data, codes, embedding):
    mesh = Mesh(data, codes)
    head = Head(13, DIM, mesh, embedding=embedding, feature_dim=4 if embedding == "codebook" else None, seed=5)
    head.double()
    if embedding == "codebook":
        head.set_features(lambda ids: whole_features()[ids])
        with torch.no_grad():
            head.map.weight.copy_(normal(DIM, 4, seed=8))
            head.map.bias.copy_(normal(DIM, seed=9))
    elif embedding == "tied":
        put(head.outputs, normal(13, DIM, seed=6))
    else:
        put(head.inputs, normal(13, DIM, seed=6))
    x = head.embed(mine(whole_ids(), mesh))
    (x * mine(normal(TOKENS, DIM, seed=3).view(8, 3, DIM), mesh)).sum(2).mean().backward()
    grads = {name: p.grad for name, p in head.named_parameters()}
    return x.detach(), grads


def whole_features():
    return 7.0 * normal(13, 4, seed=7)


def whole_ids():
    ids = torch.randint(13, (8, 3), generator=torch.Generator().manual_seed(4))
    ids[1, 1] = ids[7, 2] = -1
    return ids


@pytest.mark.parametrize("embedding", ["rows", "tied", "codebook"])
@pytest.mark.parametrize("grid", GRIDS)
def test_embed_looks_ids_up_with_gradients_and_minus_one_is_zero(ranks, grid, embedding):
    results = ranks(grid[0] * grid[1], _embed, *grid, embedding)
    ids = whole_ids()
    if embedding == "codebook":
        features = whole_features() / whole_features().square().mean().sqrt()
        weight, bias = (normal(DIM, 4, seed=8).requires_grad_(), normal(DIM, seed=9).requires_grad_())
        expected = (features[ids.clamp(min=0)] @ weight.t() + bias) * (ids >= 0)[..., None]
    else:
        rows = normal(13, DIM, seed=6).requires_grad_()
        expected = rows[ids.clamp(min=0)] * (ids >= 0)[..., None]
    (expected * normal(TOKENS, DIM, seed=3).view(8, 3, DIM)).sum(2).mean().backward()
    close(torch.cat([x for x, _ in results]), expected.detach())
    grads = [grads for _, grads in results]
    if embedding == "codebook":
        for name, leaf in (("map.weight", weight), ("map.bias", bias)):
            close(sum(each[name] for each in grads) / len(grads), leaf.grad)
        assert all(each["inputs.rows"] is None for each in grads)
    else:
        name = {"rows": "inputs.rows", "tied": "outputs.rows"}[embedding]
        close(engine_gradient([each[name] for each in grads], grid[1]), rows.grad)


def test_a_tied_table_gets_the_gradients_of_both_uses():
    head = whole_head(13, Mesh(), embedding="tied")
    ids, targets = torch.tensor([3, 3, 12]), torch.tensor([12, 0, 3])
    head.loss(head.embed(ids), targets).mean().backward()
    rows = normal(13, DIM, seed=13).requires_grad_()
    F.cross_entropy(rows[ids] @ rows.t(), targets).backward()
    close(head.rows.grad, rows.grad)


def _rows_of_features(codes):
    """Output rows that begin as the vectors of the codes, twice as large."""
    head = Head(13, 64, Mesh(1, codes), embedding="codebook", feature_dim=4, output_scale=2.0, seed=5)
    head.set_features(lambda ids: whole_features()[ids])
    return head.rows.detach()


@pytest.mark.parametrize("codes", CODES)
def test_output_rows_may_begin_as_the_vectors_of_the_codes(ranks, codes):
    rows = table(ranks(codes, _rows_of_features, codes), codes)
    close(rows, _rows_of_features(1), 1e-6)  # the root mean square is summed in another order
    features = whole_features() / whole_features().square().mean().sqrt()
    map_FD = torch.linalg.lstsq(features, rows.double()).solution
    torch.testing.assert_close(features @ map_FD, rows.double(), atol=1e-5, rtol=0)  # a linear map of them
    angles = torch.cosine_similarity(rows[:, None], rows[None], dim=2) - torch.cosine_similarity(
        features[:, None], features[None], dim=2
    )
    assert angles.abs().max() < 0.5  # which hardly turns them against each other
    assert rows.norm(dim=1).mean() == pytest.approx(2.0 * features.norm(dim=1).mean().item(), rel=0.15)


def _first_rows(codes):
    head = Head(2500, 3, Mesh(1, codes), seed=9)
    tied = Head(2500, 3, Mesh(1, codes), embedding="tied", init_scale=0.5, seed=9)
    return head.rows.detach(), head.inputs.rows.detach(), tied.rows.detach()


@pytest.mark.parametrize("codes", CODES)
def test_a_head_begins_the_same_on_any_number_of_ranks(ranks, codes):
    results = ranks(codes, _first_rows, codes)
    alone = _first_rows(1)
    for part in range(3):
        assert torch.equal(table([result[part] for result in results], codes), alone[part])
    assert not alone[0].any()
    assert abs(alone[1].std() - 0.02) < 1e-3
    assert abs(alone[2].std() - 0.5) < 2e-2
    assert not torch.equal(alone[1] / 0.02, draw(Rows(2500), 3, "normal", 1.0, seed=9))


@pytest.mark.parametrize(
    ("embedding", "aside", "left"),
    [
        ("rows", {"head.outputs", "head.inputs"}, set()),
        ("tied", {"head.outputs"}, set()),
        ("codebook", {"head.outputs", "head.inputs"}, {"head.map.weight", "head.map.bias"}),
    ],
)
def test_tables_are_set_aside_and_the_head_goes_on_working(embedding, aside, left):
    model = torch.nn.Module()
    model.head = vqscale.Head(13, DIM, embedding=embedding, feature_dim=4 if embedding == "codebook" else None)
    tables = set_aside(model)
    assert set(tables) == aside
    assert {name for name, _ in model.named_parameters()} == left
    ids = torch.tensor([1, 12])
    model.head.loss(model.head.embed(ids), ids).sum().backward()
    assert tables["head.outputs"].rows.grad is not None
    assert model.head.rows is tables["head.outputs"].rows


SIZES = [2**10, 2**13]


def _sent(codes):
    """Bytes of a loss with its backward pass, of an embedding with its own, of a sample."""
    out = []
    for num_codes in SIZES:
        mesh = Mesh(1, codes)
        head = Head(num_codes, DIM, mesh)
        h = mine(normal(TOKENS, DIM, seed=2).float(), mesh).requires_grad_()
        ids = mine(whole_targets(num_codes, -1), mesh)
        with ops.count_bytes() as loss:
            head.loss(h, ids, label_smoothing=0.1).mean().backward()
        with ops.count_bytes() as half:
            head.loss(h.detach().bfloat16(), ids)
        with ops.count_bytes() as embed:
            head.embed(ids).sum().backward()
        with ops.count_bytes() as sample:
            head.sample(h, ids)
        out.append([dict(each)["codes"] for each in (loss, half, embed, sample)])
    return out


@pytest.mark.dist
@pytest.mark.parametrize("codes", [2, 4])
def test_bytes_are_tokens_times_dim_and_do_not_know_K(ranks, codes):
    once, num = codes - 1, TOKENS // codes
    vectors, number, ident = num * DIM * 4, num * 4, num * 8
    # gathered h and targets; all-reduced top, sum and target logit, mean row; gathered upstream, dh back
    loss = vectors + ident + 2 * 3 * number + 2 * DIM * 4 // codes + number + vectors
    half = vectors // 2 + ident + 2 * 3 * number
    # the range of ids (two int64), ids, vectors back; their gradient
    embed = 2 * 16 // codes + ident + vectors + vectors
    # h, keys; the best score and its id
    sample = vectors + ident + 2 * number + 2 * ident
    for result in ranks(codes, _sent, codes):
        assert result == [[each * once for each in (loss, half, embed, sample)]] * len(SIZES)


def _wrong_ids(codes, where):
    mesh = Mesh(1, codes)
    head = Head(13, DIM, mesh)
    ids = torch.zeros(3, dtype=torch.int64)
    if mesh.codes.rank == 0:
        ids[1] = 13
    head.embed(ids) if where == "embed" else head.loss(torch.zeros(3, DIM), ids)


@pytest.mark.dist
@pytest.mark.parametrize("where", ["embed", "loss"])
def test_ids_outside_the_vocabulary_are_refused_on_all_ranks(ranks, where):
    # a rank that did not see the error would wait for the others: the call would end in a timeout
    with pytest.raises(RankError, match=r"must be in -?\d \.\. 12, for there are 13 codes, but they go from 0 to 13"):
        ranks(2, _wrong_ids, 2, where, timeout_s=20.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda head: head.embed(torch.tensor([0, -2])), r"ids to embed must be in -1 \.\. 12.* from -2 to 0"),
        (lambda head: head.loss(torch.zeros(2, DIM), torch.tensor([-7, 3])), r"targets must be in 0 \.\. 12.* from -7"),
        (lambda head: head.loss(torch.zeros(1, DIM), torch.tensor([-1]), ignore=-100), "targets must be in 0"),
        (lambda head: head.loss(torch.zeros(1, DIM), torch.tensor([1]), label_smoothing=1.5), "label_smoothing is 1.5"),
        (lambda head: head.loss(torch.zeros(1, DIM), torch.tensor([1]), z_loss=-1.0), "z_loss is -1.0"),
        (lambda head: head.loss(torch.zeros(1, DIM), torch.tensor([1.0])), "targets are float32, and ids are whole"),
        (lambda head: head.embed(torch.tensor([1.0])), "ids to embed are float32, and ids are whole"),
        (lambda _: Head(13, DIM, embedding="codebook"), "embedding is codebook and feature_dim is None"),
        (lambda _: Head(13, DIM, feature_dim=4), "embedding is rows and feature_dim is 4"),
        (
            lambda _: Head(13, DIM, embedding="codebook", feature_dim=4).set_features(
                lambda ids: torch.ones(len(ids), 5)
            ),
            "vectors of codes have 5 numbers, from the tokenizer, but feature_dim is 4",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(Head(13, DIM))


def test_no_tokens_are_no_loss():
    head = whole_head(13, Mesh())
    none = torch.zeros(0, dtype=torch.int64)
    loss = head.loss(torch.zeros(0, DIM, dtype=torch.float64, requires_grad=True), none)
    loss.sum().backward()
    assert loss.shape == (0,)
    assert not head.rows.grad.any()
    assert Head(13, DIM).embed(none).shape == (0, DIM)


def test_a_head_is_made_from_its_settings():
    config = parse(FlatConfig, {"embedding": "codebook", "products": "bf16", "scan_mib": 3})
    head = Head.from_config(config, 13, DIM, Mesh(), seed=1, feature_dim=4)
    assert (head.embedding, head.products, head.outputs.budget) == ("codebook", "bf16", 3 * 2**20)
    assert head.map.weight.shape == (DIM, 4)
    assert not hasattr(Head.from_config(FlatConfig(), 13, DIM, Mesh(), seed=1, feature_dim=4), "map")
    problems = dict(FlatConfig(init_scale=-1.0, output_scale=0.5, scan_mib=0).problems())
    assert set(problems) == {"init_scale", "output_scale", "scan_mib"}


def test_a_head_on_the_meta_device_has_shapes_only():
    with torch.device("meta"):
        head = Head(2**40, 256, embedding="codebook", feature_dim=16)
    assert head.rows.is_meta
    assert head.inputs.rows.shape == (2**40, 16)


@pytest.mark.gpu
@pytest.mark.parametrize(("products", "loose"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_on_a_gpu(products, loose):
    head = whole_head(70001, Mesh(), torch.float32, products=products).cuda()
    h = normal(TOKENS, DIM, seed=2).float().cuda().requires_grad_()
    targets = whole_targets(70001, -1).cuda()
    loss = head.loss(h, targets, label_smoothing=0.1, z_loss=1e-3)
    loss.mean().backward()
    exact = normal(TOKENS, DIM, seed=2).requires_grad_()
    rows = normal(70001, DIM, seed=70001).requires_grad_()
    expected = dense.loss(exact, rows, targets.cpu(), label_smoothing=0.1, z_loss=1e-3)
    expected.mean().backward()
    for got, value in ((loss.detach(), expected.detach()), (h.grad, exact.grad), (head.rows.grad, rows.grad)):
        assert (got.cpu().double() - value).norm() < loose * value.norm()
