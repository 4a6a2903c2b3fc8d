"""EnCodec's model of 24 kHz: a made state dictionary, imported, gives what the restated network gives, and what that of
transformers does."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import published_audio as theirs
import pytest
import torch

from vqscale import config as configuration
from vqscale.nets.waves.config import WaveConfig
from vqscale.programs.commands import export
from vqscale.tokenizer import as_encodec
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.export import entries
from vqscale.tokenizer.model import Tokenizer
from vqscale.tokenizer.published import convert

SMALL = {"channels": 4, "dim": 8, "num_codes": 32, "levels": 3}
NET = {"name": "wave", "decoder": "seanet", "channels": 2, "ratios": [4], "width": 32, "hidden": 8, "num_blocks": 1}
ROWS = {"name": "vq", "num_codes": 16, "dim": 4, "similarity": "euclid"}
main = runpy.run_path(str(Path(__file__).parent.parent / "tools/import_checkpoint.py"))["main"]


def made(**sizes):
    return theirs.made(theirs.encodec_shapes(**sizes))


def as_transformers(state):
    """Under the names of transformers' EncodecModel, as older files have them."""
    found = {}
    for name, x in state.items():
        new = name.replace("quantizer.vq.layers", "quantizer.layers").replace("._codebook.", ".codebook.")
        new = new.replace(".conv.conv.", ".conv.").replace(".convtr.convtr.", ".conv.")
        found[new.replace("coder.model.", "coder.layers.")] = x
    return found


def test_the_whole_state_dictionary_is_accounted_for_at_full_size():
    state = made()
    assert len(state) == 62 + 62 + 32 * 4
    tokenizer = convert(state, "encodec", "raw")
    assert tokenizer.config.net == WaveConfig(decoder="seanet")
    quantizer = tokenizer.config.quantizer
    assert (quantizer.levels, quantizer.inner.num_codes, quantizer.inner.dim) == (32, 1024, 128)
    assert tokenizer.config.signal.sample_rate == 24_000
    mine = entries(tokenizer)
    assert len(mine) == 62 + 62 + 32
    networks = 8_802_816 + 8_802_274 - 384 * (512 * 7 + 2) - 384 * 512 * 7  # as SimVQ's, but with 128 for 512
    assert sum(entry.tensor.numel() for entry in mine.values()) == networks + 32 * 1024 * 128
    for ours, name in (
        ("encoder.model.12.conv.weight_g", "encoder.model.12.conv.conv.weight_g"),
        ("decoder.model.1.lstm.bias_hh_l1", "decoder.model.1.lstm.bias_hh_l1"),
        ("decoder.model.3.convtr.weight_v", "decoder.model.3.convtr.convtr.weight_v"),
        ("decoder.model.13.block.3.conv.bias", "decoder.model.13.block.3.conv.conv.bias"),
        ("quantizer.columns.31.codebook.rows", "quantizer.vq.layers.31._codebook.embed"),
    ):
        assert torch.equal(mine[ours].tensor, state[name])
    assert tokenizer.encode(torch.randn(1, 1, 1000)).shape == (1, 4, 32)


