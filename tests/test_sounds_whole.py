"""Whole recordings through a tokenizer: slow forms, any number of ranks and grids, the command and its page."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_files import write_tar

from vqscale import config as configuration
from vqscale.data.config_sounds import SoundsConfig
from vqscale.data.made.sounds import draw
from vqscale.disk import wav
from vqscale.metrics.sound import MelBands, mel_distance, si_sdr
from vqscale.parallel.mesh import Mesh
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.model import Tokenizer

pytest.importorskip("soundfile", reason="the extra audio is not installed")
pytest.importorskip("soxr", reason="the extra audio is not installed")

from vqscale.data.recordings import Recordings
from vqscale.programs.recordings import score, through

main = runpy.run_path(str(Path(__file__).parent.parent / "tools/evaluate.py"))["main"]
RATE, HOP, CODES = 8000, 20, 37
LENGTHS = (6000, 1603, 5001, 19, 4000, 2222, 7000)  # one shorter than a hop, one not whole


def drawn(number, length):
    return draw(number, max(length, 4000), RATE, 1)[0][:length]


def asked(quantizer="simvq"):
    net = {
        "name": "wave",
        "channels": 2,
        "ratios": [4, 5],
        "lstm_layers": 1,
        "width": 16,
        "hidden": 16,
        "num_blocks": 1,
    }
    return {
        "signal": {"name": "sounds", "sample_rate": RATE, "mel_window": 256, "mel_hop": 64, "num_mels": 20},
        "net": {**net, "num_blocks": 1, "num_groups": 4},
        "latent_norm": "rms",  # or all latents of a new encoder are one
        "quantizer": {"name": quantizer, "num_codes": CODES, "dim": 4, "init": "normal"},
    }


def tokenizer_of(mesh, quantizer="simvq"):
    return Tokenizer.from_config(configuration.parse(TokenizerConfig, asked(quantizer)), mesh, seed=3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("whole"))


def write_shards(folder):
    """A config of a shard with recordings of all LENGTHS, and one that is broken."""
    members = [(f"{n}.wav", wav.encoded(drawn(n, length), RATE)) for n, length in enumerate(LENGTHS)]
    members.insert(5, ("broken.wav", members[0][1][:-7]))
    return SoundsConfig(
        str(write_tar(folder / "val.tar", members)), sample_rate=RATE, num_workers=0, index_dir=str(folder)
    )


def scored(data, codes, shards, quantizer="simvq"):
    mesh = Mesh(data, codes)
    return score(tokenizer_of(mesh, quantizer), Recordings(shards, 0.8), mesh)


@pytest.mark.parametrize("quantizer", ["simvq", "scq"])
def test_the_numbers_are_those_of_one_recording_after_the_other(shards, quantizer):
    found, tokenizer = scored(1, 1, shards, quantizer), tokenizer_of(None, quantizer).eval()
    mel, ratio, ids = [], [], []
    bands = MelBands(RATE, 256, 64, 20)
    for number, length in enumerate(LENGTHS):
        wave = torch.from_numpy(drawn(number, length).astype(np.float32) / 32768)[None, None, :6400]
        with torch.no_grad():
            recon, quantized = tokenizer(wave)
        recon = recon.clamp(-1, 1)
        mel.append(mel_distance(wave[0], recon[0], bands).item())
        ratio.append(si_sdr(wave[0], recon[0]).item())
        ids.append(quantized.ids)
        assert len(quantized.ids) == math.ceil(wave.shape[-1] / HOP)
    tokens = torch.cat(ids)
    seconds = sum(min(length, 6400) for length in LENGTHS) / RATE
    expected = {
        "mel": np.mean(mel),
        "si_sdr": np.mean(ratio),
        "images": len(LENGTHS),
        "usage": len(tokens.unique()) / CODES,
        "ceiling": 1 - math.exp(-len(tokens) / CODES),
        "seconds": seconds,
        "tokens_per_s": len(tokens) / seconds,
        "kbps": len(tokens) / seconds * math.log2(CODES) / 1000,
        "broken": 1,
        "cut": 1,
    }
    assert {key: found.numbers[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert found.per_code.tolist() == torch.bincount(tokens, minlength=CODES).tolist()
    assert len(found.broken) == 1
    assert "broken: the recording was cut short" in found.broken[0]
    assert [one.key for one in found.heard] == ["0", "1", "2", "3", "4", "5", "6"]
    assert all(len(one.wave) == len(one.recon) for one in found.heard)


def test_every_id_of_a_token_is_counted(shards):
    """SEANet's decoder behind a residual quantizer, as EnCodec has them."""
    levels = {"name": "residual", "levels": 3, "inner": asked()["quantizer"]}
    given = asked() | {"net": asked()["net"] | {"decoder": "seanet"}, "quantizer": levels}
    tokenizer = Tokenizer.from_config(configuration.parse(TokenizerConfig, given), seed=3).eval()
    numbers = score(tokenizer, Recordings(shards, 0.8), Mesh()).numbers
    waves = [torch.from_numpy(drawn(*one).astype(np.float32) / 32768)[None, None, :6400] for one in enumerate(LENGTHS)]
    with torch.no_grad():
        passes = [tokenizer(wave) for wave in waves]
    bands = MelBands(RATE, 256, 64, 20)
    mel = [mel_distance(x[0], y[0].clamp(-1, 1), bands).item() for x, (y, _) in zip(waves, passes, strict=True)]
    assert numbers["mel"] == pytest.approx(np.mean(mel), rel=1e-5)
    assert numbers["kbps"] == pytest.approx(3 * numbers["tokens_per_s"] * math.log2(CODES) / 1000)
    assert numbers["tokens_per_s"] * numbers["seconds"] == pytest.approx(sum(len(found.ids) for _, found in passes))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("world", "grids"), [(2, [(2, 1), (1, 2)]), (4, [(2, 2)])])
