"""Published tokenizers at full size: a made checkpoint, imported, gives what the restated network gives."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jobs
import published
import pytest
import torch

from vqscale import config as configuration
from vqscale.nets.config import ConvConfig, MagvitConfig
from vqscale.parallel.mesh import Mesh
from vqscale.programs.commands import train
from vqscale.tokenizer.export import entries
from vqscale.tokenizer.model import Tokenizer
from vqscale.tokenizer.published import convert
from vqscale.train import first_weights
from vqscale.train.config import Run

TOOL = Path(__file__).resolve().parents[1] / "tools" / "import_checkpoint.py"
FROZEN = {"ibq": (), "simvq": ("quantize.embedding.weight",)}
K = {"ibq": 1024, "simvq": 512}
SHAPES = {"ibq": published.ibq_shapes, "simvq": published.simvq_shapes}
NETS = {"ibq": ConvConfig(), "simvq": MagvitConfig()}


def run_tool(*argv) -> int:
    spec = importlib.util.spec_from_file_location("import_checkpoint", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(word) for word in argv])


@pytest.mark.slow
@pytest.mark.parametrize("family", NETS)
def test_an_imported_checkpoint_computes_what_was_published(family, tmp_path, capsys):
    state = published.made(SHAPES[family](K[family]))
    torch.save(published.checkpoint(state, FROZEN[family]), tmp_path / "last.ckpt")
    assert run_tool("--from", family, tmp_path / "last.ckpt", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert tokenizer.fingerprint in printed
    assert tokenizer.config.net == NETS[family]
    assert tokenizer.quantizer.num_codes == K[family]
    assert tokenizer.card["origin"].startswith(f"{family}: last.ckpt (sha256 ")
    # evaluate and encode resize as it is said here
    assert tokenizer.card["interpolation"] == {"ibq": "sampled", "simvq": "bilinear"}[family]

    tokenizer, s = tokenizer.double(), {name: x.double() for name, x in state.items()}
    images = torch.rand(1, 3, 32, 48, dtype=torch.float64) * 2 - 1
    latents, ids_of, codes, pixels = (
        getattr(published, f"{family}_{part}") for part in ("latents", "ids", "codes", "images")
    )
    with torch.no_grad():
        x = latents(s, images)
        x_ND = x.permute(0, 2, 3, 1).flatten(0, 2)
        assert 0.1 < x_ND.std() < 10, "the made weights lost the signal, and the comparison its meaning"
        torch.testing.assert_close(tokenizer.latents(images), x_ND, rtol=0, atol=1e-5)
        ids = tokenizer.encode(images)
        assert torch.equal(ids.flatten(), ids_of(s, x_ND))
        assert len(ids.unique()) > 4
        expected = pixels(s, codes(s)[ids].permute(0, 3, 1, 2))
        assert 0.1 < expected.std() < 10
        torch.testing.assert_close(tokenizer.decode(ids), expected, rtol=0, atol=1e-5)


@pytest.fixture
def small():
    """A checkpoint with the names of ibq and fewer, narrower levels, whose sizes are read from its shapes."""
    from saved_runs import small as build

    net = {"channels": 32, "multipliers": [1, 2], "num_blocks": 2, "attention_levels": [1], "z_channels": 4}
    quantizer = {"name": "ibq", "num_codes": 11, "dim": 4, "similarity": "dot", "init": "normal"}
    tokenizer = build(net=net, quantizer=quantizer, latent_norm="none")
    names = {
        n.replace("quantizer.codebook.rows", "quantize.embedding.weight"): e for n, e in entries(tokenizer).items()
    }
    return tokenizer, {name: entry.tensor.detach().clone() for name, entry in names.items()}


def checkpoint_of(state):
    """Averages as given, raw weights one above them."""
    held = published.checkpoint(state)["state_dict"]
    return held | {name: x + 1 for name, x in state.items()}


def test_sizes_are_read_from_shapes_and_both_weights_can_be_had(small):
    tokenizer, state = small
    average, raw = (convert(checkpoint_of(state), "ibq", weights) for weights in ("average", "raw"))
    assert average.config.net == tokenizer.config.net
    assert average.quantizer.config.similarity == "dot"
    for name, entry in entries(tokenizer).items():
        assert torch.equal(entries(average)[name].tensor, entry.tensor), name
        assert torch.equal(entries(raw)[name].tensor, entry.tensor + 1), name
    flat = convert(state, "ibq", "raw")  # a dictionary without averages and losses
    assert torch.equal(flat.encode(torch.zeros(1, 3, 8, 8)), tokenizer.encode(torch.zeros(1, 3, 8, 8)))


def test_an_imported_dictionary_is_trained_on_with_more_codes_on_pictures_of_another_size(small, tmp_path, tiny_shards):
    _, state = small
    torch.save(published.checkpoint(state), tmp_path / "last.ckpt")
    assert run_tool("--from", "ibq", tmp_path / "last.ckpt", tmp_path / "theirs") == 0
    theirs = entries(Tokenizer.load(tmp_path / "theirs"))
    settings = ["tokenizer.latent_norm=none", "tokenizer.quantizer={name: ibq, num_codes: 16, dim: 4, similarity: dot}"]
    settings += [
        "tokenizer.net={channels: 32, multipliers: [1, 2], num_blocks: 2, attention_levels: [1], z_channels: 4}"
    ]
    settings += [f"init.from={tmp_path / 'theirs'}", "run.steps=2", "run.eval_every=2", "run.eval_images=0"]
    path = jobs.write_config(tmp_path, tiny_shards, *settings)
    config = configuration.load(Run, path)
    begun = Tokenizer.from_config(config.tokenizer, seed=config.run.seed)
    first_weights.take(config, begun, Mesh())
    rows = "quantizer.codebook.rows"
    for name, entry in entries(begun).items():
        assert torch.equal(entry.tensor[:11] if name == rows else entry.tensor, theirs[name].tensor), name

    assert train.main([str(path)]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["images"] == jobs.NUM_VAL
    assert summary["psnr"] > 0
    trained = entries(Tokenizer.load(tmp_path / "run"))
    assert not torch.equal(trained["decoder.conv_out.weight"].tensor, theirs["decoder.conv_out.weight"].tensor)


def test_every_key_is_accounted_for(small):
    _, state = small
    held = checkpoint_of(state)
    del held["decoder.conv_out.bias"], held["model_ema.decoderconv_outbias"], held["model_ema.quant_convbias"]
    held |= {"teacher.weight": torch.ones(1), "model_ema.teacherbias": torch.ones(1)}
    held["encoder.norm_out.weight"] = torch.ones(3)
    with pytest.raises(ValueError, match="published ibq tokenizer") as caught:
        convert(held, "ibq")
    message = str(caught.value)
    assert "3 missing: decoder.conv_out.bias, model_ema.decoderconv_outbias, model_ema.quant_convbias" in message
    assert "2 unknown: teacher.weight, model_ema.teacherbias" in message
    assert "1 of another shape: encoder.norm_out.weight is (3,) and not (64,)" in message
    del held["quantize.embedding.weight"]
    with pytest.raises(ValueError, match=r"has no quantize.embedding.weight among its .*: these are other weights"):
        convert(held, "ibq")


def test_what_is_not_there_or_not_theirs(small, tmp_path, capsys):
    _, state = small
    with pytest.raises(ValueError, match=r"no averaged weights \(model_ema\.\*\): take the others with --weights raw"):
        convert(state, "ibq")
    with pytest.raises(
        ValueError, match="named 'vqgan': there are ibq, taming, diffusers, llamagen, open_magvit2, simvq"
    ):
        convert(state, "vqgan")
    with pytest.raises(ValueError, match=r"missing: .*decoder\.mid_block.* unknown: "):
        convert(checkpoint_of(state), "simvq")
    out = tmp_path / "out"
    assert run_tool("--from", "ibq", tmp_path / "none.ckpt", out) == 2
    assert "none.ckpt does not exist" in capsys.readouterr().err
    torch.save({"state_dict": state}, tmp_path / "cut.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "cut.ckpt").read_bytes()[:-1000])
    assert run_tool("--from", "ibq", tmp_path / "cut.ckpt", out) == 2
    assert "cannot be read as weights" in capsys.readouterr().err
    assert not out.exists()
    torch.save(state, tmp_path / "flat.pt")
    assert run_tool("--from", "ibq", tmp_path / "flat.pt", out, "--weights", "raw") == 0
    assert json.loads((out / "card.json").read_text())["origin"].endswith("raw weights")
