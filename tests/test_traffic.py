"""What a training step of IBQ sends on the code axis, and what memory it takes: neither knows tokens x K."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from whole import normal

from vqscale import quantizers
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh

TOKENS, DIM = 16, 8
SIZES = [2**10, 2**13, 2**16]


def _sent(data, codes):
    """Bytes that this rank sends in one driven training step: forward, backward and update."""
    mesh = Mesh(data, codes)
    out = {}
    for num_codes in SIZES:
        config = {"name": "ibq", "num_codes": num_codes, "dim": DIM, "init": "normal", "entropy_weight": 0.1}
        quantizer = quantizers.build({**config, "revive_every": 0}, mesh)
        quantizer.begin()
        x = normal(TOKENS, DIM, seed=mesh.world.rank).float().requires_grad_()
        with ops.count_bytes() as sent:
            answer = quantizer(x)
            (sum(answer.losses.values()) + answer.z.sum()).backward()
            quantizer.update()
        out[num_codes] = dict(sent)
    return out


def _formula(codes):
    """What the step has to send on the code axis, with N tokens of D numbers per rank, as rings send it.

    A gather or a reduce-scatter of a part sends it (M - 1) times; an all-reduce of the M parts sends twice that.
    """
    once = codes - 1
    number, ident = 4, 8
    # x to all, mean rows back, chosen rows back; their gradients to all, the gradient of x back, that of chosen rows
    vectors = 6 * TOKENS * DIM * number * once
    # forward: best score, best id, two numbers of each of two softmaxes; the ids, to be counted
    merged = 2 * TOKENS * (number + ident + 2 * number + 2 * number) * once
    ids = TOKENS * ident * once
    # backward: the mean of the columns' gradient (all-reduce), two numbers per token that arrive from above (gather)
    returned = (2 * TOKENS * number + 2 * TOKENS * number) * once
    # usage (three float64), the norm of the rows, the entropy of the mean and its gradient: single numbers
    single = sum(2 * once * size // codes for size in (3 * 8, 4, 4, 4))
    return vectors + merged + ids + returned + single


@pytest.mark.dist
@pytest.mark.parametrize("codes", [2, 4])
def test_the_bytes_of_a_step_do_not_know_K(ranks, codes):
    for sent in ranks(codes, _sent, 1, codes):
        assert sent == {num_codes: {"codes": _formula(codes)} for num_codes in SIZES}


@pytest.mark.dist
def test_replicas_exchange_columns_and_counts(ranks):
    # the data axis carries one number per row of this rank for the mean probability, its gradient, and the counts
    for sent in ranks(4, _sent, 2, 2):
        for num_codes in SIZES:
            assert sent[num_codes]["codes"] == _formula(2)
            rows = num_codes // 2
            assert sent[num_codes]["data"] == rows * (4 + 4 + 8)


@pytest.mark.dist
def test_searching_sends_tokens_and_ids(ranks):
    for sent in ranks(2, _searched):
        vectors, numbers = TOKENS * DIM * 4, TOKENS * (8 + 8) * 2  # scores in float64
        # and a number or two by which all ranks know whether a latent is not finite, or an id none
        assert sent == ({"codes": vectors + numbers + 8}, {"codes": TOKENS * 8 + vectors + 16})


def _searched():
    quantizer = quantizers.build({"name": "ibq", "num_codes": 1000, "dim": DIM}, Mesh(1, 2))
    with ops.count_bytes() as search:
        ids = quantizer.encode(normal(TOKENS, DIM, seed=1).float())
    with ops.count_bytes() as lookup:
        quantizer.decode(ids)
    return dict(search), dict(lookup)


def _status(key):
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def _peak(num_codes, dim, tokens, scan_mib):
    """(highest resident MiB of this process in one training step with the entropy loss, MiB above those before it)."""
    mesh = Mesh(1, 2)
    # A process of the pool has a past: 5 resets its high-water mark to what it has now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    config = {"name": "ibq", "num_codes": num_codes, "dim": dim, "init": "normal", "entropy_weight": 0.05}
    quantizer = quantizers.build({**config, "scan_mib": scan_mib}, mesh)
    quantizer.begin()
    x = normal(tokens, dim, seed=mesh.world.rank).float().requires_grad_()
    answer = quantizer(x)
    (sum(answer.losses.values()) + answer.z.square().mean()).backward()
    ((parameter, _),) = quantizer.update()
    assert torch.isfinite(x.grad).all()
    assert parameter.grad.shape == (num_codes // 2, dim)
    return _status("VmHWM"), _status("VmHWM") - before


ON_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@pytest.mark.slow
@pytest.mark.dist
@ON_LINUX
def test_a_quarter_of_a_million_codes_fit_into_two_gibibytes(ranks):
    """K = 2^18, D = 256, 512 tokens per rank; the dense form takes 36 bytes per token and code, 4.5 GiB per rank.

    Its 0.75 TFLOP per rank are a quarter of a minute of one core.
    """
    for peak, _ in ranks(2, _peak, 2**18, 256, 512, 64, timeout_s=500.0):
        assert peak < 2048


@pytest.mark.dist
@ON_LINUX
def test_memory_does_not_grow_with_tokens_times_codes(ranks):
    """One tensor of all tokens x the rows of a rank would be 128 MiB here; the blocks have 4 MiB, the table 1 MiB."""
    for _, more in ranks(2, _peak, 2**16, 8, 512, 4):
        assert more < 64
