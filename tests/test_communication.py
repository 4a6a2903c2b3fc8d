"""engine.communication: bytes over the wire at every stage, counted; what it leaves as it was, and what it rounds."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import engines
import pytest
import test_magvit
import torch
import wire
from begun import in_a_begun_process
from test_priors import batch, config_of, lively
from test_saved_prior import HEADS
from test_several_ids import SETTINGS
from torch.utils._pytree import tree_leaves

from vqscale import config as configuration
from vqscale import priors, quantizers
from vqscale.engine import zero
from vqscale.engine.average import Average
from vqscale.engine.config import AverageConfig, EngineConfig
from vqscale.engine.rounded import num_rounded, rounded
from vqscale.nets import discriminators
from vqscale.nets.config import example
from vqscale.nets.config.discriminators import PatchGANConfig
from vqscale.parallel.mesh import Mesh
from vqscale.parallel.spawn import run
from vqscale.plan.traffic import network_bytes
from vqscale.priors import PRIORS
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.config import TokenizerRun

ROOT = Path(__file__).parent.parent
KINDS = [{"name": "torch"}, *({"name": "deepspeed", "stage": stage} for stage in range(4))]
EACH = [(kind, communication) for communication in ("fp32", None) for kind in KINDS]
ROWS_AND_STATISTICS = 4 * engines.K * engines.DIM + 8 * 2 * 255  # float32 rows, float64 running statistics


def _steps(kind, communication, sent):
    """(bytes of a step by collective, (norm, state) after every step, the state of the average). Step 1 is skipped."""
    engine = engines.make(Mesh(2, 1), precision="bf16", communication=communication, max_skipped=1, **kind)
    average = Average(engine, AverageConfig(0.9))
    history = []
    for step in range(3):
        sent.clear()
        report = engines.take_step(engine, step, poison=step == 1)
        counted = dict(sent)
        assert report.stepped == (step != 1)
        average.update(step + 1)
        history.append((report.grad_norm, engines.state(engine)))
    return counted, history, engines.state(average)


def _overlapped(stage, sent):
    """A stage whose gradients are reduced while the backward pass runs, as on a GPU; a CPU waits for each."""
    usual = zero.settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero, "settings", lambda *given: _with_overlap(usual(*given)))
        return _steps({"name": "deepspeed", "stage": stage}, None, sent)


def _with_overlap(settings):
    return settings | {"zero_optimization": settings["zero_optimization"] | {"overlap_comm": True}}


def _loaded(kind, state, average_state):
    """What an engine with bfloat16 messages holds of a state when it has loaded it, and has shown its average."""
    engine = engines.make(Mesh(2, 1), precision="bf16", **kind)
    engines.take_step(engine, 4)  # to be overwritten
    engines.load(engine, *state)
    average = Average(engine, AverageConfig(0.9))
    engines.load(average, *average_state)
    with average.applied():
        shown = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
        if kind.get("stage") == 3:
            shown = {name: engine.dense.join(name, x).clone() for name, x in engine.dense.parts().items()}
    return engines.state(engine), shown


def _all():
    with wire.counted() as sent:
        found = [_steps(kind, communication, sent) for kind, communication in EACH]
        found += [_overlapped(stage, sent) for stage in (1, 2)]
    _, history, average = found[0]
    return found, [_loaded(kind, history[-1][1], average) for kind in KINDS]


@pytest.fixture(scope="module")
def answers():
    return run(in_a_begun_process, 2, _all, timeout_s=400.0)


LEARNED = {name: p.numel() for name, p in engines.Net().named_parameters() if p.requires_grad}
LOW = sum(n for name, n in LEARNED.items() if name.split(".")[0] in ("wide", "deep", "last"))
P, UNUSED, LARGE = sum(LEARNED.values()), LEARNED["unused"], LEARNED["deep.weight"]


@pytest.mark.slow
@pytest.mark.dist
def test_messages_in_bfloat16_have_half_the_bytes_at_every_stage(answers):
    for found, _ in answers:
        totals = {}
        for (kind, communication), (counted, _, _) in zip(EACH, found, strict=False):
            stage, low = kind.get("stage", 0), communication is None
            each, reduced = (2, LOW if stage < 3 else LARGE) if low else (4, 0)
            # of a parameter without a gradient stages from 1 on send none, and DeepSpeed pads what it cuts
            gradients = each * (P if stage == 0 else P - UNUSED)
            expected = {"all_reduce": ROWS_AND_STATISTICS + (gradients if stage < 3 else 0)}
            expected |= {"all_gather_into_tensor": (4 * P - 2 * reduced) // 2} if stage else {}
            expected |= {"reduce_scatter_tensor": gradients // 2} if stage == 3 else {}
            assert counted == pytest.approx(expected, abs=32), (kind, communication)
            total = sum(counted.values()) - ROWS_AND_STATISTICS
            engine = EngineConfig(kind["name"], stage, "bf16", communication)
            planned = network_bytes(P, num_rounded(engines.Net(), engine), engine, 2)
            assert total == pytest.approx(planned, rel=1e-3), (kind, communication)
            totals[str(kind), low] = total
        for kind in KINDS:  # what is not halved are norms, tables and, at stage 3, small layers
            assert totals[str(kind), True] < 0.51 * totals[str(kind), False]


@pytest.mark.slow
@pytest.mark.dist
def test_every_stage_is_the_twin_to_the_bit_and_skips_as_it_does(answers):
    for found, _ in answers:
        for first, last in ((0, len(KINDS)), (len(KINDS), len(found))):
            _, twin, twin_average = found[first]
            for _, history, average in found[first + 1 : last]:
                for (norm, state), (twin_norm, twin_state) in zip(history, twin, strict=True):
                    assert norm == pytest.approx(twin_norm, rel=1e-14, nan_ok=True)
                    assert engines.largest_difference(state, twin_state) == 0
                assert engines.largest_difference(average, twin_average) == 0
            (_, before), (norm, skipped), _ = twin
            assert math.isnan(norm)
            learned = {name for name in before[0] if not name.startswith("buffer/")}
            assert all(torch.equal(before[0][name], skipped[0][name]) for name in learned)


@pytest.mark.slow
@pytest.mark.dist
def test_masters_are_float32_and_only_what_is_sent_of_gradients_is_rounded(answers):
    wide, low = (answers[0][0][at][1] for at in (0, len(KINDS)))
    (_, (one, *_)), (_, (other, *_)) = wide[0], low[0]  # the first step, from the same weights
    assert {x.dtype for x in other.values() if x.is_floating_point()} == {torch.float32}
    weight = other["parameter/deep.weight"]
    assert (weight.bfloat16().float() != weight).float().mean() > 0.9
    for name in LEARNED:
        exact, sent = one[f"exp_avg/{name}"], other[f"exp_avg/{name}"]
        if exact.any():
            error = (sent - exact).abs().max() / exact.abs().max()
            assert 0 < error < 2**-7, name


@pytest.mark.slow
@pytest.mark.dist
def test_what_was_saved_with_float32_messages_is_loaded_as_it_is(answers):
    for found, loaded in answers:
        _, history, average = found[0]
        for kind, (state, shown) in zip(KINDS, loaded, strict=True):
            assert engines.largest_difference(state, history[-1][1]) == 0, kind
            for name, x in average[0].items():
                assert torch.equal(shown[name], x), (kind, name)


def test_an_engine_says_no_where_nothing_rounds_parameters_by_itself():
    assert [key for key, _ in EngineConfig(communication="bf16").problems()] == ["communication"]
    assert EngineConfig(precision="bf16").sends_bf16
    assert not EngineConfig(precision="bf16", communication="fp32").sends_bf16
    assert not EngineConfig().sends_bf16
    old = configuration.parse(EngineConfig, {"precision": "bf16"}, written=True)
    assert not old.sends_bf16, "runs from before the key go on as they were"


def _models():
    """(name, module, what it is called with) of all nets, judges and priors."""
    for file in ("tokenizer", "sound", "color", "depth", "panoptic"):
        config = configuration.load(TokenizerRun, ROOT / "configs" / "quickstart" / f"{file}.yaml").tokenizer
        sides = tuple(4 * stride for stride in config.net.strides)
        samples, *context = (torch.rand(shape) for shape in example(config.net, sides, 2))
        yield file, Tokenizer.from_config(config), (samples, *context)
    magvit = Tokenizer(test_magvit.SMALL, quantizers.build({"name": "simvq", "num_codes": 16, "dim": 4}))
    yield "magvit", magvit, (torch.rand(2, 3, 16, 16),)
    yield "patchgan", discriminators.build(PatchGANConfig(channels=4, num_layers=2)), (torch.rand(2, 3, 32, 32),)
    for name, head in [("autoregressive", "codebook"), *((name, "tied") for name in PRIORS)]:
        prior = lively(priors.build(config_of(name, class_dropout=0.0, **HEADS[head])))
        if head == "codebook":
            prior.head.set_features(lambda ids: torch.randn(len(ids), 5, generator=torch.Generator().manual_seed(2)))
        yield f"{name} {head}", prior, batch()
    for head, more in (
        ("factorised", {}),
        ("bits", {"head": {"name": "bits", "width": 8, "num_layers": 1}, "num_codes": 4}),
    ):
        settings = {"name": "autoregressive", **SETTINGS, "class_dropout": 0.0, **more}
        ids = torch.randint(4, (2, *SETTINGS["grid"], 2))
        yield head, priors.build(settings), (ids, torch.tensor([0, 1]))


def _tensors(answer):
    """All tensors of an answer, in records too."""
    leaves = tree_leaves(answer, is_leaf=dataclasses.is_dataclass)
    return [
        x
        for leaf in leaves
        for x in (tree_leaves(list(vars(leaf).values())) if dataclasses.is_dataclass(leaf) else [leaf])
        if isinstance(x, torch.Tensor)
    ]


@torch.no_grad()
def test_what_is_sent_rounded_changes_nothing_that_autocast_computes():
    """The weights of every model in bfloat16's numbers: its answers are the same to the bit."""
    for name, module, given in _models():
        module.eval()
        parameters, found = rounded(module), []
        assert 0 < sum(p.numel() for p in parameters) < sum(p.numel() for p in module.parameters()), name
        for _ in range(2):
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16):
                found.append(_tensors(module(*given)))
            for p in parameters:
                p.copy_(p.bfloat16())
        assert len(found[0]) > 0
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True)), name
