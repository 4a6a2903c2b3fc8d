"""Sounds end to end: a tokenizer is trained, sounds become a cache, both kinds of prior draw ids that become files."""

from __future__ import annotations

import io
import json
import runpy
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_files import write_shards

from vqscale import config as configuration
from vqscale.data.tokens.format import open_ids, read_card
from vqscale.parallel.mesh import Mesh
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.config import Run
from vqscale.train.tokenizer import train

pytest.importorskip("soundfile", reason="the extra audio is not installed")
pytest.importorskip("soxr", reason="the extra audio is not installed")

ROOT = Path(__file__).parent.parent
launch = runpy.run_path(str(ROOT / "launch/train.py"))["main"]
RATE, LENGTH, HOP, CODES = 8000, 640, 40, 29


def tool(name, *given):
    return runpy.run_path(str(ROOT / "tools" / f"{name}.py"))["main"]([str(word) for word in given])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("sound")
    data = {
        "medium": "sounds",
        "shards": str(folder / "train-00.tar"),
        "sample_rate": RATE,
        "seconds": LENGTH / RATE,
        "num_workers": 0,
        "index_dir": str(folder),
        "make": {"num_sounds": 12, "seconds": 0.2, "sample_rate": 16000},
    }
    net = {"name": "wave", "channels": 2, "ratios": [5, 8], "lstm_layers": 0, "width": 16, "hidden": 16}
    asked = {
        "task": "tokenizer",
        "run": {"folder": str(folder / "run"), "steps": 2, "log_every": 1, "device": "cpu"},
        "data": {"train": data, "val": data, "batch": 4},
        "tokenizer": {
            "signal": {"name": "sounds", "sample_rate": RATE, "mel_window": 256, "mel_hop": 64, "num_mels": 20},
            "net": {**net, "num_blocks": 1, "num_groups": 4},
            "quantizer": {"name": "simvq", "num_codes": CODES, "dim": 4, "init": "normal"},
        },
        "loss": {"reconstruction": "mel", "reconstruction_weight": 45.0},
        "engine": {"name": "torch"},
    }
    from vqscale.data import samples

    config = configuration.parse(Run, asked)
    samples.prepare(config.data.train)
    summary = train(config, Mesh())
    assert summary["images"] == 12
    assert np.isfinite([summary["mel"], summary["stft"], summary["si_sdr"]]).all()
    assert tool("encode", folder / "run", folder / "cache", "--medium", "sounds", "--shards", data["shards"],
                "--workers", 0, "--device", "cpu") == 0  # fmt: skip
    return folder


