"""torch.compile takes a quantizer's training step, and a tokenizer's with it in the middle, as one graph: no break, the
same numbers and gradients.

Traced without a compiler (backend aot_eager). The search, the mixtures and the spans of the clock are inside. On a CPU
a mixture reads on the host which of its blocks are sparse: there the graph breaks, and the numbers are the same.
"""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from replayed import dense_blocks
from torch._dynamo.testing import CompileCounter

from vqscale import quantizers
from vqscale.codes import tally
from vqscale.codes.constant import constant_result
from vqscale.nets.config import ConvConfig
from vqscale.parallel.clock import clock
from vqscale.tokenizer.model import Tokenizer

TABLE = {"num_codes": 40, "dim": 6}
CASES = {
    "vq": {"name": "vq", **TABLE},
    "vq rotation": {"name": "vq", **TABLE, "gradient": "rotation", "similarity": "cosine"},
    "ema": {"name": "ema", **TABLE},
    "simvq": {"name": "simvq", **TABLE},
    "fsq": {"name": "fsq", "levels": [8, 5, 5]},
    "lfq": {"name": "lfq", "num_codes": 64},
    "bsq": {"name": "bsq", "num_codes": 64},
    "ibq": {"name": "ibq", **TABLE},
    "ibq entropy": {"name": "ibq", **TABLE, "similarity": "euclid", "entropy_weight": 0.1},
}


@pytest.fixture
def _as_on_a_gpu(monkeypatch):
    dense_blocks(monkeypatch)
    monkeypatch.setattr(clock, "on", True)
    torch._dynamo.reset()
    yield
    clock.take()
    torch._dynamo.reset()


OTHERS = [(case, True) for case in CASES if case != "vq"]


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize(
    ("case", "training"),
    [
        ("vq", True),
        *(pytest.param(*given, marks=pytest.mark.slow) for given in [*OTHERS, ("vq", False), ("ema", False)]),
    ],
)
def test_one_graph(case, training):
    _compare(case, training, fullgraph=True)


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_a_training_that_is_noted_is_a_graph_for_each_part_of_its_beginning():
    """Warm-up, landing and after, each once, though the share of a landing changes with every step."""
    settings = {"name": "vq", **TABLE, "init": "data", "warmup_steps": 2, "landing_steps": 4, "revive_every": 2}
    plain, compiled = (quantizers.build(settings, seed=0).train() for _ in range(2))
    counter, shares = CompileCounter(), []
    whole = torch.compile(compiled, fullgraph=True, dynamic=False, backend=counter)
    for quantizer in (plain, compiled):
        quantizer.begin()
    for x_ND in torch.randn(9, 12, plain.dim):
        compiled.note()
        with tally.silent():
            answer, expected = whole(x_ND), plain(x_ND)
        shares.append(plain.upkeep.landing)
        torch.testing.assert_close(answer.z, expected.z)
        torch.testing.assert_close(answer.losses, expected.losses)
        for quantizer in (plain, compiled):
            quantizer.update()
    assert shares == [0.0, 0.0, 0.2, 0.4, pytest.approx(0.6), 0.8, 1.0, 1.0, 1.0]
    assert counter.frame_count == 3


TINY = ConvConfig(
    channels=8, multipliers=(1,), num_blocks=1, attention_levels=(), mid_attention=False, z_channels=8, num_groups=4
)


@pytest.mark.slow
@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("case", ["ibq entropy", "vq rotation", "fsq"])
def test_a_whole_step_of_a_tokenizer_is_one_graph(case):
    plain = Tokenizer(TINY, quantizers.build(CASES[case], seed=0), "rms").train()
    compiled, images, found = copy.deepcopy(plain), torch.rand(2, 3, 8, 8), []

    def step(tokenizer, images):
        recon, quantized = tokenizer(images)
        loss = torch.stack([(recon - images).abs().mean(), *quantized.losses.values()]).sum()
        return recon, quantized.ids, loss

    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    for tokenizer, function in ((plain, step), (compiled, whole)):
        tokenizer.quantizer.begin()
        recon, ids, loss = function(tokenizer, images)
        loss.backward()
        grads = {name: p.grad for name, p in tokenizer.named_parameters() if p.grad is not None}
        found.append({"recon": recon, "ids": ids, "loss": loss, **grads})
    assert found[0].keys() == found[1].keys()
    assert any(name.startswith("encoder") for name in found[0])
    for name, x in found[0].items():
        torch.testing.assert_close(found[1][name], x, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ibq", "ibq entropy"])
def test_on_a_cpu_a_mixture_breaks_the_graph_and_says_the_same(case):
    torch._dynamo.reset()
    _compare(case, training=True, fullgraph=False)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=r"(?i)data-dependent"):
        _compare(case, training=True, fullgraph=True)
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_mark_of_a_constant_is_that_of_the_compiler_and_is_given_without_it():
    def ours(): ...

    def theirs(): ...

    assert vars(constant_result(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}
    code = "import sys, vqscale.train.tokenizer; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def _compare(case, training, fullgraph):
    """A step as it is and compiled: the same numbers, statistics and gradients."""
    quantizer = quantizers.build(CASES[case], seed=0).train(training)
    if training:
        quantizer.begin()
    x_ND = torch.randn(12, quantizer.dim)

    def step(x_ND):
        out = quantizer(x_ND)
        return out.z, out.ids, torch.stack([*out.losses.values(), out.z.square().mean()]).sum(), out.stats

    def run(function):
        x = x_ND.clone().requires_grad_()
        z, ids, loss, stats = function(x)
        learned = [p for p in quantizer.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, [x, *learned], allow_unused=True)
        quantizer.update(stepped=False)
        return [z, ids, loss, *stats.values(), *(g for g in grads if g is not None)]

    expected = run(step)
    got = run(torch.compile(step, fullgraph=fullgraph, backend="aot_eager"))
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
