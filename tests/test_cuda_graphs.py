"""A tokenizer as CUDA graphs, and its nets alone: what cannot be captured is refused, every net can be, and a training
reads nothing that a replay has written over. No graph is captured here, replayed.py stands in for it; what is for a
GPU, tools/gpu_check.sh does.
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
from replayed import Replayed, check_capturable, dense_blocks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from vqscale import config as configuration
from vqscale import matmul
from vqscale.codes import backend, products, tally
from vqscale.codes.revival import Upkeep
from vqscale.parallel.clock import clock
from vqscale.parallel.mesh import Mesh
from vqscale.run import processes
from vqscale.tokenizer.model import Tokenizer
from vqscale.train import tokenizer as training
from vqscale.train.compiled import apart, capture, compile_nets, compile_run
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
    with pytest.raises(configuration.ConfigError, match=r"CUDA graphs are of a tokenizer, and the blocks of a prior"):
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
    monkeypatch.setattr(training, "compile_run", partial(compile_run, backend=graphs))
    config = configuration.load(Run, path)
    training.train(replace(config, engine=replace(config.engine, **engine)), Mesh())
    return jobs.rows(path.parent / "run"), graphs


@pytest.mark.slow
def test_a_training_reads_nothing_that_a_replay_writes_over(tmp_path, tiny_shards, monkeypatch):
    plain, _ = _trained(jobs.write_config(tmp_path / "plain", tiny_shards, *MORE), monkeypatch)
    captured, graphs = _trained(jobs.write_config(tmp_path / "graphs", tiny_shards, *MORE, *GRAPHS), monkeypatch)
    assert graphs.modes == {"reduce-overhead"}
    assert graphs.passes == {"forward": 2, "backward": 2, "inference": 2}  # and never again in 8 steps
    _assert_same(plain, captured, 10)  # two are of evaluations


def _assert_same(plain, captured, num):
    assert len(plain) == len(captured) == num
    for one, other in zip(plain, captured, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-4)


@pytest.fixture
def _as_on_a_gpu(monkeypatch):
    """The passes over codes are one operator each; plain ones that ask the host nothing stand for the kernels. All
    products are those of one library: in bfloat16 the last bit of a float32 one may be another code a few steps on."""
    dense_blocks(monkeypatch)
    monkeypatch.setattr(matmul, "exact_in_onednn", lambda: False)
    monkeypatch.setattr(backend, "in_blocks", lambda rows_kD, mixes=False: None)


# Steps with and without statistics, in the warm-up, in the landing and after it, with revival and evaluations.
BUSY = ("run.steps=10", "run.log_every=2", "run.eval_every=1", "engine.precision=bf16")
LANDING = "tokenizer.quantizer.landing_steps=3"
KEPT = ("warmup_steps=2", "revive_every=2", "revive_after=1", "revive_below=0.5", "revive_most=16")
KEPT = (*(f"tokenizer.quantizer.{setting}" for setting in KEPT), LANDING)
TABLES = {
    "vq": "{name: vq, num_codes: 101, dim: 8, gradient: rotation}",
    "ema": "{name: ema, num_codes: 101, dim: 8}",
    "simvq": "{name: simvq, num_codes: 101, dim: 8, learn_basis: true}",
}
WHOLE = {
    "ibq": (LANDING,),
    **{name: (f"tokenizer.quantizer={quantizer}", *KEPT) for name, quantizer in TABLES.items()},
    "fsq": ("tokenizer.quantizer={name: fsq, levels: [8, 5, 5], fit: none}",),
    "lfq": ("tokenizer.quantizer={name: lfq, num_codes: 256, fit: none, entropy_weight: 0.1}",),
    "bsq": ("tokenizer.quantizer={name: bsq, num_codes: 256, fit: none, entropy_weight: 0.1}",),
}
SAMPLES = 8 * 3 * 16 * 16  # all that a replay is given; the rest is where it was


@pytest.mark.slow
@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("name", WHOLE)
def test_a_tokenizer_is_captured_whole(name, tmp_path, tiny_shards, monkeypatch):
    options = (*BUSY, *WHOLE[name])
    plain, _ = _trained(jobs.write_config(tmp_path / "plain", tiny_shards, *options), monkeypatch)
    captured, graphs = _trained(jobs.write_config(tmp_path / "graphs", tiny_shards, *options, *GRAPHS), monkeypatch)
    assert graphs.modes == {"reduce-overhead"}
    phases = 3 if LANDING in options else 1  # each with and without statistics
    assert graphs.passes == {"forward": 2 * phases, "backward": 2 * phases, "inference": 1}
    assert graphs.copied == SAMPLES
    _assert_same(plain, captured, 15)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_no_number_in_it_is_made_on_the_host(name, tmp_path, tiny_shards, monkeypatch):
    """On tensors without numbers, as of the nets alone: in the landing, with statistics."""
    torch._dynamo.reset()
    # Of torch's own no gradient comes back on this device.
    monkeypatch.setattr(torch.nn.functional, "mse_loss", lambda one, other: (one - other).square().mean())
    config = configuration.load(Run, jobs.write_config(tmp_path, tiny_shards, *WHOLE[name]))
    tokenizer = Tokenizer.from_config(config.tokenizer).to("meta").train()
    tokenizer.quantizer.begin()
    for part in tokenizer.quantizer.modules():
        if isinstance(part, tally.Window):
            part.add(torch.zeros_like(part.counts_k), 128)  # its length is known from here on
        elif isinstance(part, Upkeep):
            part.steps.fill_(3)
    graphs = Replayed()
    capture(tokenizer, halves=False, backend=graphs)
    recon, quantized = tokenizer(torch.empty(8, 3, 16, 16, device="meta"), None, torch.empty(8, device="meta").long())
    torch.stack([recon.mean(), *quantized.losses.values()]).sum().backward()
    assert quantized.stats.keys() >= {"usage", "landing", "saturation"}
    assert graphs.passes == {"forward": 1, "backward": 1}


@pytest.mark.slow
@pytest.mark.usefixtures("_as_on_a_gpu")
def test_with_a_discriminator_it_is_captured_in_two_and_evaluated_in_one(tmp_path, tiny_shards, monkeypatch):
    plain, _ = _trained(jobs.write_config(tmp_path / "plain", tiny_shards, *BUSY, *MORE), monkeypatch)
    captured, graphs = _trained(jobs.write_config(tmp_path / "graphs", tiny_shards, *BUSY, *MORE, *GRAPHS), monkeypatch)
    # Without a landing there are two phases, each with and without statistics; and the decoder.
    assert graphs.passes == {"forward": 5, "backward": 5, "inference": 1}
    _assert_same(plain, captured, 15)


@pytest.mark.slow
def test_gradients_of_a_micro_batch_would_be_written_over(tmp_path, tiny_shards, monkeypatch):
    """Which is why they are refused, and shows that the stand-in finds such a thing."""
    path = jobs.write_config(tmp_path, tiny_shards, *GRAPHS, "data.val=null", "run.steps=3", "run.checkpoint_every=3")
    rows, _ = _trained(path, monkeypatch, accumulation=2)
    assert [row["skipped"] for row in rows] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.usefixtures("_as_on_a_gpu")
def test_a_number_that_changes_with_every_step_stays_where_it_is(tmp_path, tiny_shards, monkeypatch):
    """Or every step would be captured anew, which the stand-in finds."""
    monkeypatch.setattr(clock, "on", False)  # a step that is broken off leaves it on
    noted = Upkeep.note
    monkeypatch.setattr(Upkeep, "note", lambda self: (vars(self).update(_share=None), noted(self)))
    path = jobs.write_config(tmp_path, tiny_shards, LANDING, "run.log_every=1", "data.val=null", *GRAPHS)
    with pytest.raises(AssertionError, match=r"has moved"):
        _trained(path, monkeypatch)


@pytest.mark.slow
def test_with_the_kernels_it_is_captured_whole(tmp_path, tiny_shards, monkeypatch, tool):
    """In Triton's interpreter: each pass over the codes is one operator of the graph."""
    pytest.importorskip("triton")
    from fused import small_tiles

    options = (*BUSY, LANDING, "engine.matmul=medium", "data.val=null")
    with tool("gpu_parts").kernels(True), small_tiles():
        plain, _ = _trained(jobs.write_config(tmp_path / "plain", tiny_shards, *options), monkeypatch)
        path = jobs.write_config(tmp_path / "graphs", tiny_shards, *options, *GRAPHS)
        captured, graphs = _trained(path, monkeypatch)
    assert graphs.passes == {"forward": 6, "backward": 6}
    assert {"vqscale::mix", "vqscale::column_sums", "vqscale::row_means", "vqscale::mix_backward"} <= graphs.operators
    _assert_same(plain, captured, 5)


