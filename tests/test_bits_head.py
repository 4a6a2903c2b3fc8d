"""The masked-bit head: exact nats and frequencies in its orders by enumeration, masks in training, ranks, refusals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from test_head_sampling import chi_square, likely
from whole import CODES, close, mine, normal

from vqscale.codes import noise
from vqscale.codes.heads.bits import Bits
from vqscale.codes.heads.config import BitsConfig, HeadConfig
from vqscale.codes.rows import set_aside
from vqscale.config import parse
from vqscale.nets.masked_bits import MASKED
from vqscale.parallel.mesh import Mesh
from vqscale.priors.config.autoregressive import AutoregressiveConfig

TOKENS, DIM, DRAWS = 24, 6, 6000


def lively(num_codes=8, num_ids=1, mesh=None, **keys):
    """A head with values as of a trained one, the same on any number of ranks; small, in float64."""
    config = BitsConfig(**{"width": 12, "num_layers": 2, **keys})
    head = Bits(num_codes, DIM, mesh, config=config, num_ids=num_ids, seed=1).double().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return head


def logits(head, seen, h_D):
    """Log-probabilities (bits, 2) of one token, some of its bits seen."""
    return head.net(torch.tensor([seen]), h_D[None])[0].log_softmax(1)


def nats_by_hand(head, bits, h_D):
    """-log p of a row of bits in the fixed order, written out."""
    total, first = 0.0, 0
    for count in head.reveal:
        seen = [bit if place < first else MASKED for place, bit in enumerate(bits)]
        p = logits(head, seen, h_D)
        total -= sum(p[place, bits[place]] for place in range(first, first + count))
        first += count
    return total


@pytest.mark.parametrize(("num_codes", "num_ids", "reveal"), [(8, 1, (1, 2)), (4, 2, (1, 1, 1, 1)), (4, 1, (2,))])
@torch.no_grad()
def test_held_out_nats_are_those_of_the_fixed_order_and_it_is_drawn_from(num_codes, num_ids, reveal):
    head, h_D = lively(num_codes, num_ids, reveal=reveal), normal(DIM, seed=3)
    every = torch.tensor(list(itertools.product(range(2), repeat=sum(reveal))))
    ids = head.join(every)
    assert torch.equal(head.split(ids), every)
    assert torch.equal(ids.reshape(len(every), -1)[-1], torch.full((num_ids,), num_codes - 1))
    found = head.losses(h_D.expand(len(every), -1), ids, right=True)
    close(found.whole_N, torch.stack([nats_by_hand(head, bits, h_D) for bits in every.tolist()]))
    assert torch.equal(found.whole_N, found.cross_entropy_N)
    p = (-found.whole_N).exp()
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-9)
    keys = noise.keys(4, torch.arange(DRAWS))
    drawn = head.sample_scored(h_D.expand(DRAWS, -1), keys)
    places = (head.split(drawn.ids_N)[:, None] == every).all(2).float().argmax(1)
    assert likely(*chi_square(places, p))
    close(drawn.log_p_N, p.log()[places])
    assert torch.equal(head.sample(h_D.expand(DRAWS, -1), keys), drawn.ids_N)
    greedy = head.sample(h_D[None], keys[:1], temperature=0.0)
    assert found.right_N.nonzero()[:, 0].tolist() == [int((head.split(greedy) == every).all(1).float().argmax())]


def outcomes(head, h_D, null_D, rule, seen=None, step=0):
    """{bits: probability} by going through everything that a step may draw; without noise in the order."""
    seen = seen or (MASKED,) * sum(head.reveal)
    if step == len(head.reveal):
        return {seen: 1.0}
    odds = logits(head, list(seen), h_D).diff(dim=1)[:, 0]
    if "guidance" in rule:
        null = logits(head, list(seen), null_D).diff(dim=1)[:, 0]
        odds = null + rule["guidance"] * (odds - null)
    odds = odds / rule.get("temperature", 1.0)
    found = {}
    masked = [place for place, bit in enumerate(seen) if bit == MASKED]
    for values in itertools.product(range(2), repeat=len(masked)):
        score = {place: float(F.logsigmoid(odds[place] * (2 * x - 1))) for place, x in zip(masked, values, strict=True)}
        p = 1.0
        for place, x in zip(masked, values, strict=True):
            p_one = float(torch.sigmoid(odds[place]))
            if max(p_one, 1 - p_one) >= rule.get("top_p", 2.0):
                p_one = float(p_one > 0.5)
            p *= p_one if x else 1 - p_one
        if p == 0:
            continue
        order = masked if head.config.order == "fixed" else sorted(masked, key=lambda place: (-score[place], place))
        chosen = {place: x for place, x in zip(masked, values, strict=True) if place in order[: head.reveal[step]]}
        after = tuple(chosen.get(place, bit) for place, bit in enumerate(seen))
        for bits, rest in outcomes(head, h_D, null_D, rule, after, step + 1).items():
            found[bits] = found.get(bits, 0.0) + p * rest
    return found


RULES = [{}, {"temperature": 1.4, "guidance": 1.8}, {"top_p": 0.95}]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("order", ["fixed", "confidence"])
@torch.no_grad()
def test_frequencies_are_those_of_the_order(order, rule):
    head, (h_D, null_D) = lively(8, reveal=(1, 2), order=order, order_noise=0.0), normal(2, DIM, seed=3)
    expected = outcomes(head, h_D, null_D, rule)
    every = list(itertools.product(range(2), repeat=3))
    p = torch.tensor([expected.get(bits, 0.0) for bits in every])
    assert 2 <= int((p > 0).sum()) < 8 or "top_p" not in rule
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-6)
    away = {"unguided_ND": null_D.expand(DRAWS, -1)} if "guidance" in rule else {}
    drawn = head.sample(h_D.expand(DRAWS, -1), noise.keys(4, torch.arange(DRAWS)), **rule, **away)
    assert likely(*chi_square(drawn, p))


@torch.no_grad()
def test_the_confident_bits_come_first_and_noise_changes_the_order_not_the_share():
    h_ND, keys = normal(1, DIM, seed=3).expand(2000, -1), noise.keys(4, torch.arange(2000))
    heads = [lively(16, reveal=(1, 1, 1, 1), order="confidence", order_noise=scale) for scale in (0.0, 50.0)]
    sure, loose = (head.sample_scored(h_ND, keys) for head in heads)
    assert not torch.equal(sure.ids_N, loose.ids_N)
    assert bool((sure.log_p_N <= 0).all())
    one = heads[0].net(torch.full((1, 4), MASKED), h_ND[:1])[0].log_softmax(1)
    seen_NS, score = torch.full((2000, 4), MASKED), one.max(1).values
    first = heads[0]._revealed(seen_NS == MASKED, score.expand(2000, -1), 1, keys, 0)
    assert first.float().mean(0).argmax() == score.argmax()
    assert (first.sum(1) == 1).all()
    scattered = heads[1]._revealed(seen_NS == MASKED, score.expand(2000, -1), 1, keys, 0)
    assert (scattered.float().mean(0) - 0.25).abs().max() < 0.06


def test_a_new_head_has_the_loss_log_K_in_training_and_evaluation():
    head = Bits(2**18, DIM, config=BitsConfig(width=12))
    ids = torch.randint(2**18, (TOKENS,), generator=torch.Generator().manual_seed(1))
    for mode in (head.train(), head.eval()):
        found = mode.losses(normal(TOKENS, DIM, seed=2).float(), ids)
        for part in (found.whole_N, found.cross_entropy_N):
            close(part.detach(), torch.full((TOKENS,), 18 * math.log(2)), 1e-5)


def test_bits_are_masked_as_the_law_says_and_seen_ones_weigh_a_tenth(monkeypatch):
    head = lively(16).train()
    torch.manual_seed(0)
    masked = head._mask(torch.zeros(20000, 16, dtype=torch.int64))
    counts = masked.sum(1)
    share = torch.sigmoid(0.8 * torch.randn(200000))
    expected = (16 * share).round().clamp(min=1)
    assert counts.min() >= 1
    for level in (2, 4, 8, 12):
        assert abs(float((counts <= level).double().mean() - (expected <= level).double().mean())) < 0.015
    assert (masked.double().mean(0) - masked.double().mean()).abs().max() < 0.015
    chosen = torch.tensor([[True, False, True, False]]).expand(3, -1)
    monkeypatch.setattr(head, "_mask", lambda true_NS: chosen)
    h, ids = normal(3, DIM, seed=2).requires_grad_(), torch.tensor([0, 7, 13])
    found = head.losses(h, ids, label_smoothing=0.2, z_loss=0.3)
    true = head.split(ids)
    l_NS2 = head.net(torch.where(chosen, MASKED, true), h)
    weight = torch.tensor([1.0, 0.1, 1.0, 0.1], dtype=torch.float64)
    nats = F.cross_entropy(l_NS2.transpose(1, 2), true, reduction="none")
    smooth = F.cross_entropy(l_NS2.transpose(1, 2), true, reduction="none", label_smoothing=0.2)
    whole = smooth + 0.3 * l_NS2.logsumexp(2).square()
    close(found.whole_N, 4 * (whole * weight).sum(1) / weight.sum())
    close(found.cross_entropy_N, 2 * (nats * chosen).sum(1).detach())
    found.whole_N.sum().backward()
    assert all(p.grad is not None for name, p in head.named_parameters() if "inputs" not in name)


def test_it_learns_what_binds_the_bits():
    """Two ids that differ in every bit: independent bits would cost two bits of entropy, the head finds one."""
    torch.manual_seed(1)
    head = Bits(4, DIM, config=BitsConfig(width=16, num_layers=1, reveal=(1, 1)), seed=1).train()
    ids, h = torch.arange(64) % 2 * 3, torch.ones(64, DIM)
    adam = torch.optim.Adam(head.parameters(), lr=1e-2)
    for _ in range(150):
        adam.zero_grad()
        head.losses(h, ids).whole_N.mean().backward()
        adam.step()
    nats = float(head.eval().losses(h, ids).cross_entropy_N.mean())
    assert nats == pytest.approx(math.log(2), abs=0.05)
    assert set(head.sample(h, noise.keys(1, torch.arange(64))).tolist()) == {0, 3}


def _on(codes):
    mesh, out = Mesh(1, codes), []
    for order in ("fixed", "confidence"):
        head = lively(8, 2, mesh, order=order)
        h, null = (mine(normal(TOKENS, DIM, seed=seed), mesh) for seed in (2, 3))
        ids = mine(torch.randint(8, (TOKENS, 2), generator=torch.Generator().manual_seed(1)), mesh)
        keys = mine(noise.keys(3, torch.arange(TOKENS)), mesh)
        found = head.losses(h.requires_grad_(), ids)
        (found.whole_N.mean() + head.embed(ids).square().mean()).backward()
        drawn = head.sample_scored(h, keys, temperature=0.9, unguided_ND=null, guidance=1.7)
        out.append((found.whole_N.detach(), *drawn, [p.grad for p in head.parameters()]))
        said = []
        for wrong in (8, -2):
            bad = torch.full((2, 2), wrong if mesh.codes.rank == codes - 1 else 0)
            for call in (head.embed, lambda bad, head=head: head.losses(torch.zeros(2, DIM).double(), bad)):
                with pytest.raises(ValueError, match="for there are 8 codes"):
                    call(bad)
        with pytest.raises(FloatingPointError, match="logits must be finite"):
            head.sample(h + (math.nan if mesh.codes.rank == codes - 1 else 0), keys)
        out[-1] += (said,)
    return out


@pytest.mark.parametrize("codes", CODES)
def test_it_is_the_same_on_any_number_of_processes_and_errors_reach_all(ranks, codes):
    results = ranks(codes, _on, codes)
    for place, (nats, ids, log_p, grads, _) in enumerate(_on(1)):
        got = [result[place] for result in results]
        close(torch.cat([part[0] for part in got]), nats)
        assert torch.equal(torch.cat([part[1] for part in got]), ids)
        close(torch.cat([part[2] for part in got]), log_p)
        for number, expected in enumerate(grads):
            close(sum(part[3][number] for part in got) / codes, expected)


def test_vectors_are_a_linear_map_of_the_bits_and_nobody_is_zero():
    head = lively(8)
    signs = torch.tensor([[-1.0, 1.0, -1.0], [1.0, 1.0, 1.0]]).double()
    close(head.embed(torch.tensor([2, 7])), head.inputs(signs))
    assert head.embed(torch.tensor([[-1, 3]])).shape == (1, 2, DIM)
    assert not head.embed(torch.tensor([-1])).any()
    assert lively(8, 2).embed(torch.tensor([[[1, 2]]])).shape == (1, 1, DIM)
    assert head.losses(torch.zeros(1, DIM).double(), torch.tensor([-1])).whole_N.tolist() == [0.0]
    assert not set_aside(torch.nn.ModuleList([head]))


def test_guidance_of_one_is_none_and_of_zero_is_the_null_condition():
    head, h, null = lively(8), normal(TOKENS, DIM, seed=2), normal(TOKENS, DIM, seed=3)
    keys = noise.keys(3, torch.arange(TOKENS))
    assert torch.equal(head.sample(h, keys, unguided_ND=null), head.sample(h, keys))
    assert torch.equal(head.sample(h, keys, unguided_ND=null, guidance=0.0), head.sample(null, keys))
    with pytest.raises(ValueError, match=r"guidance is 2.0, .* give unguided_ND"):
        head.sample(h, keys, guidance=2.0)
    for rule in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.5}):
        assert torch.equal(head.sample(h, keys, **rule), head.sample(h, keys + 1, **rule))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_codes": 12}, "num_codes is 12, and only 2, 4, 8"),
        ({"head": {"name": "bits", "reveal": [2, 1]}}, r"reveal \[2, 1\] has 3 bits, and a token has 4"),
        ({"head": {"name": "bits", "reveal": [4, 0]}}, "every step reveals at least one bit"),
        ({"num_ids": 2, "head": {"name": "bits", "reveal": [4]}}, "has 4 bits, and a token has 8"),
        ({"head": {"name": "bits", "unmasked_weight": 2.0}}, "unmasked_weight is 2.0"),
        ({"head": {"name": "bits", "width": 0, "order_noise": -1.0}}, "2 problems"),
    ],
)
def test_settings_that_are_none(keys, said):
    with pytest.raises(ValueError, match=said):
        parse(AutoregressiveConfig, {"name": "autoregressive", "num_codes": 16, "head": {"name": "bits"}, **keys})


def test_steps_and_sizes_of_the_published_head():
    config = parse(HeadConfig, {"name": "bits", "reveal": [2, 2, 5, 7]})
    assert config.steps(16) == (2, 2, 5, 7)
    assert BitsConfig().steps(18) == (4, 4, 5, 5)
    assert BitsConfig().steps(2) == (1, 1)
    with torch.device("meta"):
        head = Bits(2**16, 768, config=config)
    blocks = sum(p.numel() for block in head.net.blocks for p in block.parameters())
    # SwiGLU of 5461, adaLN of 3 x 2048 with biases, a norm
    assert blocks == 3 * (3 * 2048 * 5461 + 3 * 2048 * 2049 + 2048)