def test_any_number_of_processes_finds_the_same(ranks, shards, world, grids):
    alone = scored(1, 1, shards)
    for every in ranks(world, _on_grids, grids, shards):
        for found in every:
            assert found.numbers == pytest.approx(alone.numbers, rel=1e-5)
            assert torch.equal(found.per_code, alone.per_code)
            assert found.broken == alone.broken
            assert [one.key for one in found.heard] == [one.key for one in alone.heard]
            for one, other in zip(found.heard, alone.heard, strict=True):
                assert np.allclose(one.recon, other.recon, atol=1e-5)


def _on_grids(grids, shards):
    return [scored(*grid, shards) for grid in grids]


def test_ids_do_not_know_what_is_in_the_batch_nor_the_length_of_others():
    tokenizer = tokenizer_of(None).eval()
    wave = torch.from_numpy(drawn(9, 4000).astype(np.float32) / 32768)
    _, ids = through(tokenizer, wave, Mesh())
    batch = torch.stack([wave, wave.flip(0), 0 * wave])[:, None]
    assert torch.equal(tokenizer.encode(batch)[0], ids[:, 0])


def test_the_command_writes_numbers_and_a_page_to_listen_to(shards, tmp_path, capsys):
    tokenizer_of(Mesh()).save(tmp_path / "saved", {"peak_db": [-6.0, -2.0]})
    given = ["sounds", str(tmp_path / "saved"), "--shards", shards.shards, "--out", str(tmp_path / "out"), "--json"]
    assert main(given) == 0
    told = capsys.readouterr()
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert json.loads(told.out) == result
    assert result["numbers"]["images"] == 7
    assert "1 recordings could not be read" in " ".join(result["notes"])
    page = (tmp_path / "out/index.html").read_text()
    assert page.count("<audio controls src=") == 14
    assert page.count("original above reconstruction") == 7
    assert main(["sounds", str(tmp_path / "saved"), "--shards", str(tmp_path / "none.tar")]) == 2
    with pytest.raises(ValueError, match="sounds come at 16000 samples per second"):
        score(tokenizer_of(Mesh()), Recordings(SoundsConfig(shards.shards, sample_rate=16000), 1), Mesh())