QUANTIZERS = {
    "": "kernels do not serve here",
    "{name: residual, levels: 2, inner: {name: ibq, num_codes: 9, dim: 4}}": "Residual is not known to be one graph",
    "{name: scq, num_codes: 9, dim: 4}": "SCQ is not known to be one graph",
    "{name: fsq, levels: [8, 5, 5]}": "of eigenvalues (fit: whiten) the host reads whether they converged",
    "{name: lfq, num_codes: 1073741824, fit: none}": "of 1,073,741,824 codes those that were taken are counted",
    "{name: fsq, levels: [8, 5, 5], fit: none}": None,
}


def _apart(path):
    config = configuration.load(Run, path)
    with products.precision(config.engine.matmul):
        return apart(config, Tokenizer.from_config(config.tokenizer), Mesh())


def _says(found, wanted):
    assert found is None if wanted is None else wanted in found, found


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_what_lies_between_the_nets_decides_what_is_captured(quantizer, tmp_path, tiny_shards):
    options = [f"tokenizer.quantizer={quantizer}"] if quantizer else []
    _says(_apart(jobs.write_config(tmp_path, tiny_shards, *options, *GRAPHS)), QUANTIZERS[quantizer])


BUCKETS = 'data.val={medium: buckets, shards: "val.tar", buckets: [[16, 16], [8, 24]]}'


