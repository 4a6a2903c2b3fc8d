"""Published tokenizers of speech: a made checkpoint, imported, gives what the restated network gives."""

from __future__ import annotations

import math

import published_audio as theirs
import pytest
import torch

from vqscale.nets.waves.config import WaveConfig
from vqscale.tokenizer.export import entries
from vqscale.tokenizer.model import Tokenizer
from vqscale.tokenizer.published import convert

SMALL = {"channels": 4, "dim": 16, "width": 32, "hidden": 48, "blocks": 2}


@pytest.mark.slow
def test_the_whole_checkpoint_is_accounted_for_at_full_size():
    state = theirs.made(theirs.used_shapes(64))
    held = theirs.checkpoint(state)
    assert (len(state), len(held)) == (225, 1838)
    assert len([name for name in held if not name.startswith("model_ema.")]) == 1082
    tokenizer = convert(held, "simvq_audio")
    assert tokenizer.config.net == WaveConfig()
    assert tokenizer.config.signal.sample_rate == 24_000
    mine = entries(tokenizer)
    assert len(mine) == 225
    assert sum(entry.tensor.numel() for entry in mine.values()) == 71_952_898 + 64 * 512
    for ours, name in (
        ("encoder.model.12.conv.weight_g", "encoder.model.12.conv.conv.weight_g"),
        ("encoder.model.13.lstm.bias_hh_l1", "encoder.model.13.lstm.bias_hh_l1"),
        ("decoder.backbone.pos_net.2.proj_out.weight", "backbone.pos_net.2.proj_out.weight"),
        ("decoder.head.out.bias", "head.out.bias"),
        ("quantizer.map.bias", "quantize.embedding_proj.bias"),
        ("quantizer.codebook.rows", "quantize.embedding.weight"),
    ):
        assert torch.equal(mine[ours].tensor, state[name])


def test_an_imported_checkpoint_computes_what_was_published(tmp_path):
    state = theirs.made(theirs.used_shapes(50, **SMALL))
    tokenizer = convert(theirs.checkpoint(state), "simvq_audio")
    waves = torch.randn(2, 1, 3000)
    ids = tokenizer.encode(waves)
    recon, _ = tokenizer(waves)
    assert torch.equal(tokenizer.decode(ids)[..., :3000], recon)  # from ids alone

    again = Tokenizer.load(tokenizer.save(tmp_path / "saved"))
    assert again.fingerprint == tokenizer.fingerprint
    assert torch.equal(again(waves)[0], recon)

    tokenizer, s = tokenizer.double(), {name: x.double() for name, x in state.items()}
    waves = waves.double()
    with torch.no_grad():
        x_BDn = theirs.latents(s, waves)
        x_ND = x_BDn.transpose(1, 2).flatten(0, 1)
        assert 0.05 < x_ND.std() < 10, "the made weights lost the signal, and the comparison its meaning"
        torch.testing.assert_close(tokenizer.latents(waves), x_ND, rtol=0, atol=1e-8)
        ids = torch.cdist(x_ND, theirs.codes(s)).argmin(1).view(2, 10)
        assert torch.equal(tokenizer.encode(waves), ids)
        assert len(ids.unique()) > 4
        expected = theirs.waves(s, theirs.codes(s)[ids].transpose(1, 2))
        assert 0.01 < expected.std() < 10
        torch.testing.assert_close(tokenizer.decode(ids), expected, rtol=0, atol=1e-5)


def test_what_is_not_theirs_is_refused_by_name():
    state = theirs.made(theirs.used_shapes(50, **SMALL))
    held = theirs.checkpoint(state)
    held |= {"teacher.weight": torch.ones(1), "model_ema.teacherbias": torch.ones(1)}
    del held["model_ema.encodermodel15convconvweight_g"], held["head.out.bias"]
    with pytest.raises(ValueError, match="published simvq_audio tokenizer") as caught:
        convert(held, "simvq_audio")
    message = str(caught.value)
    assert "2 missing: head.out.bias, model_ema.encodermodel15convconvweight_g" in message
    assert "2 unknown: teacher.weight, model_ema.teacherbias" in message
    other = theirs.checkpoint(state) | {"head.istft.window": torch.ones(1280)}
    with pytest.raises(ValueError, match="not the Hann window that the net wave inverts with"):
        convert(other, "simvq_audio")
    with pytest.raises(ValueError, match=r"has no encoder.conv_in.weight, .*: these are other weights"):
        convert(other, "simvq")


def test_wavtokenizer_is_the_same_network_with_names_of_its_own():
    """Not causal, rows without a map, and norms of which the first of four is in use."""
    encodec, book = "feature_extractor.encodec.", "feature_extractor.encodec.quantizer.vq.layers.0._codebook."
    rows_KD = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    held = theirs.wavtokenizer(theirs.made(theirs.used_shapes(50, **SMALL, parts=False)), rows_KD)
    tokenizer = convert(held, "wavtokenizer", "raw")
    assert not tokenizer.config.net.causal
    tokenizer, s, waves = tokenizer.double(), {n: x.double() for n, x in held.items()}, torch.randn(1, 1, 2000).double()
    with torch.no_grad():
        x_ND = theirs.latents(s, waves, f"{encodec}encoder.model.", causal=False).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(tokenizer.latents(waves), x_ND, rtol=0, atol=1e-8)
        ids = torch.cdist(x_ND, s[f"{book}embed"]).argmin(1)[None]
        assert torch.equal(tokenizer.encode(waves), ids)
        expected = theirs.waves(s, s[f"{book}embed"][ids].transpose(1, 2))
        torch.testing.assert_close(tokenizer.decode(ids), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"no averaged weights \(model_ema\.\*\): take the others with --weights raw"):
        convert(held, "wavtokenizer")


@pytest.mark.slow
@pytest.mark.parametrize("strides", [(2, 4, 5, 8), (4, 5, 5, 6)])
def test_the_whole_wavtokenizer_is_accounted_for_at_full_size(strides):
    """75 and 40 frames a second, 4096 codes. Tensors of one number each: where it ends up is what was read."""
    shapes = theirs.used_shapes(4096, parts=False, strides=strides)
    state = {name: torch.tensor(float(i)).expand(shape) for i, (name, shape) in enumerate(shapes.items())}
    held = theirs.wavtokenizer(state, torch.tensor(float(len(state))).expand(4096, 512), math.prod(strides))
    tokenizer = convert(held, "wavtokenizer", "raw")
    assert tokenizer.config.net == WaveConfig(ratios=strides, causal=False)
    mine = {name: entry.tensor for name, entry in entries(tokenizer).items()}
    assert len(mine) == 62 + 158 + 2 + 1
    for i, name in enumerate(state):
        ours = name.replace(".conv.conv.", ".conv.") if name.startswith("encoder.") else f"decoder.{name}"
        assert mine[ours].shape == shapes[name]
        assert (mine[ours] == i).all(), name
    assert (mine["quantizer.codebook.rows"] == len(state)).all()
    del held["backbone.convnext.11.norm.shift.weight"]
    with pytest.raises(ValueError, match=r"1 missing: backbone\.convnext\.11\.norm\.bias"):
        convert(held, "wavtokenizer", "raw")
