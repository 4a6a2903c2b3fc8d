"""The masked prior: what is masked, what its vectors see, which ids are revealed when, and with which frequencies."""

from __future__ import annotations

import itertools
import math
import re
from argparse import Namespace

import pytest
import torch
from whole import close, normal

from vqscale import priors
from vqscale.codes import noise
from vqscale.codes.heads import dense
from vqscale.parallel.mesh import Mesh
from vqscale.priors import halton
from vqscale.priors.config.masked import MaskedConfig, MaskedSampleConfig
from vqscale.priors.guidance import guidance_scales
from vqscale.priors.mask_laws import LAWS, left_masked, training_counts
from vqscale.priors.masked import bound_masks, training_masks
from vqscale.programs.sampling import options as sample_options
from vqscale.seed import derive

CODES, GRID, TOKENS, CLASSES = 23, (3, 4), 12, 4
NET = {"width": 24, "num_layers": 2, "num_heads": 2, "ffn_multiple": 8, "adaln": True, "qk_norm": True}
NET |= {"dropout_token": 0.0, "dropout_residual": 0.0, "dropout_ffn": 0.0}


def build(mesh=None, **more):
    keys = {"num_codes": CODES, "grid": list(GRID), "num_classes": CLASSES, "net": NET} | more
    return priors.build({"name": "masked", **keys}, mesh, seed=1)


def lively(prior, scale=1.0):
    """Values of a trained one's size, the same on any number of ranks; float64, in evaluation mode."""
    prior.double()
    with torch.no_grad():
        for number, (name, p) in enumerate(prior.named_parameters()):
            if "head." not in name:
                p.add_(0.2 * normal(*p.shape, seed=number))
        table = prior.head.outputs
        whole = scale * normal(prior.num_codes, prior.head.dim, seed=5)
        table.rows.copy_(whole[table.layout.start : table.layout.stop])
    return prior.eval()


@pytest.mark.parametrize(
    ("law", "steps", "revealed"),
    [
        ("cosine", 8, [5, 15, 24, 31, 39, 45, 48, 49]),
        ("arccos", 8, [21, 21, 21, 23, 25, 28, 35, 82]),
        ("cosine", 12, [3, 6, 11, 15, 18, 22, 26, 27, 31, 31, 33, 33]),
        ("arccos", 12, [14, 14, 14, 14, 15, 15, 16, 17, 20, 22, 28, 67]),
        ("linear", 4, [64, 64, 64, 64]),
        ("square", 4, [16, 48, 80, 112]),
        ("cubic", 2, [32, 224]),
        ("root", 4, [128, 54, 40, 34]),
    ],
)
def test_steps_reveal_the_published_numbers_of_256_ids(law, steps, revealed):
    left = left_masked(law, 256, steps)
    assert [before - after for before, after in itertools.pairwise(left)] == revealed


