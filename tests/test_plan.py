"""tools/plan.py: its numbers for a small run beside counts of another kind, what it refuses, and its check."""

from __future__ import annotations

import ast
import contextlib
import json
from dataclasses import replace
from pathlib import Path

import forks
import jobs
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vqscale import config as configuration
from vqscale.nets import discriminators
from vqscale.nets.config.discriminators import PatchGANConfig
from vqscale.nets.conv import Residual
from vqscale.parallel.mesh import Mesh
from vqscale.plan import costs_of, operations_of
from vqscale.programs.commands import plan as command
from vqscale.programs.commands import train
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.config import Run
from vqscale.train.config.losses import AdversarialConfig
from vqscale.train.watch import Effort, Watch

ROOT = Path(__file__).resolve().parents[1]
SMALL = [str(ROOT / "configs" / "quickstart" / "tokenizer.yaml"), "--gpus", "1,4", "--images", "8"]


@pytest.fixture
def plan():
    return command


def _json(plan, capsys, *words):
    assert plan.main([*SMALL, "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_split_of_every_world_is_predicted(plan, capsys):
    found = _json(plan, capsys)
    assert [(step["data"], step["codes"]) for step in found["steps"]] == [(1, 1), (4, 1), (2, 2), (1, 4)]
    alone, *others = found["steps"]
    assert alone["sent"] == {"codes": 0, "data": 0, "world": 0}
    assert alone["rows"] == 4096
    assert alone["step_s"] == pytest.approx(sum(alone["seconds"].values()))
    assert {step["products"] for step in found["steps"]} == {alone["products"]}  # tokens per GPU stay
    assert alone["products"] == found["code_axis"]["products"] * 2 * 8 * 64 * 4096 * 16
    assert others[-1]["rows"] == 1024


def test_what_it_says_of_a_run_is_what_the_run_has(plan, capsys):
    found = _json(plan, capsys)
    config = configuration.load(Run, SMALL[0])
    tokenizer = Tokenizer.from_config(config.tokenizer)
    dense = sum(part.numel() for name, part in tokenizer.named_parameters() if "codebook" not in name)
    assert found["network"]["parameters"] == dense
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        places = tokenizer.quant_conv(tokenizer.encoder(torch.zeros(1, 3, 32, 32)))
        tokenizer.decoder(tokenizer.post_quant_conv(places))
    assert found["network"]["forward"] == flops.get_total_flops()
    for step in found["steps"]:
        world = step["data"] * step["codes"]
        table = 4 * 4096 // step["codes"] * 16
        assert (step["memory"]["rows"], step["memory"]["moments of rows"]) == (table, 2 * table)
        moments = 2 * -(-dense // world)  # ZeRO 1 splits them
        assert step["memory"]["replicated parameters, gradients, moments"] == 4 * (2 * dense + moments)
        # rings: an all-reduce of `size` bytes sends twice all but one part of them; counts and means add little
        ring = 2 * (step["data"] - 1) * table // step["data"]
        assert ring <= step["sent"]["data"] <= 1.5 * ring
        whole = 3 * (world - 1) * 4 * dense // world  # ZeRO 1: an all-reduce of gradients, a gather of parameters
        assert whole <= step["sent"]["world"] <= 1.1 * whole


KERNELS = ROOT / "vqscale" / "codes" / "gpu"


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ("{name: vq, num_codes: 96, dim: 8}", None),
        ("{name: residual, levels: 3, inner: {name: vq, num_codes: 96, dim: 8}}", None),
        ("{name: fsq, levels: [5, 5, 5]}", PatchGANConfig(channels=8, num_layers=2)),
    ],
)
def test_operations_of_an_image_are_those_of_a_step_that_is_done(settings, loss):
    changes = [f"tokenizer.quantizer={settings}", "tokenizer.net.channels=32"]
    config = configuration.load(Run, SMALL[0], changes)
    if loss is not None:
        config = replace(config, loss=replace(config.loss, adversarial=AdversarialConfig(loss)))
    tokenizer = Tokenizer.from_config(config.tokenizer).train()
    images = torch.rand(2, 3, 32, 32)
    with FlopCounterMode(display=False) as flops:
        recon, quantized = tokenizer(images)
        theirs = [] if loss is None else [_steps_of(loss, images, recon)]
        torch.stack([(recon - images).square().mean(), *theirs, *quantized.losses.values()]).sum().backward()
    assert operations_of(config) == flops.get_total_flops() / 2


def test_a_network_that_looks_at_values_is_trained_without_a_rate(monkeypatch):
    forward = Residual.forward
    monkeypatch.setattr(Residual, "forward", lambda self, x: forward(self, x) * float(x.sum() > 0))
    never_counted = configuration.load(Run, SMALL[0], ["tokenizer.quantizer.dim=5"])
    assert operations_of(never_counted) == 0
    watch = Watch(Effort(0, 1.0e9))
    watch.begin(log=True)
    watch.end(0.0)
    assert "operations_per_s" not in watch.logged({"images_per_s": 2.0}, Mesh()) | watch.summary(2)


def test_operations_are_counted_where_steps_are_left_and_not_of_a_run_that_is_done(tmp_path, tiny_shards, monkeypatch):
    path, counted = jobs.write_config(tmp_path, tiny_shards, "run.steps=1", "data.val=null"), []
    monkeypatch.setattr("vqscale.plan.operations_of", lambda config: counted.append(config.run.steps) or 7)
    for steps in (1, 1, 2):
        assert train.main([str(path), f"run.steps={steps}"]) == 0
    assert counted == [1, 2]
    (tmp_path / "run" / "summary.json").unlink()  # killed before it was written
    assert train.main([str(path), "run.steps=2"]) == 0
    assert counted == [1, 2, 2]


def _steps_of(config, images, recon):
    """What a discriminator does with images and reconstructions, and what it makes the tokenizer minimise."""
    discriminator = discriminators.build(config)
    (discriminator(images)[0].values.mean() + discriminator(recon.detach())[0].values.mean()).backward()
    return discriminator.requires_grad_(False)(recon)[0].values.mean()


def _products(*names):
    """The products of these kernels per tile, counted in their text and in that of what they call: of two branches, the
    one that has more."""

    def count(node):
        if isinstance(node, ast.If | ast.IfExp):
            sides = [side if isinstance(side, list) else [side] for side in (node.body, node.orelse)]
            return max(sum(map(count, side)) for side in sides)
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        own = count(kernels[called]) if called in kernels else called == "tl.dot"
        return own + sum(map(count, ast.iter_child_nodes(node)))

    trees = [ast.parse((KERNELS / name).read_text()) for name in ("kernels.py", "kernels_backward.py")]
    kernels = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    return sum(count(kernels[name]) for name in names)


@pytest.mark.parametrize(
    ("quantizer", "kernels", "library"),
    [
        ("ibq", ["mix_kernel", "logit_gradient_kernel"], 2),
        ("ibq, entropy_weight: 0.1",
         ["mix_kernel", "logit_gradient_kernel", "column_sums_kernel", "row_means_kernel"], 2),
        ("vq", ["peaks_kernel"], 0),
        ("ema", ["peaks_kernel"], 0),
    ],
)  # fmt: skip
def test_on_a_gpu_the_code_axis_does_the_products_of_its_kernels(plan, capsys, quantizer, kernels, library):
    settings = f"tokenizer.quantizer={{name: {quantizer}, num_codes: 4096, dim: 16}}"
    found = _json(plan, capsys, settings, "engine.matmul=medium", "--gpu", "h100")
    alone = found["steps"][0]
    product, fused = 2 * (8 * 64) * 4096 * 16, _products(*kernels)
    assert alone["products"] == (fused + library) * product
    machine = found["machine"]
    units = fused / machine["kernels"] + library / machine["library"]
    seconds = units * product / (machine["tflops"]["bf16"] * 1e12)
    assert alone["seconds"]["code axis: products"] == pytest.approx(seconds)


def test_without_kernels_the_blocks_are_priced(plan, capsys):
    for words in (["engine.matmul=highest"], ["engine.matmul=medium", "--dim", "512"]):
        found = _json(plan, capsys, *words)
        assert found["code_axis"]["passes"] > 0
        single, step = found["machine"]["tflops"]["fp32"], found["steps"][0]
        other = single if "highest" in words[0] else found["machine"]["tflops"]["bf16"]
        a_third = step["products"] / 3 / 1e12  # logits are two of six products, in float32 whatever is asked for
        assert step["seconds"]["code axis: products"] == pytest.approx(a_third / single + 2 * a_third / other)


def test_a_fixed_batch_divides_the_work(plan, capsys):
    words = [SMALL[0], "--gpus", "1,3,4", "--global-batch", "32", "--json"]
    assert plan.main(words) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [step["images_per_gpu"] for step in steps] == [32, 8, 8, 8]  # three do not divide 32
    assert steps[-1]["products"] * 4 == steps[0]["products"]


def test_the_answer_turns_with_the_precision_and_the_size(plan, capsys):
    assert plan.main([*SMALL, "--codes", "1048576"]) == 0
    much = capsys.readouterr().out
    assert "K = 1,048,576 at most 10% of the step on 1 GPUs? no" in much
    assert "mesh.codes=" in much
    assert plan.main([*SMALL, "--codes", "256", "engine.matmul=medium"]) == 0
    assert "K = 256 at most 10% of the step on 1 GPUs? yes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "1,x"], "--gpus takes numbers of GPUs"),
        (["--codes", "0"], "codes is 0 and must be at least 1; it comes from --codes"),
        (["--tokens", "65"], "--images and --tokens say the same thing twice"),
        (["tokenizer.quantizer={name: lfq}"], "the cost model knows the quantizers ibq, vq, ema"),
        (["other.yaml"], "there is one CONFIG"),
    ],
)
def test_what_is_refused_says_why(plan, capsys, words, message):
    assert plan.main([*SMALL, *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("quickstart/tokenizer", ["tokenizer.net.channels=1000000000000"]),
        ("quickstart/tokenizer", ["tokenizer.quantizer.num_codes=1000000000000000000"]),
        ("quickstart/tokenizer", ["data.train.image_size=1000000000000", "data.val=null"]),
        ("prior/llamagen_B", ["prior.net.width=12000000000000", "mesh.codes=null"]),
    ],
)
def test_sizes_that_no_memory_has_are_refused_planned_or_started(file, changes, capsys):
    path = ROOT / "configs" / f"{file}.yaml"
    config = configuration.load(Run, path, changes)
    for ask in (lambda: costs_of(config, 2), lambda: operations_of(config)):
        with pytest.raises(ValueError, match=r"more bytes than there are addresses .*sizes=\[.*: lower the sizes"):
            ask()
    assert train.main([str(path), "--dry-run", *changes]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.dist
@pytest.mark.slow
def test_the_check_finds_bytes_and_operations_equal():
    words = ["--check", "--codes", "128", "--dim", "8", "--tokens", "16", "--gpus", "1,2", "--json"]
    done = forks.program("tools/plan.py", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    alone, two = found["processes"]
    assert [row["products_counted"] for row in found["kernels"]] == [6, 8]
    assert two["gflop_counted"] == alone["gflop_counted"] / 2
    assert two["bytes_counted"] == two["bytes_predicted"] > 0 == alone["bytes_counted"]
    assert alone["seconds_predicted"] > 0 < two["seconds_measured"]


def test_a_codebook_over_too_many_processes_is_warned_of():
    quickstart = ROOT / "configs" / "quickstart" / "tokenizer.yaml"
    wide = costs_of(configuration.load(Run, quickstart, ["mesh.codes=64", "data.batch=4096"]), 64).text()
    assert "warning: the code axis sends" in wide
    assert "give fewer (mesh.codes)" in wide
    null = costs_of(configuration.load(Run, quickstart, ["data.batch=64"]), 64).text()
    assert "data 8 x codes 8 = 64 processes" in null
    assert "warning" not in null


def test_a_start_warns_too_and_by_one_rank_where_a_codebook_is_shared(monkeypatch, capsys):
    monkeypatch.setattr(train, "_train", lambda config, mesh, operations: {})
    monkeypatch.setattr(train.processes, "joined", lambda *args, **others: contextlib.nullcontext())
    monkeypatch.setenv("WORLD_SIZE", "64")
    for rank, codes, says in (("0", 64, True), ("5", 64, False), ("0", 1, False)):
        monkeypatch.setenv("RANK", rank)
        config = configuration.load(
            Run, ROOT / "configs" / "quickstart" / "tokenizer.yaml", [f"mesh.codes={codes}", "data.batch=4096"]
        )
        assert train._run(config, "cpu") == 0
        assert capsys.readouterr().out.startswith("warning: the code axis sends") == says