def test_a_cache_of_sounds_says_how_they_were_read(trained, capsys):
    card = read_card(trained / "cache")
    assert (card.grid, card.num_images, card.views) == ((LENGTH // HOP,), 12, ("center",))
    assert dict(card.reading) == {
        "sample_rate": RATE,
        "seconds": 0.08,
        "short": "repeat",
        "peak_db": None,
        "clip": False,
    }
    ids = open_ids(trained / "cache")[...]
    assert ids.shape == (12, 1, 16)
    assert 0 <= ids.min() <= ids.max() < CODES
    assert (trained / "run/samples/reconstructions/0000000002.png").stat().st_size > 1000
    shards = trained / "train-00.tar"
    assert tool("encode", trained / "run", trained / "other", "--shards", shards, "--image-size", 8) == 2
    assert tool("encode", trained / "run", trained / "other", "--medium", "sounds", "--shards", shards,
                "--views", "flip") == 2  # fmt: skip
    told = capsys.readouterr().err
    assert "no images in 1 shards" in told
    assert "--views flip is not for sounds: use center" in told


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["autoregressive", "masked"])
def test_priors_draw_sounds_of_every_class(trained, prior, capsys):
    asked = {
        "task": "prior",
        "run": {"folder": str(trained / prior), "steps": 2, "log_every": 1, "device": "cpu"},
        "data": {"batch": 4, "train": {"path": str(trained / "cache")}, "val": {"path": str(trained / "cache")}},
        "prior": {
            "name": prior,
            "num_codes": None,
            "grid": None,
            "num_classes": 10,
            "feature_dim": None,
            "head": {"embedding": "codebook"},
            "net": {"width": 16, "num_layers": 1, "num_heads": 2, "ffn_multiple": 8},
        },
        "tokenizer": str(trained / "run"),
        "engine": {"name": "torch"},
    }
    (trained / f"{prior}.yaml").write_text(json.dumps(asked))
    assert launch([str(trained / f"{prior}.yaml")]) == 0
    assert np.isfinite(json.loads((trained / prior / "summary.json").read_text())["loss"])
    out = trained / f"{prior}-samples"
    given = (trained / prior, trained / "run", out, "--per-class", 2, "--batch", 7, "--device", "cpu")
    steps = ("--steps", 3) if prior == "masked" else ()
    assert tool("sample", *given, *steps) == 0
    with np.load(out / "samples.npz") as file:
        kept, labels, ids = file["arr_0"], file["arr_1"], file["ids"]
    assert (kept.shape, kept.dtype, ids.shape) == ((20, LENGTH), np.int16, (20, LENGTH // HOP))
    assert sorted(labels.tolist()) == sorted([*range(10)] * 2)
    decoded = Tokenizer.load(trained / "run").decode(torch.from_numpy(ids)).clamp(-1, 1)[:, 0]
    assert np.abs(decoded.numpy() - kept / 32767).max() < 1e-3
    with wave.open(io.BytesIO((out / "000013.wav").read_bytes())) as file:
        assert (file.getframerate(), file.getnchannels()) == (RATE, 1)
        assert file.readframes(LENGTH) == kept[13].astype("<i2").tobytes()
    assert (out / "grid.png").stat().st_size > 1000
    assert tool("sample", *given, "--resize", 8, "--overwrite") == 2
    assert "--resize is for images, and the tokenizer is of sounds" in capsys.readouterr().err
    page = ("sounds", trained / "run", "--shards", trained / "train-00.tar", "--no-speech", "--out", trained / "page")
    assert tool("evaluate", *page, "--samples", out) == 0
    heard = (trained / "page/index.html").read_text()
    assert heard.count("<audio controls src=") == 2 * 8 + 20
    assert heard.count("<figcaption>class 3</figcaption>") == 2
    assert tool("evaluate", *page, "--samples", trained / "cache") == 2


def test_a_cache_of_pictures_is_refused_by_a_prior_of_sounds(trained, tmp_path, capsys):
    """Whether the config says the grid of its ids, or has it looked up beside the tokenizer of sounds."""
    net = {"channels": 8, "multipliers": [1, 1], "num_blocks": 1, "z_channels": 4, "num_groups": 4}
    pictures = {"net": net | {"attention_levels": []}, "quantizer": {"name": "vq", "num_codes": CODES, "dim": 4}}
    saved = Tokenizer.from_config(configuration.parse(TokenizerConfig, pictures)).save(tmp_path / "saved")
    (shards,) = write_shards(tmp_path, [6])
    given = ("--shards", shards, "--image-size", 8, "--workers", 0, "--device", "cpu")
    assert tool("encode", saved, tmp_path / "cache", *given) == 0
    net = {"width": 16, "num_layers": 1, "num_heads": 2, "ffn_multiple": 8}
    asked = {
        "task": "prior",
        "run": {"folder": str(tmp_path / "prior"), "steps": 1, "device": "cpu"},
        "data": {"batch": 2, "train": {"path": str(tmp_path / "cache")}},
        "engine": {"name": "torch"},
    }
    known = {"num_codes": CODES, "grid": [LENGTH // HOP]}
    looked_up = {"num_codes": None, "grid": None, "feature_dim": None, "head": {"embedding": "codebook"}}
    wants = {
        "it has [4, 4] positions along the sides (grid), but expected are [16]": {"prior": known},
        "give that tokenizer, or encode a cache with this one": {"prior": looked_up, "tokenizer": str(trained / "run")},
    }
    for said, change in wants.items():
        change["prior"] |= {"num_classes": 10, "net": net}
        (tmp_path / "prior.yaml").write_text(json.dumps(asked | change))
        assert launch([str(tmp_path / "prior.yaml")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "prior").exists()