@pytest.mark.parametrize("law", LAWS)
def test_every_step_reveals_one_id_at_least_and_the_last_the_rest(law):
    for unknown in (0, 1, 2, 7, 64):
        for steps in sorted({1, 2, max(1, unknown // 2), max(1, unknown), 70}):
            left = left_masked(law, unknown, steps)
            assert (left[0], left[-1], len(left)) == (unknown, 0, steps + 1)
            assert all(after == 0 or after < before for before, after in itertools.pairwise(left)), left
            if steps <= unknown:
                assert all(after < before for before, after in itertools.pairwise(left))


@pytest.mark.parametrize("law", LAWS)
def test_a_law_falls_from_all_to_none_and_has_its_inverse(law):
    r = torch.linspace(0, 1, 101, dtype=torch.float64)
    share = LAWS[law].share(r)
    close(share[[0, -1]], torch.tensor([1.0, 0.0], dtype=torch.float64), 1e-8)
    assert (share.diff() < 0).all()
    close(LAWS[law].inverse(share), r, 1e-7)


@pytest.mark.parametrize(("law", "least", "mean"), [("cosine", 0.0, 2 / math.pi), ("arccos", 0.0, 2 / math.pi)])
def test_masks_of_training_follow_the_law(law, least, mean):
    """Number and positions of 10^4 draws; the shares below 0.2 are those of the law, positions are all alike."""
    num = 64
    config = MaskedConfig(grid=(8, 8), mask_law=law, least_masked=least)
    masked = training_masks(noise.keys(3, torch.arange(10_000)), config)
    counts = masked.sum(1)
    assert float(counts.double().mean()) / num == pytest.approx(mean, abs=0.01)
    below = {"cosine": 0.128, "arccos": 0.049}[law]
    assert float((counts < 0.2 * num).double().mean()) == pytest.approx(below, abs=0.012)
    assert (masked.double().mean(0) - mean).abs().max() < 5 * (0.25 / 10_000) ** 0.5
    assert int(counts.min()) >= 1
    # of images with a given number, any two positions are as likely together as any others
    half = masked[(counts > 20) & (counts < 44)].double()
    together = half.t() @ half / len(half)
    off = together[~torch.eye(num, dtype=torch.bool)]
    assert float(off.std()) < 2 * (0.25 / len(half)) ** 0.5


def test_a_least_share_bounds_the_masks_and_raises_their_mean():
    config = MaskedConfig(grid=(8, 8), least_masked=0.45)
    counts = training_masks(noise.keys(3, torch.arange(10_000)), config).sum(1)
    assert int(counts.min()) >= round(0.45 * 64)
    assert float(counts.double().mean()) / 64 == pytest.approx(0.809, abs=0.005)
    assert training_counts("cosine", 0.0, torch.tensor([0.9999999]), 64).tolist() == [1]


def test_masks_of_the_bound_have_every_number_as_often():
    config = MaskedConfig(grid=(3, 4), bound_passes=3)
    keys = noise.keys(3, torch.arange(6000))
    passes = [bound_masks(keys, config, number).sum(1) for number in range(3)]
    for counts in passes:
        found = torch.bincount(counts, minlength=13)[1:]
        assert int(counts.min()) >= 1
        assert ((found - 500).double().square() / 500).sum() < 11 + 4.5 * math.sqrt(22)
    assert set(((passes[1] - passes[0]) % 12).tolist()) == {4}  # spread evenly


def test_halton_is_the_published_order_and_meets_every_position():
    def pairs(grid, most):
        return [divmod(place, grid[1]) for place in halton.order(grid)[:most]]

    assert pairs((16, 16), 8) == [(8, 5), (4, 10), (12, 1), (2, 7), (10, 12), (6, 3), (14, 8), (1, 14)]
    four = "21 12 30 01 23 10 32 03 20 11 00 13 31 02 33 22"
    assert pairs((4, 4), 16) == [(int(pair[0]), int(pair[1])) for pair in four.split()]
    for side in (1, 2, 3, 8, 24, 32, 64):
        assert sorted(halton.order((side, side))) == list(range(side * side))
    assert sorted(halton.order((7,))) == list(range(7))
    assert sorted(halton.order((2, 3, 5))) == list(range(30))


@torch.no_grad()
def test_a_masked_id_reaches_nothing_and_a_visible_one_reaches_all():
    prior = lively(build())
    ids = torch.randint(CODES, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    hidden = ids.clone()
    hidden[:, ::2] = -1
    prefix = prior.prefix(torch.tensor([0, 3]))
    h = prior.states(hidden, prefix)
    other = hidden.clone()
    other[:, -1] = (other[:, -1] + 1) % CODES
    assert ((prior.states(other, prefix) - h).abs().amax(2) > 1e-6).all()
    assert not torch.equal(prior.states(torch.full_like(ids, -1), prefix)[:, 0], h[:, 0])
    # an id under a mask changes its own term of the loss and no other's, though torch is given both
    keys, labels = noise.keys(1, torch.arange(2)), torch.tensor([0, 3])
    masked = bound_masks(keys, prior.config, 0)
    changed = torch.where(masked, (ids + 1) % CODES, ids)
    seen = []
    handle = prior.net.register_forward_hook(lambda _, args, out: seen.append(out))
    for each in (ids, changed):
        prior.loss(each.view(2, *GRID), labels, keys)
    handle.remove()
    assert torch.equal(seen[0], seen[prior.config.bound_passes])


@torch.no_grad()
def test_places_differ_where_all_is_masked():
    prior = build(net=NET | {"prefix_rotary": "zero", "adaln": False})
    h = prior.eval().states(torch.full((1, TOKENS), -1), prior.prefix(torch.tensor([0])))
    assert (torch.cdist(h[0], h[0]) + torch.eye(TOKENS) > 1e-3).all()


def test_the_loss_is_the_weighted_mean_of_each_image():
    ids = torch.randint(CODES, (5, *GRID), generator=torch.Generator().manual_seed(1))
    labels, keys = torch.arange(5) % CLASSES, noise.keys(9, torch.arange(5))
    for weight in (0.0, 0.1, 1.0):
        prior = lively(build(unmasked_weight=weight, class_dropout=0.0, label_smoothing=0.1)).train()
        masked = training_masks(keys, prior.config)
        h = prior.states(ids.flatten(1).masked_fill(masked, -1), prior.prefix(labels, keys))
        nats = torch.nn.functional.cross_entropy(
            (h @ prior.head.rows.t()).flatten(0, 1), ids.flatten(), label_smoothing=0.1, reduction="none"
        ).view(5, TOKENS)
        share = masked.double().clamp(min=weight)
        expected = (nats * share).sum(1) / share.sum(1)
        found = prior(ids, labels, keys)
        close(found.nats_B, expected.detach())
        close(found.loss, expected.mean())
        asked = []
        whole = prior.head.weighted
        prior.head.weighted = lambda h, *args, **more: asked.append(len(h)) or whole(h, *args, **more)  # noqa: B023
        prior(ids, labels, keys)
        assert asked == [int(masked.sum()) if weight == 0 else 5 * TOKENS]


def chain(prior, label, ids, order):
    """log p of the ids in this order, each given those before it, one id at a time."""
    known, total = torch.full((1, ids.numel()), -1), 0.0
    for place in order:
        h = prior.states(known, prior.prefix(torch.tensor([label])))[0, place]
        total += float((h @ prior.head.rows.t()).log_softmax(0)[ids[place]])
        known[0, place] = ids[place]
    return total


@torch.no_grad()
def test_the_held_out_number_is_the_mean_over_all_orders_of_the_chain_rule():
    prior = lively(build(num_codes=3, grid=[1, 3]))
    ids = torch.tensor([2, 0, 1])
    orders = list(itertools.permutations(range(3)))
    exact = -sum(chain(prior, 1, ids, order) for order in orders) / len(orders) / 3
    many = 4000
    found = prior(ids.expand(many, 1, 3), torch.full((many,), 1), noise.keys(4, torch.arange(many)))
    spread = float(found.nats_B.std()) / many**0.5
    assert float(found.loss) == pytest.approx(exact, abs=4.5 * spread)
    assert spread < 0.03
    assert float(found.loss) == pytest.approx(float(found.nats_B.mean()), rel=1e-9)


@torch.no_grad()
def test_of_exact_conditionals_the_held_out_number_is_the_entropy_of_an_id():
    """A net that is a table of the conditionals of a joint of three ids: every order gives the same, -log p / 3."""
    joint = (0.8 * normal(27, seed=3)).softmax(0).view(3, 3, 3)
    prior = lively(build(num_codes=3, grid=[1, 3]))
    prior.head.rows.copy_(torch.eye(3, 24))

    def states(ids_BT, _):
        h = torch.zeros(len(ids_BT), 3, 24, dtype=torch.float64)
        for image, ids in enumerate(ids_BT.tolist()):
            given = joint[tuple(slice(None) if one < 0 else slice(one, one + 1) for one in ids)]
            for place in (place for place in range(3) if ids[place] < 0):
                h[image, place, :3] = given.sum([other for other in range(3) if other != place]).log()
        return h

    prior.states = states
    images, times = every_image(), 40
    keys = noise.keys(6, torch.arange(27 * times))
    found = prior(images.repeat(times, 1)[:, None], torch.full((27 * times,), 1), keys).nats_B.view(times, 27)
    entropy = -(joint * joint.log()).sum() / 3
    spread = float((found.var(0) @ joint.flatten().square() / times).sqrt())
    assert float(found.mean(0) @ joint.flatten()) == pytest.approx(float(entropy), abs=4.5 * spread)
    assert spread < 0.01


def likely(counts, p, num):
    """Within 4.5 deviations of chi-square."""
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-9)
    statistic = float(((counts - num * p).square() / (num * p)).sum())
    return statistic < len(p) - 1 + 4.5 * math.sqrt(2 * (len(p) - 1))


def every_image():
    return torch.tensor(list(itertools.product(range(3), repeat=3)))


def marginals(prior, known):
    """p of every id at every place, T x K, given the known ids."""
    h = prior.states(known[None], prior.prefix(torch.tensor([1])))[0]
    return (h @ prior.head.rows.t()).softmax(1)


def by_confidence(prior, steps, known=None):
    """p of all 27 images of the decoder without noise in its order, by enumeration: every id of a step is drawn, the
    likeliest of the drawn stay."""
    left = left_masked("cosine", 3, steps)
    states = {(-1, -1, -1): 1.0}
    for step in range(steps):
        after: dict[tuple, float] = {}
        for ids, weight in states.items():
            p = marginals(prior, torch.tensor(ids))
            open_ = [place for place in range(3) if ids[place] < 0]
            for drawn in itertools.product(range(3), repeat=len(open_)):
                sure = {place: float(p[place, one]) for place, one in zip(open_, drawn, strict=True)}
                ranked = sorted(open_, key=lambda place: (-sure[place], place))
                new = list(ids)
                for place in ranked[: left[step] - left[step + 1]]:
                    new[place] = drawn[open_.index(place)]
                after[tuple(new)] = after.get(tuple(new), 0.0) + weight * math.prod(sure.values())
        states = after
    return torch.tensor([states[tuple(ids.tolist())] for ids in every_image()], dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one step", "halton", "random", "confidence in two", "confidence in three"])
@torch.no_grad()
def test_frequencies_are_the_stated_distribution_of_the_decoder(kind):
    """K = 3, three ids, all 27 images: T = 1 is the product of marginals, Halton's order with T = N the chain of that
    order, any order the mean over the orders, confidence a sum over what may be drawn and stay."""
    prior, images = lively(build(num_codes=3, grid=[1, 3]), 0.5), every_image()
    if kind == "one step":
        options = {"steps": 1}
        p = marginals(prior, torch.tensor([-1, -1, -1])).gather(1, images.t()).prod(0)
    elif kind in ("halton", "random"):
        options = {"steps": 3, "order": kind}
        orders = [halton.order((1, 3))] if kind == "halton" else list(itertools.permutations(range(3)))
        each = [[math.exp(chain(prior, 1, ids, order)) for ids in images] for order in orders]
        p = torch.tensor(each, dtype=torch.float64).mean(0)
    else:
        options = {"steps": 2 if kind.endswith("two") else 3, "order_noise": 0.0}
        p = by_confidence(prior, options["steps"])
    num = 5000
    drawn = prior.sample(torch.full((num,), 1), options, numbers_B=torch.arange(num), seed=5)
    counts = torch.bincount((drawn.flatten(1) * torch.tensor([9, 3, 1])).sum(1), minlength=27)
    assert likely(counts, p, num), (counts, num * p)
    assert not likely(counts, torch.full((27,), 1 / 27, dtype=torch.float64), num)


EVERY = [
    {"steps": 5},
    {"steps": 4, "order_noise": 0.0, "mask_law": "arccos", "temperature": 0.8},
    {"steps": 12, "top_k": 5, "guidance": 2.0, "schedule": "linear"},
    {"steps": 3, "temperature": 0.0, "guidance": 1.5},
    {"steps": 6, "order": "halton", "guidance": 3.0, "schedule": "cosine", "top_p": 0.8},
    {"steps": 5, "order": "halton", "roll": True},
    {"steps": 4, "order": "random", "mask_law": "linear"},
]


def slowly(prior, labels, options, numbers, seed, known):
    """The decoder written out: every position is drawn at every step from the dense distribution, image by image."""
    how = MaskedSampleConfig(**options)
    scales, done = guidance_scales(how.guidance, how.schedule, how.steps), []
    rows, rule = prior.head.rows, {"temperature": how.temperature, "top_k": how.top_k, "top_p": how.top_p}
    for label, number, ids in zip(labels, numbers, known.flatten(1), strict=True):
        ids, left = ids.clone(), left_masked(how.mask_law, int((ids < 0).sum()), how.steps)
        key = noise.keys(derive(seed, "order"), number[None])
        order = list(halton.order(GRID))
        if how.order == "random":
            order = noise.uniform(key, 0, TOKENS)[0].argsort().tolist()
        if how.roll:
            start = int(float(noise.uniform(key, 0, 1)) * TOKENS)
            order = order[start:] + order[:start]
        for step, scale in enumerate(scales):
            h, null = (prior.states(ids[None], prior.prefix(one[None]))[0] for one in (label, torch.tensor(-1)))
            p = dense.distribution(h, rows, unguided_ND=null, guidance=scale, **rule)
            places = torch.arange(TOKENS)
            keys = noise.keys(derive(seed, "sample"), number, step, places)
            drawn = (p.log() + (noise.gumbel(keys, 0, CODES, torch.float64) if how.temperature else 0)).argmax(1)
            whole = dense.distribution(h, rows, unguided_ND=null, guidance=scale, temperature=how.temperature or 1.0)
            keys = noise.keys(derive(seed, "order"), number, step, places)
            amount = how.order_noise * (1 - (step + 1) / how.steps)
            sure = whole.log().gather(1, drawn[:, None])[:, 0] + amount * noise.gumbel(keys, 0, 1, torch.float64)[:, 0]
            masked = [place for place in range(TOKENS) if ids[place] < 0]
            rank = order.index if how.order != "confidence" else lambda place: (-float(sure[place]), place)  # noqa: B023
            for place in sorted(masked, key=rank)[: left[step] - left[step + 1]]:
                ids[place] = drawn[place]
        done.append(ids)
    return torch.stack(done).view(-1, *GRID)


def _partial():
    """Ids of which some are known: none, some, all but one, all, of six images."""
    ids = torch.randint(CODES, (6, TOKENS), generator=torch.Generator().manual_seed(8))
    for image, num in enumerate((12, 7, 1, 0, 3, 12)):
        ids[image, torch.randperm(TOKENS, generator=torch.Generator().manual_seed(image))[:num]] = -1
    return ids.view(6, *GRID)


def drawn_on(codes, options, order, given):
    mesh = Mesh(1, codes)
    prior = lively(build(mesh))
    cut = [
        x[order].chunk(codes)[mesh.codes.rank] for x in (torch.arange(6) % CLASSES, 40 + torch.arange(6), _partial())
    ]
    return prior.sample(cut[0], options, numbers_B=cut[1], seed=3, known=cut[2] if given else None)


@pytest.mark.slow
@pytest.mark.parametrize("options", EVERY, ids=str)
@torch.no_grad()
def test_every_draw_is_that_of_the_decoder_written_out(options):
    """So the head asked about masked positions alone is the head asked about all, in any batch."""
    prior, labels, numbers = lively(build()), torch.arange(6) % CLASSES, 40 + torch.arange(6)
    for known, given in ((torch.full((6, *GRID), -1), False), (_partial(), True)):
        found = drawn_on(1, options, list(range(6)), given)
        assert torch.equal(found, slowly(prior, labels, options, numbers, 3, known))
        assert torch.equal(found[known >= 0], known[known >= 0])
        assert torch.equal(drawn_on(1, options, [4, 1, 0], given), found[[4, 1, 0]])


@pytest.mark.dist
@pytest.mark.parametrize("codes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_draws_are_the_same_on_any_number_of_processes(ranks, codes):
    order = list(range(4))
    for options in (EVERY[0], EVERY[2], EVERY[4]):
        for given in (False, True):
            results = ranks(codes, drawn_on, codes, options, order, given)
            assert torch.equal(torch.cat(results), drawn_on(1, options, order, given)), (options, given)


@pytest.mark.parametrize("options", [{"order": "halton"}, {}], ids=str)
def test_the_head_is_asked_about_masked_positions_alone_and_counts_are_exact_where_all_are_equal(options):
    prior, asked, seen = build().eval(), [], []
    for name in ("sample", "sample_scored"):
        method = getattr(prior.head, name)

        def watched(h, *args, method=method, **more):
            asked.append(len(h))
            return method(h, *args, **more)

        setattr(prior.head, name, watched)
    states = prior.states
    prior.states = lambda ids, prefix: seen.append((ids < 0).sum(1).tolist()) or states(ids, prefix)
    ids = prior.sample(torch.arange(3), {"steps": 5, **options}, numbers_B=torch.arange(3))
    left = left_masked("cosine", TOKENS, 5)
    assert seen == [[count] * 3 for count in left[:-1]]
    per_step = left[:-1] if not options else [before - after for before, after in itertools.pairwise(left)]
    assert asked == [3 * count for count in per_step]
    assert ids.min() >= 0
    assert ids.max() < CODES


def test_equal_confidence_is_revealed_in_the_order_of_positions():
    prior, seen = build().eval(), []
    states = prior.states
    prior.states = lambda ids, prefix: seen.append(ids.clone()) or states(ids, prefix)
    prior.sample(torch.arange(2), {"steps": 4, "order_noise": 0.0}, numbers_B=torch.arange(2))
    for ids, count in zip(seen, left_masked("cosine", TOKENS, 4), strict=False):
        assert ((ids < 0).int().diff(dim=1) >= 0).all()
        assert ((ids < 0).sum(1) == count).all()


def test_guidance_of_one_is_no_guidance_to_the_bit_and_costs_nothing():
    prior, labels, numbers, seen = lively(build()), torch.arange(4), torch.arange(4), []
    prior.net.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    plain = prior.sample(labels, {"steps": 5}, numbers_B=numbers)
    assert torch.equal(prior.sample(labels, {"steps": 5, "schedule": "linear"}, numbers_B=numbers), plain)
    assert seen == [4] * 10
    prior.sample(labels, {"steps": 5, "schedule": "linear", "guidance": 2.0}, numbers_B=numbers)
    assert seen[10:] == [4, 8, 8, 8, 8]  # a ramp begins at 1


def test_edges_of_steps_and_of_grids():
    prior = build(grid=[1, 1])
    assert prior.sample(torch.tensor([0]), {"steps": 1}, numbers_B=torch.tensor([0])).shape == (1, 1, 1)
    prior = build()
    for steps in (1, TOKENS):
        ids = prior.sample(torch.tensor([0]), {"steps": steps}, numbers_B=torch.tensor([0]))
        assert ids.min() >= 0
    with pytest.raises(ValueError, match=re.escape("steps is 13, but an image of this prior has 12 ids (grid [3, 4])")):
        prior.sample(torch.tensor([0]), {"steps": 13}, numbers_B=torch.tensor([0]))


def test_options_refuse_too_many_steps_before_processes_meet(tmp_path):
    build().save(tmp_path / "prior")
    said = re.escape("command line: steps is 13, but an image of this prior has 12 ids (grid [3, 4])")
    with pytest.raises(ValueError, match=said):
        sample_options.sample_config(Namespace(prior=tmp_path / "prior", steps="13"))
    with pytest.raises(ValueError, match=said):
        sample_options.dials(Namespace(prior=tmp_path / "prior", steps="4,13"))
    how = sample_options.sample_config(Namespace(prior=tmp_path / "prior", steps="4", order="halton", roll="true"))
    assert how == MaskedSampleConfig(steps=4, order="halton", roll=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "steps is 0: use at least 1"),
        ({"order_noise": -1.0}, "order_noise is -1.0"),
        ({"roll": True}, "roll is true with order confidence"),
        ({"order": "hilbert"}, "expected confidence | halton | random, found the text 'hilbert'"),
        ({"temperature": -1.0, "top_k": -1, "top_p": 2.0}, "top_k is -1"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        build().sample(torch.tensor([0]), settings, numbers_B=torch.tensor([0]))


def test_known_ids_are_checked_and_other_priors_refuse_them():
    labels = numbers = torch.arange(2)
    known = torch.full((2, *GRID), -1)
    with pytest.raises(ValueError, match=r"known ids must be in -1 \.\. 22.*go from -1 to 23"):
        build().sample(labels, numbers_B=numbers, known=known.index_fill(1, torch.tensor([0]), CODES))
    with pytest.raises(ValueError, match=re.escape("ids have the shape [2, 4, 3]")):
        build().sample(labels, numbers_B=numbers, known=known.transpose(1, 2))
    other = priors.build({"name": "autoregressive", "num_codes": CODES, "grid": list(GRID), "net": NET})
    with pytest.raises(ValueError, match=r"known ids were given.* the prior autoregressive draws all ids in an order"):
        other.sample(labels, numbers_B=numbers, known=known)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"least_masked": 1.0}, "least_masked is 1.0"),
        ({"unmasked_weight": -0.1}, "unmasked_weight is -0.1"),
        ({"bound_passes": 0}, "bound_passes is 0"),
        ({"mask_law": "cosin"}, "expected cosine | arccos | linear | square | cubic | root"),
        ({"net": {"width": 24, "num_heads": 4}}, "has 3 pairs to turn"),
    ],
)
def test_what_cannot_be_built(keys, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        build(**keys)


DIGITS = {"head": {"name": "factorised", "factors": [4, 6]}, "num_codes": 24}


BITS = {"head": {"name": "bits"}, "num_codes": 16}


@pytest.mark.parametrize(
    "more",
    [DIGITS, {**DIGITS, "num_ids": 2}, pytest.param(BITS, marks=pytest.mark.slow)],
    ids=["digits", "two ids per token", "bits"],
)
def test_it_has_any_head_and_several_ids_per_token(more):
    prior = build(**more)
    ids = torch.randint(prior.num_codes, (3, *prior.ids_shape), generator=torch.Generator().manual_seed(2))
    labels, numbers = torch.arange(3), torch.arange(3)
    prior(ids, labels, noise.keys(0, numbers)).loss.backward()
    found = prior.eval()(ids, labels, noise.keys(0, numbers))
    close(found.loss, torch.tensor(prior.num_ids * math.log(prior.num_codes)), 1e-5)
    known = (torch.arange(TOKENS) % 4 < 2).view(1, *GRID)
    if prior.num_ids > 1:
        known = known[..., None]
    given = torch.where(known, ids, -1)
    for options in ({"steps": 3}, {"steps": 3, "order": "halton"}):
        drawn = prior.sample(labels, options, numbers_B=numbers, known=given)
        assert drawn.shape == ids.shape
        assert torch.equal(torch.where(known, drawn, -1), given)
        assert drawn.min() >= 0
        assert torch.equal(prior.sample(labels[1:2], options, numbers_B=numbers[1:2], known=given[1:2]), drawn[1:2])
    if prior.num_ids > 1:
        given[..., 0] = -1
        with pytest.raises(ValueError, match="of some tokens a part is known"):
            prior.sample(labels, numbers_B=numbers, known=given)