def test_an_imported_checkpoint_computes_what_was_published(tmp_path):
    state = made(**SMALL)
    tokenizer = convert(state, "encodec", "raw")
    for length in (1, 319, 321, 3001):
        waves = torch.randn(2, 1, length)
        ids = tokenizer.encode(waves)
        with torch.no_grad():  # of an LSTM that is trained torch rounds otherwise
            recon, _ = tokenizer(waves)
        assert ids.shape == (2, -(-length // 320), 3)
        assert recon.shape == waves.shape
        assert torch.equal(tokenizer.decode(ids)[..., :length], recon)  # from ids alone

    again = Tokenizer.load(tokenizer.save(tmp_path / "saved"))
    assert again.fingerprint == tokenizer.fingerprint
    assert torch.equal(again.encode(waves), ids)
    assert torch.equal(again.decode(ids)[..., :3001], recon)

    tokenizer, s, waves = tokenizer.double(), {name: x.double() for name, x in state.items()}, waves.double()
    with torch.no_grad():
        x_ND = theirs.latents(s, waves).transpose(1, 2).flatten(0, 1)
        assert 0.05 < x_ND.std() < 10, "the made weights lost the signal, and the comparison its meaning"
        torch.testing.assert_close(tokenizer.latents(waves), x_ND, rtol=0, atol=1e-8)
        ids, z_ND = theirs.refined([s[f"quantizer.vq.layers.{i}._codebook.embed"] for i in range(3)], x_ND)
        assert torch.equal(tokenizer.encode(waves), ids.view(2, 10, 3))
        assert all(len(column.unique()) > 3 for column in ids.T)
        expected = theirs.mirrored_waves(s, z_ND.view(2, 10, 8).transpose(1, 2))
        assert 0.01 < expected.std() < 10
        torch.testing.assert_close(tokenizer.decode(ids.view(2, 10, 3)), expected, rtol=0, atol=1e-8)


def test_the_first_levels_alone_are_a_tokenizer_of_fewer_bits():
    state, waves = made(**SMALL), torch.randn(1, 1, 4000)
    whole, first = convert(state, "encodec", "raw"), convert(state, "encodec", "raw", levels=2)
    assert first.config.quantizer.levels == 2
    ids = first.encode(waves)
    assert torch.equal(ids, whole.encode(waves)[..., :2])
    books = [state[f"quantizer.vq.layers.{i}._codebook.embed"] for i in range(2)]
    z_ND = sum(rows[ids[0, :, i]] for i, rows in enumerate(books))
    torch.testing.assert_close(first.decode(ids), whole.reconstruct(z_ND, (1, 13)))
    for levels in (0, 4):
        with pytest.raises(ValueError, match=f"the first {levels} levels .* has 3: change --levels"):
            convert(state, "encodec", "raw", levels=levels)
    with pytest.raises(ValueError, match=r"the first 2 levels .* has 1: change --levels"):
        convert(theirs.made(theirs.used_shapes(8, 4, 16, 32, 48, 2)), "simvq_audio", "raw", levels=2)


def test_names_of_transformers_are_the_same_tokenizer():
    state = made(**SMALL)
    other = as_transformers(state)
    assert not set(other) & {name for name in state if "lstm" not in name}
    newer = {
        name.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): x
        for name, x in other.items()
    }
    fingerprints = {convert(names, "encodec", "raw").fingerprint for names in (state, other, newer)}
    assert len(fingerprints) == 1
    with pytest.raises(ValueError, match=r"two tensors of the file are encoder\.model\.0\.conv\.conv\.bias, one of"):
        convert(state | other, "encodec", "raw")


@pytest.mark.parametrize("names", [dict, as_transformers])
def test_what_is_not_theirs_is_refused_by_name(names):
    state = names(made(**SMALL))
    last = next(name for name in state if "decoder" in name and ".12." in name and name.endswith("weight_g"))
    lacking = {name: x for name, x in state.items() if name != last} | {"teacher.weight": torch.ones(1)}
    with pytest.raises(ValueError, match="published encodec tokenizer") as caught:
        convert(lacking, "encodec", "raw")
    assert "1 missing: decoder.model.12.convtr.convtr.weight_g" in str(caught.value)
    assert "1 unknown: teacher.weight" in str(caught.value)
    rows = next(name for name in state if "layers.1" in name and name.endswith("embed"))
    with pytest.raises(ValueError, match="not 0, 1, 2"):
        convert({name: x for name, x in state.items() if name != rows}, "encodec", "raw")
    with pytest.raises(ValueError, match=r"1 of another shape: quantizer\.vq\.layers\.1\._codebook\.embed is \(16,"):
        convert(state | {rows: torch.ones(16, 8)}, "encodec", "raw")
    with pytest.raises(ValueError, match=r"has no backbone\.embed\.weight, .*: these are other weights"):
        convert(state | made(**SMALL), "simvq_audio", "raw")


def test_the_command_imports_a_file_of_the_package(tmp_path, capsys):
    torch.save(made(**SMALL), tmp_path / "encodec_24khz.th")
    given = ["--from", "encodec", "--weights", "raw", str(tmp_path / "encodec_24khz.th"), str(tmp_path / "out")]
    assert main([*given, "--levels", "2"]) == 0
    assert json.loads((tmp_path / "out/card.json").read_text())["config"]["quantizer"]["levels"] == 2
    assert main([*given, "--levels", "9"]) == 2
    assert "has 3: change --levels" in capsys.readouterr().err


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_transformers_computes_the_same(full):
    library = pytest.importorskip("transformers", reason="the extra export is not installed")
    small = {"num_filters": 4, "hidden_size": 8, "codebook_size": 64, "target_bandwidths": [1.0, 4.0]}
    model = library.EncodecModel(library.EncodecConfig(**({} if full else small))).eval()
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    model.load_state_dict(theirs.made(shapes))
    tokenizer = convert(model.state_dict(), "encodec", "raw")
    waves = torch.randn(2, 1, 5003)
    for kind, near in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model, tokenizer, waves = model.to(kind), tokenizer.to(kind), waves.to(kind)
        with torch.no_grad():
            ids = model.encode(waves, bandwidth=model.config.target_bandwidths[-1]).audio_codes
            assert torch.equal(tokenizer.encode(waves), ids[0].transpose(1, 2))
            assert len(ids.unique()) > 20
            expected = model.decode(ids, [None]).audio_values
            assert 0.01 < expected.std() < 10
            torch.testing.assert_close(tokenizer.decode(ids[0].transpose(1, 2)), expected, rtol=0, atol=near)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"net": NET | {"decoder": "vocos"}}, "net.decoder is vocos"),
        ({"net": NET | {"lstm_layers": 0}}, "net.lstm_layers is 0"),
        ({"net": NET | {"in_channels": 3}}, "net.in_channels is 3"),
        ({"net": NET | {"spectra": {"window": 8}}}, "net.spectra is set"),
        ({"signal": {"name": "images"}, "net": NET | {"in_channels": 1}}, "signal.name is images"),
        ({"latent_norm": "rms"}, "latent_norm is rms"),
        ({"quantizer": {"name": "vq", "num_codes": 16, "dim": 4}}, "quantizer.name is vq"),
        ({"quantizer": {"name": "residual", "inner": {"name": "fsq", "num_codes": 16}}}, "quantizer.inner.name is fsq"),
        ({"quantizer": {"name": "residual", "inner": ROWS | {"similarity": "cosine"}}}, "similarity is cosine"),
        ({"quantizer": {"name": "residual", "inner": ROWS | {"num_codes": 12}}}, "is 12, and it has a power of two"),
        ({"quantizer": {"name": "residual", "inner": ROWS, "scale": 0.5}}, "scale is 0.5, and it has 1"),
    ],
)
def test_what_is_no_class_of_transformers_is_said(given, says):
    plain = {"net": NET, "latent_norm": "none", "quantizer": {"name": "residual", "inner": ROWS}}
    assert list(as_encodec.reasons(built(plain))) == []
    (reason,) = as_encodec.reasons(built(plain | given))
    assert says in reason
    with pytest.raises(ValueError, match=r"no transformers\.EncodecModel computes what this tokenizer does"):
        as_encodec.export(built(plain | given))


