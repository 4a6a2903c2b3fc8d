"""Encoder and decoder as CUDA graphs: what cannot be captured is refused, every net can be, and a training reads
nothing that a replay has written over. No graph is captured here, replayed.py stands in for it; what is for a GPU,
tools/gpu_check.sh does.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import jobs
import prior_runs
import pytest
import test_export
import torch
from replayed import Replayed, check_capturable
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from vqscale import config as configuration
from vqscale.parallel.mesh import Mesh
from vqscale.run import processes
from vqscale.train import tokenizer as training
from vqscale.train.compiled import compile_nets
from vqscale.train.config import Run

GRAPHS = ("run.compile=true", "run.cuda_graphs=true")
TWO_SIZES = 'data.train={medium: buckets, shards: "train-{0..1}.tar", buckets: [[16, 16], [8, 24]]}'


def test_what_cannot_be_captured_is_refused(tmp_path, tiny_shards):
    options = ["run.cuda_graphs=true", "engine.name=deepspeed", "engine.accumulation=2", TWO_SIZES]
    with pytest.raises(configuration.ConfigError) as error:
        configuration.load(Run, jobs.write_config(tmp_path, tiny_shards, *options))
    for part in (
        "CUDA graphs are captured of compiled networks: use run.compile: true, or run.cuda_graphs: false",
        "engine.name deepspeed takes gradients while the backward pass goes on",
        "with engine.accumulation 2 a graph would write over the gradients of the micro-batch before",
        "a graph is captured of one shape, and data.train.buckets are 2",
    ):
        assert part in str(error.value), error.value
    path = prior_runs.write_config(tmp_path / "prior", prior_runs.write_caches(tmp_path / "caches"), *GRAPHS)
    with pytest.raises(configuration.ConfigError, match=r"CUDA graphs are of a tokenizer's two networks"):
        configuration.load(Run, path)


def test_a_run_on_a_cpu_is_refused_before_it_begins(tmp_path, tiny_shards):
    job = jobs.start(jobs.write_config(tmp_path, tiny_shards, *GRAPHS))
    assert job.wait() == [2]
    assert "error: run.cuda_graphs needs a GPU, and this run is on cpu (run.device" in job.output
    assert "Traceback" not in job.output
    assert not (tmp_path / "run").exists()
    processes.check_graphs("cuda")


WAITS = {
    "a number of the host": lambda x: x + torch.ones((), device="cpu"),
    "a shape that numbers decide": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "a number that the host reads": lambda x: x * x.sum().item(),
}


@pytest.mark.parametrize("what", ["nothing", *WAITS])
def test_the_check_finds_what_no_capture_takes(what):
    with FakeTensorMode(shape_env=ShapeEnv()):
        x = torch.empty(4, device="meta")
    graph = make_fx(WAITS.get(what, lambda x: x.sin() + torch.ones(4, device="meta")), tracing_mode="fake")(x)
    with nullcontext() if what == "nothing" else pytest.raises(AssertionError):
        check_capturable(graph)


@pytest.mark.slow
@pytest.mark.parametrize("net", test_export.ANY)
def test_every_net_is_captured_forward_and_backward_once(net):
    """On tensors without numbers, whose device is none of the host's: what is made on the host would show."""
    torch._dynamo.reset()
    tokenizer = test_export.any_of(net).to("meta").train()
    samples, *context = (x.to("meta") for x in test_export.given(tokenizer))
    backward = net != "wave"  # of a Fourier transform there is none on this device
    graphs = Replayed()
    compile_nets(tokenizer, graphs=True, backend=graphs)
    for _ in range(3):
        with torch.set_grad_enabled(backward):
            latents = tokenizer.post_quant_conv(tokenizer.quant_conv(tokenizer.encoder(samples, *context)))
            recon = tokenizer.decoder(latents, *context)
        if backward:
            recon.sum().backward()
    assert graphs.passes == ({"forward": 2, "backward": 2} if backward else {"inference": 2})
    assert graphs.modes == {"reduce-overhead"}


# Everything that has state is at work, and the adaptive weight goes through the decoder more than once.
MORE = ("loss.adversarial={net: {channels: 2, num_layers: 1}, start_step: 2, adaptive: true}", "average.decay=0.9")


def _trained(path, monkeypatch, **engine):
    """(rows of the run, the stand-in that its nets were given to)."""
    graphs = Replayed()
    torch._dynamo.reset()
    monkeypatch.setattr(training, "compile_nets", partial(compile_nets, backend=graphs))
    config = configuration.load(Run, path)
    training.train(replace(config, engine=replace(config.engine, **engine)), Mesh())
    return jobs.rows(path.parent / "run"), graphs


@pytest.mark.slow
def test_a_training_reads_nothing_that_a_replay_writes_over(tmp_path, tiny_shards, monkeypatch):
    plain, _ = _trained(jobs.write_config(tmp_path / "plain", tiny_shards, *MORE), monkeypatch)
    captured, graphs = _trained(jobs.write_config(tmp_path / "graphs", tiny_shards, *MORE, *GRAPHS), monkeypatch)
    assert graphs.modes == {"reduce-overhead"}
    assert graphs.passes == {"forward": 2, "backward": 2, "inference": 2}  # and never again in 8 steps
    assert len(plain) == len(captured) == 10  # two are of evaluations
    for one, other in zip(plain, captured, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_gradients_of_a_micro_batch_would_be_written_over(tmp_path, tiny_shards, monkeypatch):
    """Which is why they are refused, and shows that the stand-in finds such a thing."""
    path = jobs.write_config(tmp_path, tiny_shards, *GRAPHS, "data.val=null", "run.steps=3", "run.checkpoint_every=3")
    rows, _ = _trained(path, monkeypatch, accumulation=2)
    assert [row["skipped"] for row in rows] == [1, 2, 3]
