"""Gradients are reduced beside the backward pass, and stepped when all are there: by what DeepSpeed would let wait for
what on a GPU (streams.py), under the settings of one."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import engines
import pytest
import torch
from begun import in_a_begun_process
from torch import distributed, nn

from vqscale.engine import zero
from vqscale.engine.config import EngineConfig, OptimConfig
from vqscale.engine.engine import Engine
from vqscale.parallel.mesh import Mesh
from vqscale.parallel.spawn import run

LAYERS, WIDTH, STEPS = 24, 32, 3
LARGE = 8 * WIDTH  # of one layer: its matrices are larger than a bucket
KINDS = [(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")]


class Marked(torch.autograd.Function):
    """The identity; says when the backward pass of what comes before begins."""

    @staticmethod
    def forward(ctx, x, name, device):
        ctx.said = name, device
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        name, device = ctx.said
        device.do(f"backward {name}")
        return g, None, None


class Net(nn.Module):
    def __init__(self, device):
        super().__init__()
        self._device = device
        sizes = [WIDTH] * (LAYERS // 2) + [LARGE] + [WIDTH] * (LAYERS - LAYERS // 2)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(sizes))

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = Marked.apply(torch.tanh(layer(x)), number, self._device)
        return x


def _as_on_a_gpu(mesh):
    return SimpleNamespace(device=torch.device("cuda"), world=mesh.world)


def _noted(collective):
    """The same; where DeepSpeed has streams, it is work of the one that is current."""

    def call(tensor, *args, **given):
        device = sys.modules["deepspeed.accelerator.real_accelerator"].ds_accelerator
        if tensor.numel() > 4 and hasattr(device, "do"):  # no norm, no flag
            device.do("reduce")
        return collective(tensor, *args, **given)

    return call


def _given(stage, precision, buckets):
    """What the last of some steps gave to the device, in order; and the parameters afterwards."""
    mesh = Mesh(2, 1)
    zero._import(mesh.device)
    from deepspeed.accelerator import real_accelerator
    from streams import Device

    device, usual = Device(), zero.settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_accelerator, "ds_accelerator", device)
        patch.setattr(torch.Tensor, "record_stream", lambda *_: None)
        patch.setattr(zero, "BUCKETS", buckets)
        patch.setattr(zero, "settings", lambda config, count, mesh: usual(config, count, _as_on_a_gpu(mesh)))
        config = EngineConfig(name="deepspeed", zero_stage=stage, precision=precision)
        torch.manual_seed(0)
        engine = Engine(Net(device), {}, config, OptimConfig(**engines.OPTIM), mesh, STEPS)
        adam = engine.dense._adam
        patch.setattr(adam, "step", _before(lambda: device.do("step"), adam.step))
        for number in range(STEPS):
            device.done.clear()
            x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * number + mesh.world.rank))
            engine.backward(engine(x).square().mean())
            engine.step()
        return _seen(device.done), engines.state(engine)[0]


def _before(first, then):
    def call(*args, **given):
        first()
        return then(*args, **given)

    return call


def _seen(done):
    """(reductions before the step, those of them that some of the backward pass is beside, whether each waits for what
    it sends, whether the step waits for all of them)"""
    at = next(number for number, work in enumerate(done) if work.name == "step")
    backward = [work for work in done[:at] if work.name.startswith("backward")]
    assert [work.name for work in backward] == [f"backward {number}" for number in reversed(range(LAYERS))]
    reductions = [work for work in done[:at] if work.name == "reduce"]
    beside = [each for each in reductions if any(each.beside(other) for other in backward)]
    # a bucket is sent when the next layer's gradient finds no room in it: that layer alone may be under way
    sent = [{other for other in backward if other.number < each.number} for each in reductions]
    waits = [
        layers - {max(layers, key=lambda work: work.number)} <= each.before
        for each, layers in zip(reductions, sent, strict=True)
    ]
    return len(reductions), len(beside), all(waits), set(reductions) <= done[at].before


def _all():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "reduce", "reduce_scatter_tensor"):  # DeepSpeed keeps some when it joins a group
            collective = getattr(distributed, name)
            patch.setattr(distributed, name, _noted(collective))
        return [[_given(stage, precision, buckets) for buckets in (zero.BUCKETS, 1)] for stage, precision in KINDS]


@pytest.fixture(scope="module")
def answers():
    return run(in_a_begun_process, 2, _all, timeout_s=400.0)


@pytest.mark.slow
@pytest.mark.dist
def test_reductions_run_beside_the_backward_pass_and_the_step_waits_for_them(answers):
    for answer in answers:
        for kind, (several, one) in zip(KINDS, answer, strict=True):
            number, beside, *waits = several[0]
            assert number >= zero.BUCKETS, kind
            assert beside >= number * 2 // 3, kind  # but for the last, and those that the large matrices follow at once
            assert waits == [True, True], kind
            assert one[0][1:] == (0, True, True), f"{kind}: a bucket of all waits for the end"
            assert all(torch.equal(x, one[1][name]) for name, x in several[1].items()), kind
