"""What heads cost, as it is planned: operations and parameters by arithmetic, of flat, factorised and bits."""

from __future__ import annotations

import pytest

from vqscale import config as configuration
from vqscale import priors
from vqscale.codes.rows import set_aside
from vqscale.engine import optimisers
from vqscale.plan.prior import plan
from vqscale.train.config import Run

D, T, K = 64, 16, 4096
NET = {"width": D, "num_layers": 2, "num_heads": 1, "ffn_multiple": 8}
CONFIG = {
    "task": "prior",
    "run": {"folder": "nowhere", "steps": 3},
    "data": {"batch": 8, "train": {"path": "nowhere"}},
    "engine": {"name": "torch"},
}


def costs(head, codes=1, num_ids=1, num_codes=K, batch=8):
    prior = {"num_codes": num_codes, "num_ids": num_ids, "grid": [4, 4], "num_classes": 2, "net": NET, "head": head}
    data = {**CONFIG["data"], "batch": batch}
    return plan(configuration.parse(Run, {**CONFIG, "data": data, "prior": prior, "mesh": {"codes": codes}}), codes)


def sampled(found):
    return next(n for name, n in found.operations.items() if name.startswith("sampling") and name.endswith("head"))


def block(width, positions):
    """Products of one block of attention and SwiGLU on `positions` tokens that see each other."""
    ffn = -(-int(8 * width / 3) // 8) * 8
    return positions * (2 * 4 * width * width + 2 * 3 * width * ffn) + 2 * 2 * positions * positions * width


def test_flat_and_digits_cost_their_rows():
    flat, digits = costs({"name": "flat"}), costs({"name": "factorised", "factors": [64, 64], "within": None})
    assert flat.operations["training: head"] == T * 3 * 2 * K * D
    assert digits.operations["training: head"] == T * 3 * 2 * 128 * D
    assert sampled(flat) == T * 2 * K * D
    assert sampled(digits) == T * 2 * 128 * D
    tables = {name: n for name, n in digits.parameters.items() if name.startswith("head.")}
    assert sum(tables.values()) == 2 * 128 * D
    assert digits.memory["rows, their gradients and moments"] == 4 * 4 * 2 * 128 * D
    assert not any("head's network" in name for name in digits.memory)
    kept = "exponentials of the head's logits"
    assert (flat.memory[kept], digits.memory[kept]) == (4 * 8 * T * K, 4 * 8 * T * 64)


def test_where_the_exponentials_are_too_many_the_logits_are_made_again():
    found = costs({"name": "flat", "scan_mib": 1}, num_codes=2**18, batch=16)
    assert found.operations["training: head"] == T * 4 * 2 * 2**18 * D
    assert not any("exponentials" in name for name in found.memory)


def test_the_transformer_over_digits_is_counted():
    within = {"num_layers": 2, "ffn_multiple": 8}
    found = costs({"name": "factorised", "factors": [64, 64], "within": within})
    assert found.operations["training: head"] == T * (3 * 2 * 128 * D + 3 * 2 * block(D, 2))
    assert sampled(found) == T * (2 * 128 * D + 2 * block(D, 2))
    assert any("head's network, 128 tokens" in name and n > 0 for name, n in found.memory.items())
    several = costs({"name": "factorised", "within": within}, num_ids=3, num_codes=32)
    assert several.operations["training: head"] == T * (3 * 2 * 96 * D + 3 * 2 * block(D, 3))


def test_bits_cost_their_network_in_every_step_and_send_nothing():
    found = costs({"name": "bits", "width": 24, "num_layers": 2, "reveal": [4, 8]}, codes=2)
    each = 2 * (24 * 24 + 24 * D + 2 * (3 * 24 * 64 + 3 * 24 * 24) + 2 * 24 * 24 + 24 * 24)
    assert found.operations["training: head"] == T * 3 * each
    assert sampled(found) == T * 2 * each
    assert found.memory["rows, their gradients and moments"] == 0
    assert found.sent["tokens of the head (code axis)"] == 0


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimiser_is_priced_by_what_it_remembers(name):
    prior = {"num_codes": 50, "grid": [2, 2], "num_classes": 2, "net": NET}
    config = configuration.parse(Run, {**CONFIG, "prior": prior, "optim": {"name": name}})
    made = priors.build(config.prior)
    set_aside(made)
    dense = list(made.parameters())
    optimiser = optimisers.build(made, config.optim)
    optimiser.prepare(dense)
    moments = sum(x.numel() for p in dense for x in optimiser.moments(p).values())
    numbers = sum(p.numel() for p in dense)
    assert plan(config, 1).memory["transformer, classes (torch)"] == 4 * (2 * numbers + moments)
    assert moments == 2 * numbers if name == "adamw" else numbers < moments < 1.2 * numbers


@pytest.mark.parametrize("codes", [1, 2])
def test_what_is_sent_grows_with_the_digits_and_not_with_their_values(codes):
    sent = [
        costs(head, codes).sent["tokens of the head (code axis)"]
        for head in ({"name": "flat"}, {"name": "factorised", "factors": [64, 64]})
    ]
    assert sent[1] == 2 * sent[0]
    assert (sent[0] > 0) == (codes > 1)
