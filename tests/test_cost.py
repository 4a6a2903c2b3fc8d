"""The cost model against the code: bytes of a real step to the byte, operations as the kernels do them, choices."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vqscale import quantizers
from vqscale.codes.rows import set_aside
from vqscale.engine.config import EngineConfig, OptimConfig
from vqscale.engine.engine import Engine
from vqscale.nets.config import ConvConfig
from vqscale.nets.conv import Decoder, Encoder
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.plan import cost, count, traffic
from vqscale.plan.machines import MACHINES, Wire
from vqscale.plan.traffic import Grid, Work
from vqscale.tokenizer.model import Tokenizer
from vqscale.train import loop
from vqscale.train.watch import Watch

NET = ConvConfig(
    channels=8, patch=2, multipliers=(1, 1), num_blocks=1, attention_levels=(), mid_attention=False, z_channels=8
)
NET = replace(NET, num_groups=4)
K, DIM, IMAGES, SIDE = 37, 6, 2, 16  # 4 x 4 tokens per image
STEPS = [(0, False), (0, True), (1, False)]  # (revive_every, does it log)
GRIDS = [(1, 4), (2, 2)]
CASES = [
    {"name": "ibq"},
    {"name": "ibq", "entropy_weight": 0.1, "similarity": "euclid", "temperature": 0.5},
    {"name": "vq"},
    {"name": "ema"},
]


def _sent(data, codes):
    """[(bytes by axis in a whole step, place in the code group, parameters)] for all CASES and STEPS."""
    mesh, watch, out = Mesh(data, codes), Watch(), []
    for case in CASES:
        for revive, logged in STEPS:
            settings = {"num_codes": K, "dim": DIM, "init": "normal", "revive_every": revive, **case}
            tokenizer = Tokenizer(NET, quantizers.build(settings, mesh))
            tables = set_aside(tokenizer)
            tokenizer.quantizer.begin()
            engine = Engine(tokenizer, loop.learned_rows(tables), EngineConfig("torch"), OptimConfig(), mesh, 10)
            images = torch.randn(IMAGES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(mesh.world.rank))
            watch.begin(logged)
            with ops.count_bytes() as sent:
                recon, quantized = engine(images)
                engine.backward((images - recon).square().mean() + sum(quantized.losses.values()))
                report = engine.step()
                for parameter, rows in tokenizer.quantizer.update(report.stepped):
                    engine.forget(parameter, rows)
                loop.agree(mesh, False, 0)
            watch.end(0.0)
            numel = sum(p.numel() for p in tokenizer.parameters() if p.requires_grad)
            out.append((dict(sent), mesh.codes.rank, numel))
    return out


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("grid", GRIDS)
def test_the_bytes_of_a_step_are_those_of_the_formulas(ranks, grid):
    for answers in ranks(4, _sent, *grid, timeout_s=240.0):
        for index, (sent, rank, parameters) in enumerate(answers):
            case, (revive, logged) = CASES[index // len(STEPS)], STEPS[index % len(STEPS)]
            work = Work(
                K, DIM, IMAGES * (SIDE // NET.strides[0]) ** 2, case["name"], "entropy_weight" in case,
                parameters=parameters, engine="torch", revive_every=revive,
            )  # fmt: skip
            mesh = Grid(*grid)
            planned = [*traffic.messages(work, mesh, rank=rank, logged=logged), *traffic.revival(work, mesh)]
            expected = {axis: nbytes for axis, nbytes in traffic.sent(planned, mesh).items() if nbytes}
            assert sent == expected, (case, revive, logged)


def test_the_walk_finds_the_products_that_the_scan_names():
    settings = {"name": "ibq", "num_codes": 4, "dim": 4}
    plain = count.code_axis(settings)
    assert plain.products == 6  # 2 of mix, 4 of its backward pass
    entropy = count.code_axis({**settings, "entropy_weight": 0.1})
    assert entropy.products == plain.products + 2  # column sums, and their mean in the backward pass
    assert entropy.passes > plain.passes
    assert entropy.exponentials > plain.exponentials > 0
    assert count.code_axis({"name": "vq", "num_codes": 4, "dim": 4}).products == 1
    begun = {"warmup_steps": 3, "landing_steps": 5, "init": "data"}
    assert count.code_axis({**settings, **begun}) == plain, "a warm-up and a landing are not what a step costs"


def test_passes_are_counted_by_tensor_and_views_are_free():
    x, y = torch.randn(2, 6, 7), torch.randn(7)
    with count.KernelCounter() as counted:
        x.transpose(1, 2).exp_()  # in and out
        (x[0] @ y[:, None]).relu()
        torch.addmm(x[0, :, :6], x[0], x[1].t())
    names = {kernel.name: kernel for kernel in counted.kernels}
    assert names["exp_"].sizes == (4 * 84, 4 * 84)
    assert names["mm"].operations == 2 * 6 * 7
    assert names["addmm"].operations == 2 * 6 * 6 * 7
    assert names["relu"].operations == 0
    assert "transpose" not in names


def test_the_network_is_counted_as_the_flop_counter_does():
    counted = count.network(NET, (SIDE, SIDE), DIM)
    encoder, decoder = Encoder(NET), Decoder(NET)
    latents = torch.randn(1, NET.z_channels, SIDE // NET.strides[0], SIDE // NET.strides[0])
    with FlopCounterMode(display=False) as flops:
        encoder(torch.randn(1, 3, SIDE, SIDE)), decoder(latents)
    around = 2 * 2 * counted.tokens * DIM * NET.z_channels  # two 1x1 convolutions
    assert counted.forward == flops.get_total_flops() + around
    # gradients of the input and of the weight, but none of the images
    assert counted.backward == 2 * counted.forward - 2 * (SIDE // 2) ** 2 * 12 * NET.channels * 9
    assert counted.parameters == sum(p.numel() for net in (encoder, decoder) for p in net.parameters()) + (
        NET.z_channels * DIM * 2 + DIM + NET.z_channels
    )


AXIS = count.CodeAxis(products=6, passes=30, exponentials=2)


def test_products_do_not_depend_on_the_split_and_fall_with_the_ranks_of_a_fixed_batch():
    weak = {cost.products(Work(2**16, 64, 512), grid, AXIS) for grid in traffic.grids(8)}
    assert weak == {6 * 2 * 512 * 2**16 * 64}
    strong = [cost.products(Work(2**16, 64, 512 // size), Grid(1, size), AXIS) for size in (1, 2, 4)]
    assert strong == [strong[0], strong[0] // 2, strong[0] // 4]


def test_rows_are_split_as_the_code_splits_them():
    from vqscale.codes.rows import Rows

    work = Work(K, DIM, 4)
    for size in (1, 2, 3, 5, 64):
        found = [traffic.rows(work, Grid(1, size), rank) for rank in range(size)]
        assert found == [Rows(K, size, rank).count for rank in range(size)]
        assert max(found) == traffic.rows(work, Grid(1, size))


def test_a_step_that_does_not_fit_says_so_and_more_ranks_make_it_fit():
    work = Work(2**28, 256, 256, revive_every=0)
    steps = [cost.predict(work, grid, MACHINES["h100"], AXIS) for grid in traffic.grids(64)]
    assert [step.fits for step in steps] == [False, False, False, False, False, True, True]
    assert steps[0].memory["rows"] == 4 * 2**28 * 256


def test_the_split_trades_rows_on_the_data_axis_for_tokens_on_the_code_axis():
    work = Work(2**18, 256, 8192, revive_every=0)
    few, many = (cost.predict(work, Grid(8 // size, size), MACHINES["h200"], AXIS) for size in (2, 8))
    assert few.sent["data"] > many.sent["data"] == 0
    assert few.sent["codes"] < many.sent["codes"]
    assert few.products == many.products
    assert few.total == pytest.approx(sum(few.seconds.values()))


def test_wires_leave_the_node_where_the_group_does():
    machine = MACHINES["h100"]
    assert machine.wire("gather", 8, 1) == machine.inside
    assert machine.wire("all_reduce", 2, 8) == machine.between  # one rank per node, every eighth
    assert machine.wire("all_reduce", 16, 1).bytes_per_s == 8 * machine.between.bytes_per_s
    assert Wire(1e-5, 1e9).seconds(10**6, 4) == pytest.approx(2e-5 + 1e-3)


@pytest.mark.parametrize("temperature", [0.01, 0.03, 0.3])
def test_tiles_that_hold_a_probability_are_about_as_many_as_there_are(temperature):
    codes, tokens, wide = 2**16, 256, 64
    logits = torch.randn(tokens, codes, generator=torch.Generator().manual_seed(1))
    bits = (logits - logits.amax(1, keepdim=True)) / temperature / math.log(2)
    live = (bits > -56).unflatten(1, (-1, wide)).any(2).unflatten(0, (-1, 128)).any(1)
    assert cost.live_tiles(codes, temperature, 128 * wide) == pytest.approx(float(live.double().mean()), abs=0.1)


def test_the_entropy_costs_what_its_temperature_leaves_of_it():
    low, high = (
        Work(2**18, 256, 4096, "ibq", True, codes_precision="medium", entropy_temperature=t) for t in (0.01, 1.0)
    )
    found = [cost.on_machine(AXIS, work, MACHINES["h100"]).exponentials for work in (low, high)]
    assert found == [pytest.approx(2.9, abs=0.1), 6.0]
    assert cost.on_machine(AXIS, replace(low, entropy=False), MACHINES["h100"]).exponentials == 2


def test_of_the_products_of_a_step_on_a_gpu_two_are_the_librarys():
    work, machine = Work(2**18, 256, 4096, codes_precision="medium"), MACHINES["h200"]
    assert cost.on_machine(AXIS, work, machine).products == 6
    assert cost.on_machine(AXIS, replace(work, entropy=True), machine).products == 8
    product = 2 * 4096 * 2**18 * 256 / 1e12
    seconds = 6 * product / cost.codes_rate(work, machine)
    assert seconds == pytest.approx(4 * product / (0.6 * 700) + 2 * product / 700)
    assert seconds == pytest.approx(6.8e-3, rel=0.01)
    assert cost.codes_rate(replace(work, quantizer="vq"), machine) == pytest.approx(0.6 * 700)


def test_scores_in_float8_take_half_where_a_machine_has_it():
    work, product = Work(2**18, 256, 4096, codes_precision="low"), 2 * 4096 * 2**18 * 256 / 1e12
    rates = {"h200": 700, "a100-80": 240}
    for entropy, kernels, scores in ((False, 4, 2), (True, 6, 4)):
        low = replace(work, entropy=entropy)
        for name, saved in (("h200", scores / 2), ("a100-80", 0)):
            seconds = (kernels + 2) * product / cost.codes_rate(low, MACHINES[name])
            assert seconds == pytest.approx(((kernels - saved) / 0.6 + 2) * product / rates[name])
    search = replace(work, quantizer="vq")  # of which no score is in float8
    assert cost.codes_rate(search, MACHINES["h200"]) == pytest.approx(0.6 * 700)
