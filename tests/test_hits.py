"""Hits of codes without a table: the same numbers as a dictionary of all ids gives, for any K, on any grid of ranks."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from whole import FOUR, GRIDS, mine, normal

from vqscale import config as configuration
from vqscale import quantizers
from vqscale.codes.rows import set_aside
from vqscale.codes.usage import DENSE_MOST, Hits, Usage
from vqscale.nets.config import ConvConfig
from vqscale.parallel.mesh import Mesh
from vqscale.plan.tokenizer import plan
from vqscale.show import pictures
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.config import TokenizerRun
from vqscale.train.evaluate import evaluate

SIZES = [3, 50, DENSE_MOST, DENSE_MOST + 1, 2**62]
WIDER = [*GRIDS, pytest.param((4, 1), marks=FOUR)]


def _ids(num_codes, turn):
    """40 tokens, some of them padding; large ids beside small ones that come again and again."""
    generator = torch.Generator().manual_seed(turn)
    ids = torch.randint(min(num_codes, 7), (40,), generator=generator)
    ids[::5] = num_codes - 1 - torch.randint(min(num_codes, 3), (8,), generator=generator)
    ids[3::11] = -1
    return ids


def _expected(num_codes, turns):
    taken = Counter(int(number) for turn in turns for number in _ids(num_codes, turn) if number >= 0)
    total = sum(taken.values())
    entropy = -sum(n / total * math.log(n / total) for n in taken.values())
    return taken, {
        "usage": len(taken) / num_codes,
        "perplexity": math.exp(entropy),
        "dead": float(num_codes - len(taken)),
    }


def _count(data, codes):
    mesh, out = Mesh(data, codes), {}
    for num_codes in SIZES:
        hits = Hits(num_codes, mesh)
        empty = {key: float(value) for key, value in hits.usage().items()}
        for turn in range(3):
            hits.add(mine(_ids(num_codes, turn), mesh))
        per_code = hits.per_code() if num_codes != DENSE_MOST else None
        out[num_codes] = (empty, {key: float(value) for key, value in hits.usage().items()}, per_code)
    return out


@pytest.mark.parametrize("grid", WIDER)
def test_hits_are_those_of_all_tokens_of_all_ranks(ranks, grid):
    for result in ranks(grid[0] * grid[1], _count, *grid):
        for num_codes in SIZES:
            taken, usage = _expected(num_codes, range(3))
            empty, got, per_code = result[num_codes]
            assert empty == {"usage": 0, "perplexity": 1, "dead": float(num_codes)}
            assert got == pytest.approx(usage, rel=1e-12)
            if num_codes < DENSE_MOST:
                assert per_code.tolist() == [taken[number] for number in range(num_codes)]
            elif per_code is not None:
                assert sorted(per_code.tolist()) == sorted(taken.values())


def _held(codes):
    """How many numbers a rank holds after counting 40 different ids of 2^62."""
    mesh = Mesh(1, codes)
    hits = Hits(2**62, mesh)
    hits.add(mine(torch.arange(40) * 7 + 2**61, mesh))
    return len(hits._ids)


@pytest.mark.dist
def test_no_rank_holds_all_ids(ranks):
    assert ranks(4, _held, 4) == [10, 10, 10, 10]


def _watched(data, codes, num_codes):
    mesh = Mesh(data, codes)
    usage, out = Usage(num_codes, mesh, 0.5), []
    out.append(usage.observe(mine(_ids(num_codes, 0).abs(), mesh)))  # nobody drives: of this batch
    usage.begin()
    for step in range(4):
        for micro in range(2):
            out.append(usage.observe(mine(_ids(num_codes, 10 * step + micro).abs(), mesh)))
        usage.update(stepped=step != 2)
    out.append(usage.eval().observe(mine(_ids(num_codes, 0).abs(), mesh)))
    return [
        {key: float(value) for key, value in stats.items()} for stats in out
    ], usage.window and usage.window.counts_k


@pytest.mark.parametrize("grid", WIDER)
def test_usage_in_training_is_of_a_window_where_there_is_one(ranks, grid):
    def alone(turn):
        taken = Counter(_ids(50, turn).abs().tolist())
        return taken, math.exp(-sum(n / 40 * math.log(n / 40) for n in taken.values()))

    first, window = _watched(1, 1, 50)[0], torch.zeros(50, dtype=torch.float64)
    for step in (0, 1, 3):  # the step that was skipped leaves no trace
        counts = sum(torch.bincount(_ids(50, 10 * step + micro).abs(), minlength=50) for micro in range(2))
        window = 0.5 * window + 0.5 * counts
    results = ranks(grid[0] * grid[1], _watched, *grid, 50)
    whole = torch.cat([part[1] for part in results[: grid[1]]])
    torch.testing.assert_close(whole.double(), window)
    for stats, _ in results:
        assert stats == [pytest.approx(one, rel=1e-6) for one in first]
        for at in (0, -1):
            assert stats[at]["perplexity"] == pytest.approx(alone(0)[1])
            assert stats[at]["dead"] == 50 - len(alone(0)[0])
        assert stats[1]["usage"] == 0  # nothing has been updated yet


def _large(data, codes):
    stats, window = _watched(data, codes, 2**40)
    return stats, window is None


@pytest.mark.parametrize("grid", WIDER)
def test_usage_of_too_many_codes_is_of_the_global_batch(ranks, grid):
    turns = [0, 0, 1, 10, 11, 20, 21, 30, 31, 0]
    for stats, none in ranks(grid[0] * grid[1], _large, *grid):
        assert none
        for one, turn in zip(stats, turns, strict=True):
            taken = Counter(_ids(2**40, turn).abs().tolist())
            assert one["perplexity"] == pytest.approx(math.exp(-sum(n / 40 * math.log(n / 40) for n in taken.values())))
            assert one["dead"] == 2**40 - len(taken)


@pytest.mark.parametrize(
    ("config", "tables"),
    [
        ({"name": "fsq", "levels": "fsq-2^12"}, ["usage.window"]),
        ({"name": "lfq", "dim": 22}, ["usage.window"]),
        ({"name": "bsq", "dim": 23}, []),
        ({"name": "fsq", "levels": [4] * 31}, []),
    ],
)
def test_what_is_set_aside_is_a_window_and_nothing_learned(config, tables):
    quantizer = quantizers.build(config)
    found = set_aside(quantizer)
    assert list(found) == tables
    assert not any(list(table.parameters()) for table in found.values())
    assert all(name.startswith("whitening.") for name in quantizer.state_dict())
    with torch.device("meta"):
        planned = quantizers.build(config, Mesh(device="meta"))
    assert all(buffer.is_meta for buffer in planned.buffers())


@pytest.mark.parametrize("name", ["fsq", "lfq", "bsq"])
def test_a_state_continues_in_another_quantizer(name):
    def drive(quantizer, steps):
        quantizer.begin()
        for step in steps:
            out = quantizer(normal(6, quantizer.dim, seed=step).float())
            quantizer.update()
        return [float(value) for value in out.stats.values()]

    first, second = quantizers.build({"name": name}), quantizers.build({"name": name})
    drive(first, range(4))
    second.load_state_dict(first.state_dict())
    assert drive(second, range(4, 8)) == drive(first, range(4, 8))


@pytest.mark.parametrize(("settings", "numbers"), [("{name: fsq, levels: fsq-2^16}", 2), ("{name: bsq, dim: 40}", 82)])
def test_a_run_without_rows_is_planned(settings, numbers):
    quickstart = Path(__file__).parent.parent / "configs" / "quickstart" / "tokenizer.yaml"
    config = configuration.load(TokenizerRun, quickstart, [f"tokenizer.quantizer={settings}", "mesh.codes=4"])
    costs = plan(config, 4)
    assert costs.parameters["codebook"] == 0
    assert costs.parameters["quantizer"] == 0
    # the window of 64,000 codes has a few numbers for each, cut in four; 2^40 codes have none
    held = costs.memory["rows, their gradients and moments"] / (64_000 // 4 * 4)
    assert held in (1, 2, 3, 4) if "fsq" in settings else held == 0
    tokens = config.data.batch // 4 * (config.data.train.image_size // config.tokenizer.net.strides[0]) ** 2
    assert costs.sent["code axis: tokens (does not grow with K)"] == 4 * tokens * numbers * 3
    assert costs.sent["data axis: gradients of rows"] == 0


def _batches(mesh, seeds):
    for seed in seeds:
        images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        valid = torch.tensor([True, True, True, seed != seeds[-1]])
        yield SimpleNamespace(samples=mine(images, mesh), valid=mine(valid, mesh))


def _evaluated(data, codes, config):
    mesh, shown = Mesh(data, codes), {}
    torch.manual_seed(1)
    net = ConvConfig(channels=8, multipliers=(1, 1, 1), num_blocks=1, attention_levels=(), z_channels=6, num_groups=4)
    tokenizer = Tokenizer(net, quantizers.build(config, mesh))
    set_aside(tokenizer)
    stream = SimpleNamespace(batch=4, batches=lambda: _batches(mesh, [1, 2, 3]))
    board = SimpleNamespace(
        histogram=lambda step, name, values: shown.update(hits=values),
        images=lambda step, name, draw: shown.update({name: draw()}),
    )
    scores = evaluate(tokenizer, tokenizer, stream, mesh, most=0, board=board, step=7)
    ids = [tokenizer.encode(batch.samples)[batch.valid].flatten() for batch in _batches(mesh, [1, 2, 3])]
    return scores, shown["hits"], torch.cat(ids), shown["usage"].shape


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(1, 1), pytest.param((2, 2), marks=pytest.mark.dist)])
@pytest.mark.parametrize("config", [{"name": "fsq", "levels": [3, 3, 3]}, {"name": "lfq", "dim": 62, "group_bits": 8}])
def test_an_evaluation_counts_any_number_of_codes(ranks, grid, config):
    results = ranks(grid[0] * grid[1], _evaluated, *grid, config)
    num_codes = quantizers.build(config).num_codes
    taken = Counter(torch.cat([ids for _, _, ids, _ in results]).tolist())
    tokens = sum(taken.values())
    assert tokens == 11 * 16, "one image of the last batch is padding"
    for scores, hits, _, picture in results:
        assert scores["images"] == 11
        assert scores["usage"] == pytest.approx(len(taken) / num_codes)
        assert scores["dead"] == float(num_codes - len(taken))
        entropy = -sum(n / tokens * math.log(n / tokens) for n in taken.values())
        assert scores["perplexity"] == pytest.approx(math.exp(entropy))
        assert sorted(n for n in hits.tolist() if n) == sorted(taken.values())
        assert len(hits) == (num_codes if num_codes < 100 else len(taken))
        assert picture == pictures.usage(hits).shape