def test_and_so_do_the_samples_of_evaluations_and_what_learns(tmp_path, tiny_shards):
    _says(_apart(jobs.write_config(tmp_path, tiny_shards, BUCKETS, *GRAPHS)), "data.val.buckets are 2")
    decoder = jobs.write_config(tmp_path, tiny_shards, "init.from=a", "trained=[decoder]", *GRAPHS)
    _says(_apart(decoder), "nothing goes back through the encoder")


@pytest.mark.parametrize(
    ("name", "matmul", "wanted"),
    [
        ("ibq", "highest", "the softmax over codes is fused with engine.matmul: medium or low alone"),
        ("ibq", "medium", None),
        ("ibq", "low", None),
        ("vq", "high", None),
        ("simvq", "highest", None),
        ("simvq", "high", "torch rounds all products of a graph"),
        ("lfq", "medium", "torch rounds all products of a graph"),
    ],
)
def test_and_so_does_what_rounds_products_over_codes(name, matmul, wanted, tmp_path, tiny_shards, tool):
    pytest.importorskip("triton")
    path = jobs.write_config(tmp_path, tiny_shards, f"engine.matmul={matmul}", *WHOLE[name], *GRAPHS)
    with tool("gpu_parts").kernels(True):
        _says(_apart(path), wanted)


def _apart_on_two(path):
    config = configuration.load(Run, path)
    mesh = Mesh(data=2)
    return apart(config, Tokenizer.from_config(config.tokenizer, mesh), mesh)


@pytest.mark.dist
def test_and_so_do_processes(ranks, tmp_path, tiny_shards):
    path = jobs.write_config(tmp_path, tiny_shards, *WHOLE["fsq"], *GRAPHS)
    for found in ranks(2, _apart_on_two, path):
        _says(found, "2 processes talk to each other between them")