def built(asked):
    return Tokenizer.from_config(configuration.parse(TokenizerConfig, {"signal": {"name": "sounds"}} | asked)).eval()


@pytest.mark.parametrize(("levels", "causal", "rate"), [(3, True, 24_000), (5, False, 8_000)])
def test_transformers_loads_what_is_exported(levels, causal, rate, tmp_path):
    library = pytest.importorskip("transformers", reason="the extra export is not installed")
    inner = {"name": "vq", "num_codes": 32, "dim": 6, "similarity": "euclid", "init": "normal", "init_scale": 0.1}
    net = {"name": "wave", "decoder": "seanet", "channels": 4, "ratios": [2, 5], "causal": causal, "encoder_gain": 2.0}
    asked = {"signal": {"name": "sounds", "sample_rate": rate}, "net": net, "latent_norm": "none"}
    tokenizer = built(asked | {"quantizer": {"name": "residual", "levels": levels, "inner": inner}})
    tokenizer.save(tmp_path / "saved")
    assert export.main(["--to", "transformers", str(tmp_path / "saved"), str(tmp_path / "out")]) == 0
    model = library.EncodecModel.from_pretrained(tmp_path / "out").eval()
    assert model.quantizer.num_quantizers == levels
    sound = torch.randn(1003)
    entered = library.AutoFeatureExtractor.from_pretrained(tmp_path / "out")(
        sound.numpy(), sampling_rate=rate, return_tensors="pt"
    )["input_values"]
    with torch.no_grad():
        for bandwidth in model.config.target_bandwidths:
            ids = model.encode(entered, bandwidth=bandwidth).audio_codes
            assert torch.equal(tokenizer.encode(sound[None, None])[..., : ids.shape[2]], ids[0].transpose(1, 2))
        assert ids.shape[2] == levels
        expected = model.decode(ids, [None]).audio_values
    torch.testing.assert_close(tokenizer.decode(ids[0].transpose(1, 2)), expected, rtol=0, atol=1e-5)
