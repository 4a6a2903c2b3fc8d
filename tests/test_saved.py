"""Tokenizers on disk: runs, checkpoints and exported folders give back what was saved, to the bit, on any grid."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jobs
import pytest
import torch
from quantizer_cases import CASES, settings
from safetensors.torch import load_file
from saved_runs import images, shift, small, write_run

import vqscale
from vqscale import config as configuration
from vqscale.codes.rows import set_aside
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.export import entries
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.config import tokenizer as config_tokenizer


def same(one: Tokenizer, other: Tokenizer) -> None:
    """The same parameters, ids and reconstructions to the bit, and so the same fingerprint."""
    left, right = entries(one), entries(other)
    assert list(left) == list(right)
    for name in left:
        assert torch.equal(left[name].tensor, right[name].tensor), name
    x = images()
    ids = one.encode(x)
    assert torch.equal(other.encode(x), ids)
    assert torch.equal(other.decode(ids), one.decode(ids))
    assert other.fingerprint == one.fingerprint


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_loaded_to_the_bit(case, tmp_path):
    tokenizer = small(quantizer=settings(case))
    assert tokenizer.save(tmp_path / "out") == tmp_path / "out"
    loaded = vqscale.Tokenizer.load(tmp_path / "out")
    assert not any(part.training for part in loaded.modules())
    assert loaded.config == tokenizer.config
    same(tokenizer, loaded)


def test_both_networks_are_saved(tmp_path):
    net = {"name": "magvit", "channels": 8, "multipliers": [1, 2], "num_blocks": 1, "z_channels": 4, "num_groups": 4}
    tokenizer = small(net=net)
    same(tokenizer, Tokenizer.load(tokenizer.save(tmp_path)))
    x = images()
    assert tokenizer.encode(x).shape == (2, 4, 4)
    assert tokenizer.decode(tokenizer.encode(x)).shape == x.shape
    with pytest.raises(ValueError, match=r"z_channels is 5 and the quantizer's dim is 4.*use the net conv"):
        small(net={**net, "z_channels": 5})


def test_loading_leaves_torchs_randomness_alone(tmp_path):
    small().save(tmp_path)
    torch.manual_seed(3)
    before = torch.rand(1)
    torch.manual_seed(3)
    Tokenizer.load(tmp_path)
    assert torch.equal(torch.rand(1), before)


def test_a_safetensors_file_that_the_library_reads(tmp_path):
    tokenizer = small()
    tokenizer.save(tmp_path, {"origin": "a test", "metrics": {"psnr": 1.5}})
    found = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(x.shape) for name, x in found.items()} == {n: e.shape for n, e in entries(tokenizer).items()}
    assert torch.equal(found["quantizer.codebook.rows"], tokenizer.quantizer.codebook.rows)
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["fingerprint"] == tokenizer.fingerprint
    assert card["config"] == configuration.to_dict(tokenizer.config)
    assert card["weights"]["sha256"] == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert Tokenizer.load(tmp_path).card == {"origin": "a test", "metrics": {"psnr": 1.5}}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.json", "model.safetensors"]


def test_the_fingerprint_is_of_all_that_decides_and_nothing_else():
    tokenizer = small()
    known = tokenizer.fingerprint
    assert len(known) == 64
    assert small().fingerprint == known
    for name, entry in entries(tokenizer).items():  # the last bit of the last number of every tensor
        kept = entry.tensor.detach().clone()
        with torch.no_grad():
            entry.tensor.view(-1)[-1] = torch.nextafter(entry.tensor.view(-1)[-1], torch.tensor(9.0))
        assert tokenizer.fingerprint != known, name
        with torch.no_grad():
            entry.tensor.copy_(kept)
    assert tokenizer.fingerprint == known
    tokenizer.quantizer.begin()
    tokenizer.train()
    with torch.no_grad():  # training leaves its own state behind
        tokenizer(images())
    tokenizer.quantizer.update()
    set_aside(tokenizer)
    assert tokenizer.fingerprint == known
    config = tokenizer.config
    tokenizer.config = dataclasses.replace(config, latent_norm="layer")
    assert tokenizer.fingerprint != known
    tokenizer.config = dataclasses.replace(config, quantizer=dataclasses.replace(config.quantizer, scan_mib=1))
    assert tokenizer.fingerprint == known
    tokenizer.config = None
    assert tokenizer.fingerprint != known
    with pytest.raises(ValueError, match="put together by hand"):
        tokenizer.save("nowhere")


def test_the_fingerprint_is_the_hash_that_the_docstring_says():
    """Written out here, so that it does not change by accident: caches of ids would no longer be known."""
    tokenizer = small()
    identity = {
        "net": {"name": "conv", "channels": 8, "multipliers": [1, 2], "num_blocks": 1, "attention_levels": []}
        | {"z_channels": 6, "num_groups": 4},
        "quantizer": {"name": "ibq", "init": "normal", "num_codes": 13, "dim": 4}
        # whose defaults are newer than fingerprints: what they were before is what is left out
        | {"revive_every": 1, "revive_from": "use", "revive_patience": 3.0}
        | {"similarity": "euclid", "temperature": 0.3},
    }
    text = json.dumps(identity, sort_keys=True).encode()
    for name, tensor in sorted({n: e.tensor for n, e in entries(tokenizer).items()}.items()):
        text += f"{name} F32 {list(tensor.shape)}\n".encode() + tensor.detach().numpy().tobytes()
    assert tokenizer.fingerprint == hashlib.sha256(text).hexdigest()


@pytest.mark.parametrize("weights", ["average", "parameters"])
def test_a_run_gives_its_newest_checkpoint(weights, tmp_path):
    tokenizer = small()
    run = write_run(tmp_path / "run", tokenizer, steps=(3, 7), average=0.25, psnr=20.5)
    loaded = Tokenizer.load(run, weights=weights)
    if weights == "average":
        shift(tokenizer, 0.25)
    same(tokenizer, loaded)
    same(tokenizer, Tokenizer.load(run / "checkpoints" / "0000000003", weights=weights))
    assert loaded.card == {
        "origin": f"run/checkpoints/0000000007, {weights}",
        "image_size": 8,
        "interpolation": "bicubic",
        "commit": "abc123",
        "metrics": {"steps": 7, "psnr": 20.5},
    }
    exported = Tokenizer.load(loaded.save(tmp_path / "out"))
    same(loaded, exported)
    assert exported.card == loaded.card
    assert "metrics" not in Tokenizer.load(run / "checkpoints" / "0000000003").card


@pytest.mark.parametrize("name", ["ibq", "ema", "simvq"])
def test_without_averages_the_parameters_are_taken(name, tmp_path):
    """Rows that are not learned by gradient (ema, simvq) have no average and stand in checkpoints without a prefix."""
    quantizer = {"name": name, "num_codes": 13, "dim": 4}
    tokenizer = small(quantizer=quantizer)
    same(tokenizer, Tokenizer.load(write_run(tmp_path / "run", tokenizer)))
    other = small(quantizer=quantizer)
    run = write_run(tmp_path / "averaged", other, average=0.5)
    with torch.no_grad():
        for entry in entries(other).values():
            entry.tensor.add_(0.5 if entry.tensor.requires_grad else 0.0)
    same(other, Tokenizer.load(run))


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    tokenizer = small()
    run = write_run(tmp_path / "run", tokenizer, steps=(3, 7))
    newest = run / "checkpoints" / "0000000007"
    file = newest / "ranges" / "00000.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=r"passed over.*0000000007.*safetensors has \d+ bytes"):
        same(tokenizer, Tokenizer.load(run))
    with pytest.raises(ValueError, match=r"0000000007 is not whole: ranges/.*take.*newest"):
        Tokenizer.load(newest)


def resident(key):
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_moments_take_no_memory(tmp_path):
    """A checkpoint of 64 MiB, of which all but a few KiB are of the optimiser."""
    tokenizer = small()
    run = write_run(tmp_path / "run", tokenizer, moments=16 << 20)
    Tokenizer.load(write_run(tmp_path / "first", small()))  # brings what is loaded once
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is what there is now
    before = resident("VmRSS")
    loaded = Tokenizer.load(run)
    assert resident("VmHWM") - before < 16
    same(tokenizer, loaded)


def on_ranks(folder, source):
    """Load, describe, save and run on a grid of all ranks: what one process must agree with."""
    world = torch.distributed.get_world_size()
    mesh = Mesh(data=2 if world == 4 else 1, codes=2)
    made = small(mesh)
    loaded = Tokenizer.load(source, mesh=mesh)
    assert loaded.quantizer.codebook.rows.shape[0] == loaded.quantizer.codebook.layout.count < 13
    with ops.count_bytes() as sent:
        print_ = loaded.fingerprint
    ids = loaded.encode(images())
    loaded.save(f"{folder}-{world}")
    run = None
    if world == 2:
        write_run(folder.parent / "run", made, mesh, average=0.0)
        run = Tokenizer.load(folder.parent / "run", mesh=mesh).fingerprint
    return made.fingerprint if run is None else run, print_, ids, loaded.decode(ids), sent["codes"]


@pytest.mark.slow
@pytest.mark.dist
def test_the_same_on_one_two_and_four_processes(ranks, tmp_path):
    tokenizer = small()
    tokenizer.save(tmp_path / "one")
    ids = tokenizer.encode(images())
    for world in (2, 4):
        for found in ranks(world, on_ranks, tmp_path / "many", tmp_path / "one", timeout_s=180.0):
            assert found[0] == found[1] == tokenizer.fingerprint
            assert torch.equal(found[2], ids)
            torch.testing.assert_close(found[3], tokenizer.decode(ids))
            assert 0 < found[4] <= 13 * 4 * 4
        for name in ("model.safetensors", "card.json"):
            one, many = (tmp_path / place / name for place in ("one", f"many-{world}"))
            assert many.read_bytes() == one.read_bytes()
    same(tokenizer, Tokenizer.load(tmp_path / "run"))  # written by two processes


def refused_everywhere(path, file):
    mesh = Mesh(codes=2)
    with pytest.raises(ValueError) as caught:
        Tokenizer.load(path, mesh=mesh)
    with pytest.raises(RuntimeError, match="NotADirectoryError"):
        small(mesh).save(file / "out")  # only rank 0 writes, and so only it sees what is wrong
    return str(caught.value)


@pytest.mark.dist
def test_what_cannot_be_loaded_or_saved_is_an_error_on_all_ranks(ranks, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nothing", write_run(tmp_path / "run", small())):
        (path / "checkpoints" / "0000000007" / "manifest.json").unlink(missing_ok=True)
        one, two = ranks(2, refused_everywhere, path, tmp_path / "file", timeout_s=180.0)
        assert one == two
        assert str(path) in one


def test_without_torch_the_config_is_there():
    code = "import sys, vqscale, vqscale.tokenizer.config as t; t.TokenizerConfig(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert config_tokenizer.TokenizerConfig is TokenizerConfig


@pytest.mark.slow
@pytest.mark.dist
def test_a_trained_run_gives_what_its_checkpoint_holds(tmp_path, tiny_shards):
    """Names as training writes them, with an average, on two processes."""
    run = jobs.finish(jobs.write_config(tmp_path, tiny_shards, "run.steps=4", "average.decay=0.5"), world=2)
    tensors = jobs.tensors(run, 4)
    for weights, prefix in (("average", "average/"), ("parameters", "parameter/")):
        loaded = Tokenizer.load(run, weights=weights)
        for name, entry in entries(loaded).items():
            assert torch.equal(entry.tensor, tensors[("rows/" if entry.table else "") + prefix + name]), name
    assert loaded.card["image_size"] == jobs.SIDE
    assert loaded.card["metrics"]["steps"] == 4
    assert not torch.equal(tensors["average/encoder.conv_in.weight"], tensors["parameter/encoder.conv_in.weight"])
