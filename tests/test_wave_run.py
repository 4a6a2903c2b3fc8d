"""Whole runs of the net of waves against its discriminator: equal to plain torch, on any number of ranks and stages."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
import wave

import jobs
import numpy as np
import pytest
import test_no_waiting
import torch

from vqscale import config as configuration
from vqscale import signals
from vqscale.data.samples import SampleStream
from vqscale.nets import discriminators
from vqscale.parallel.mesh import Mesh
from vqscale.seed import derive
from vqscale.signals import sounds
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.config import Run
from vqscale.train.tokenizer import train

pytest.importorskip("soundfile", reason="sounds are read with the extra audio")

RATE, LENGTH, STEPS = 4000, 64, 4
DISCRIMINATOR = {
    "name": "wave",
    "periods": {"periods": [2, 3], "channels": [2, 3]},
    "resolutions": {"windows": [16], "channels": 2},
    "normalised": {"periods": [2], "period_channels": [2, 3], "windows": [32], "channels": 2},
}
ADAM = {"lr": 1e-3, "betas": [0.5, 0.9], "eps": 1e-4, "schedule": "constant"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Twelve recordings of noise, a little longer than a window."""
    folder = tmp_path_factory.mktemp("sounds")
    noise = np.random.default_rng(1).normal(0, 4000, (12, LENGTH + 8)).astype("<i2")
    with tarfile.open(folder / "noise.tar", "w") as tar:
        for number, samples in enumerate(noise):
            with wave.open(held := io.BytesIO(), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(RATE)
                file.writeframes(samples.tobytes())
            member = tarfile.TarInfo(f"{number:03d}.wav")
            member.size = len(held.getvalue())
            tar.addfile(member, io.BytesIO(held.getvalue()))
    return folder


def parsed(shards, folder, engine, steps=STEPS, first="tokenizer", **quantizer):
    reading = {"sample_rate": RATE, "seconds": LENGTH / RATE, "num_workers": 0, "index_dir": str(shards)}
    net = {"channels": 2, "ratios": [2, 4], "width": 8, "hidden": 12, "num_blocks": 1, "num_groups": 4, "dropout": 0.0}
    asked = {
        "task": "tokenizer",
        "run": {"folder": str(folder), "steps": steps, "log_every": 1, "checkpoint_every": 2, "device": "cpu"},
        "data": {"train": {"medium": "sounds", "shards": str(shards / "noise.tar"), **reading}, "batch": 4},
        "tokenizer": {
            "signal": {"name": "sounds", "sample_rate": RATE, "mel_window": 32, "mel_hop": 8, "num_mels": 5},
            "net": {"name": "wave", **net},
            "quantizer": {"name": "simvq", "num_codes": 11, "dim": 6, "init": "normal", "revive_every": 0, **quantizer},
            "latent_norm": "none",
        },
        "loss": {
            "reconstruction": "mel",
            "reconstruction_weight": 45.0,
            "quantizer_weight": 1000.0,
            "adversarial": {
                "net": DISCRIMINATOR,
                "first": first,
                "weight": 1.0,
                "feature_weight": 1.0,
                "lecam_weight": 0,
            },
        },
        "average": {"decay": 0.9},
        "optim": ADAM,
        "engine": {"clip_norm": 0, **engine},
    }
    return configuration.parse(Run, asked)


def reference(config):
    """The same training by autograd and torch.optim.Adam; the last tensors, named as saved."""
    net = Tokenizer.from_config(config.tokenizer, Mesh(), config.run.seed)
    torch.manual_seed(derive(config.run.seed, "discriminator"))
    judge = discriminators.build(config.loss.adversarial.net)
    players = [[p for p in net.parameters() if p.requires_grad], list(judge.parameters())]
    adams = [torch.optim.Adam(player, lr=1e-3, betas=(0.5, 0.9), eps=1e-4) for player in players]
    mel = sounds.bands(config.tokenizer.signal)
    averages = [p.detach().clone() for p in players[0]]
    batches = SampleStream(config.data.train, 4, 0, 1, seed=derive(config.run.seed, "data")).batches(0)

    def step(player, loss):
        for p, gradient in zip(players[player], torch.autograd.grad(loss, players[player]), strict=True):
            p.grad = gradient
        adams[player].step()

    def learn(x, y):
        real, fake = ([answer.values for answer in judge(waves)] for waves in (x, y.detach()))
        hinge = [(1 - a).clamp(min=0).mean() + (1 + b).clamp(min=0).mean() for a, b in zip(real, fake, strict=True)]
        squares = [(1 - a).square().mean() + b.square().mean() for a, b in zip(real, fake, strict=True)]
        step(1, sum(hinge[:2]) / 2 + hinge[2] + 8 * sum(squares[3:]) / 2)

    for _ in range(config.run.steps):
        x = next(batches).samples
        y, quantized = net(x)
        if config.loss.adversarial.first == "discriminator":
            learn(x, y)
        its, matched = [], []
        for i, (answer, real) in enumerate(zip(judge(y), judge(x), strict=True)):
            weight = (0.5, 0.5, 1.0, 4.0, 4.0)[i]
            away = (1 - answer.values).clamp(min=0) if i < 3 else (1 - answer.values).square()
            its.append(weight * away.mean())
            pairs = zip(answer.features, real.features, strict=True)
            matched.append(weight * sum((f - g.detach()).abs().mean() for f, g in pairs))
        distance = (mel(x[:, 0]) - mel(y[:, 0])).abs().mean()
        step(0, 45 * distance + 1000 * sum(quantized.losses.values()) + sum(its) + sum(matched))
        if config.loss.adversarial.first == "tokenizer":
            learn(x, y)
        averages = [0.9 * a + 0.1 * p.detach() for a, p in zip(averages, players[0], strict=True)]
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    found = {f"parameter/{name}": p.detach() for name, p in zip(names, players[0], strict=True)}
    found |= {f"discriminator/parameter/{name}": p.detach() for name, p in judge.named_parameters()}
    return found | {f"average/{name}": average for name, average in zip(names, averages, strict=True)}


def compare(folder, truth):
    saved = jobs.tensors(folder, STEPS)
    assert set(truth) <= set(saved)
    for name, tensor in truth.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture(scope="module")
def truth(shards, tmp_path_factory):
    return reference(parsed(shards, tmp_path_factory.mktemp("unused"), {"name": "torch"}))


@pytest.mark.slow
def test_either_player_may_step_first_and_averages_are_of_g_and_v(shards, truth, tmp_path):
    second = reference(parsed(shards, tmp_path / "unused", {"name": "torch"}, first="discriminator"))
    name = "parameter/encoder.model.0.conv.weight_v"
    assert (second[name] - truth[name]).abs().max() > 1e-5
    for first, expected in (("tokenizer", truth), ("discriminator", second)):
        train(parsed(shards, tmp_path / first, {"name": "torch"}, first=first), Mesh())
        compare(tmp_path / first, expected)
    assert {f"average/encoder.model.0.conv.weight_{part}" for part in "gv"} <= truth.keys()
    rows = jobs.rows(tmp_path / "tokenizer")
    for row in rows:
        parts = 45 * row["loss/mel"] + row["loss/adversarial"] + row["loss/features"]
        parts += 1000 * (row["loss/codebook"] + row["loss/commitment"])
        assert row["loss"] == pytest.approx(parts, rel=1e-5)
        assert {"discriminator/hinge", "discriminator/least_squares"} <= row.keys()


def _begun(shards, folder):
    """Two steps on two processes, at two stages, the codebook over both."""
    for stage in (2, 3):
        engine = {"name": "deepspeed", "zero_stage": stage}
        asked = parsed(shards, folder / str(stage), engine, steps=2)
        train(dataclasses.replace(asked, mesh=dataclasses.replace(asked.mesh, codes=2)), Mesh(1, 2))
    return True


@pytest.mark.dist
@pytest.mark.slow
def test_what_two_processes_began_at_any_stage_one_goes_on_with(shards, truth, tmp_path, ranks):
    assert all(ranks(2, _begun, shards, tmp_path, timeout_s=180))
    for stage in (2, 3):
        train(parsed(shards, tmp_path / str(stage), {"name": "torch"}), Mesh())
        compare(tmp_path / str(stage), truth)


def test_a_step_that_is_not_finite_is_skipped_and_counted(shards, tmp_path, monkeypatch):
    calls, distance = [], sounds.mel_distance

    def broken(*waves, **bands):
        calls.append(1)
        return distance(*waves, **bands) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(sounds, "mel_distance", broken)
    train(parsed(shards, tmp_path / "run", {"name": "torch"}, steps=3), Mesh())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows if "skipped" in row] == [0, 1, 1]
    assert all(x.isfinite().all() for x in jobs.tensors(tmp_path / "run", 3).values())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_decoder_that_is_silent_has_finite_gradients(shards, tmp_path, precision):
    config = parsed(shards, tmp_path, {"name": "torch"})
    tokenizer = Tokenizer.from_config(config.tokenizer)
    judge = discriminators.build(config.loss.adversarial.net)
    with torch.no_grad():
        for parameter in tokenizer.decoder.head.parameters():
            parameter.zero_()
    distances = signals.build(config.tokenizer.signal).distances(config.loss, Mesh())
    waves = torch.randn(2, 1, LENGTH)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        recon, quantized = tokenizer(waves)
        assert recon.abs().max() < 1e-6
        answers = sum((answer.values.float() - 1).square().mean() for answer in judge(recon))
    loss = answers + sum(each.weight * each.value for each in distances(recon, waves, None).values())
    (loss + sum(quantized.losses.values())).backward()
    for name, p in tokenizer.named_parameters():
        assert not p.requires_grad or p.grad.isfinite().all(), name


@pytest.mark.slow
@pytest.mark.parametrize("distance", ["mel", "mels"])
def test_a_step_that_logs_nothing_waits_where_that_of_images_does(shards, tmp_path, distance):
    config = parsed(shards, tmp_path / "run", {"name": "torch"}, steps=6)
    signal = dataclasses.replace(config.tokenizer.signal, mels_windows=(LENGTH,))
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, log_every=100, checkpoint_every=100),
        tokenizer=dataclasses.replace(config.tokenizer, signal=signal),
        loss=dataclasses.replace(config.loss, reconstruction=distance),
    )
    path = tmp_path / "sounds.yaml"
    path.write_text(configuration.dump(config))
    test_no_waiting.check(test_no_waiting.waits(path), test_no_waiting.ALWAYS)
