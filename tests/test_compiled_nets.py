"""Compiled nets compute what plain ones do; without a compiler it is said at once. A tokenizer's nets are traced here
and not compiled; the blocks of a prior are compiled, in a run.
"""

from __future__ import annotations

import copy

import jobs
import prior_runs
import pytest
import torch

from vqscale import quantizers
from vqscale.nets.config import ConvConfig
from vqscale.run import processes
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.compiled import compile_nets

TINY = ConvConfig(
    channels=8, multipliers=(1,), num_blocks=1, attention_levels=(), mid_attention=False, z_channels=8, num_groups=4
)


@pytest.mark.slow
def test_compiled_nets_have_the_same_names_values_and_gradients():
    plain = Tokenizer(TINY, quantizers.build({"name": "vq", "num_codes": 7, "dim": 4}), "rms")
    compiled = copy.deepcopy(plain)
    compile_nets(compiled, backend="aot_eager")
    images, found = torch.rand(2, 3, 8, 8), []
    for tokenizer in (plain, compiled):
        recon, _ = tokenizer(images)
        last = tokenizer.decoder.conv_out.weight
        twice = [
            torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (recon.mean(), recon.square().mean())
        ]
        (recon - images).square().mean().backward()
        found.append({"recon": recon, "one": twice[0], "two": twice[1]})
        found[-1] |= {name: p.grad for name, p in tokenizer.named_parameters() if p.grad is not None}
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert found[0].keys() == found[1].keys()
    for name, x in found[0].items():
        torch.testing.assert_close(found[1][name], x, msg=lambda text, n=name: f"{n}: {text}")
    assert compiled.encoder._compiled_call_impl is not None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_compiler_is_said_at_once(monkeypatch, tmp_path, device):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ValueError, match=r"run\.compile needs a compiler.*no g(\+\+|cc or cc or clang) on the PATH"):
        processes.check_compiler(device)
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    processes.check_compiler("cpu")


@pytest.mark.slow
def test_missing_weights_are_said_before_anything_is_built(tmp_path, tiny_shards):
    path = jobs.write_config(tmp_path, tiny_shards, "loss.perceptual={vgg: none.pth, heads: none.pth}")
    job = jobs.start(path)
    assert job.wait() == [2]
    assert "error: VGG16 of LPIPS: none.pth does not exist, and nothing is downloaded" in job.output
    assert "Traceback" not in job.output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_prior_with_compiled_blocks_is_the_same_run(tmp_path):
    caches = prior_runs.write_caches(tmp_path / "caches")
    small = ("run.steps=3", "data.val=null", "prior.net.num_layers=1")
    plain = jobs.finish(prior_runs.write_config(tmp_path / "plain", caches, *small))
    path, made = prior_runs.write_config(tmp_path / "compiled", caches, *small, "run.compile=true"), tmp_path / "made"
    job = jobs.start(path, TORCHINDUCTOR_CACHE_DIR=str(made))
    assert job.wait(timeout_s=300) == [0], job.output
    assert len([*made.rglob("*.so")]) >= 2  # forward and backward
    found = [[row["loss"] for row in jobs.rows(run)] for run in (plain, tmp_path / "compiled" / "run")]
    assert found[1] == pytest.approx(found[0], abs=1e-6)
