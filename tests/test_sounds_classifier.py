"""The classifier of drawn sounds: what it learns, its numbers against their slow forms on any number of processes, its
commands, and what it refuses. What it shares with that of shapes is tested in test_shapes_classifier.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from shard_files import write_tar
from test_sounds_whole import RATE, drawn, main, tokenizer_of

from vqscale.data.config_sounds import SoundsConfig
from vqscale.data.made.sounds import CLASS_NAMES
from vqscale.data.recordings import Recordings
from vqscale.disk import wav
from vqscale.metrics import sounds_classifier as judged
from vqscale.nets.config.classifiers import SoundsClassifierConfig
from vqscale.parallel.mesh import Mesh
from vqscale.programs.commands import classifier
from vqscale.programs.recordings import score, through
from vqscale.train.classifiers import SHAPES, SOUNDS, varied_spectra

TINY = SoundsClassifierConfig(
    sample_rate=RATE,
    seconds=0.5,
    mel_window=256,
    mel_hop=64,
    num_mels=20,
    width=8,
    steps=30,
    batch=20,
    num_images=20,
    num_held_out=10,
    lr=1e-2,
)
LABELS = (3, 0, 7, 6, 9)


@pytest.fixture(scope="module")
def trained():
    return SOUNDS.train(TINY, Mesh())


def labelled(folder, labels=LABELS):
    """A config of a shard of sounds of these classes, none where that is None, of other lengths each."""
    members = []
    for n, label in enumerate(labels):
        members.append((f"{n}.wav", wav.encoded(drawn(n if label is None else label, 4000 + 500 * n), RATE)))
        members += [] if label is None else [(f"{n}.cls", str(label).encode())]
    shards = str(write_tar(folder / "val.tar", members))
    return SoundsConfig(shards, sample_rate=RATE, num_workers=0, index_dir=str(folder))


def test_it_learns_what_it_is_shown(trained):
    bands, labels = judged.spectra(list(range(20)), TINY)
    assert labels.tolist() == [n % 10 for n in range(20)]
    assert (trained(bands).logits_NC.argmax(1) == labels).float().mean() > 0.5  # a tenth by chance
    for frames in (3, 50):
        assert trained(bands[:2, :, :frames]).features_ND.shape == (2, 32)
    torch.testing.assert_close(trained(bands - 2).logits_NC, trained(bands).logits_NC)  # as loud as it is


def test_spectra_are_varied_by_their_keys_alone():
    bands, keys = torch.randn(64, 20, 30), torch.arange(64)
    once = varied_spectra(bands, keys)
    assert torch.equal(once[10:20], varied_spectra(bands[10:20], keys[10:20]))
    places = [
        [at for at in range(16) if torch.equal(part, whole[:, at : at + 15])]
        for whole, part in zip(bands, once, strict=True)
    ]
    assert all(len(at) == 1 for at in places)
    assert {at for (at,) in places} == set(range(16))


def test_noise_has_the_spectrum_and_the_level_of_the_sound_and_no_more():
    wave = torch.from_numpy(drawn(9, 16000).astype(np.float32) / 32768)
    noise = judged.noise_like(wave, 1)
    assert torch.equal(noise, judged.noise_like(wave, 1))
    assert not torch.equal(noise, judged.noise_like(wave, 2))
    assert noise.norm() == pytest.approx(wave.norm().item(), rel=1e-5)
    white = torch.randn(16000, generator=torch.Generator().manual_seed(1))
    means = [judged.bands(TINY)(x[None])[0].exp().square().mean(1).log() for x in (wave, noise, white)]
    near, far = ((mean - means[0]).abs().mean() for mean in means[1:])
    assert near < 1 < 5 < far
    assert torch.equal(judged.noise_like(torch.zeros(4000), 1), torch.zeros(4000))


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.dist)])
def test_the_shares_are_those_of_one_recording_after_the_other(ranks, tmp_path, trained, world):
    config, tokenizer = labelled(tmp_path), tokenizer_of(None).eval()
    SOUNDS.save(tmp_path / "judge", trained, Mesh(), {})
    right = np.zeros((3, len(LABELS)))
    for n, label in enumerate(LABELS):
        wave = torch.from_numpy(drawn(label, 4000 + 500 * n).astype(np.float32) / 32768)
        with torch.no_grad():
            recon = through(tokenizer, wave, Mesh())[0].clamp(-1, 1)
        for row, x in enumerate((wave, recon, judged.noise_like(wave, n))):
            right[row, n] = trained(judged.bands(TINY)(x[None])).logits_NC.argmax() == label
    assert right[0].sum() > right[1].sum()
    expected = dict(zip(judged.OF, right.mean(1), strict=True))
    by_class = {CLASS_NAMES[label]: dict(zip(judged.OF, right[:, n], strict=True)) for n, label in enumerate(LABELS)}
    for numbers, found_by_class in ranks(world, _scored, world, config, tmp_path / "judge"):
        assert {name: numbers[name] for name in expected} == pytest.approx(expected)
        assert found_by_class == by_class


def _scored(world, config, folder):
    mesh = Mesh(world)
    found = score(tokenizer_of(mesh), Recordings(config, 1), mesh, classifier=SOUNDS.load(folder, mesh)[0])
    return found.numbers, found.by_class


def test_samples_are_recognised_as_what_they_were_drawn_as(trained):
    waves = np.stack([drawn(n, 4000) for n in range(5)])
    with torch.no_grad():
        guessed = judged.named(trained, torch.from_numpy(waves) / 32767).numpy()
    assert judged.of_samples(waves, guessed, trained, "them") == {"recognised_samples": 1.0, "samples": 5}
    labels = guessed.copy()
    labels[0] = (labels[0] + 1) % 10
    assert judged.of_samples(waves, labels, trained, "them")["recognised_samples"] == pytest.approx(0.8)
    labels[0] = -1
    assert judged.of_samples(waves, labels, trained, "them") == {"recognised_samples": 1.0, "samples": 4}
    assert judged.of_samples(waves, np.full(5, -1), trained, "them") == {}
    with pytest.raises(ValueError, match="and of them one is of class 12: give drawn sounds"):
        judged.of_samples(waves, np.full(5, 12), trained, "them")


def test_the_commands_train_it_and_show_what_it_recognises(tmp_path, capsys):
    words = ["--medium=sounds", f"--sample-rate={RATE}", "--width=8", "--steps=2", "--batch=4", "--num-images=4"]
    words += ["--num-held-out=10", "--device=cpu"]
    assert classifier.main([str(tmp_path / "judge"), *words]) == 0
    assert "a sounds classifier that has" in capsys.readouterr().out
    card = json.loads((tmp_path / "judge/card.json").read_text())
    assert (card["format"], card["classes"]) == ("vqscale sounds classifier", list(CLASS_NAMES))
    tokenizer_of(Mesh()).save(tmp_path / "saved", {"peak_db": [-6.0, -2.0]})
    given = ["sounds", str(tmp_path / "saved"), "--shards", labelled(tmp_path).shards, "--no-speech", "--classifier"]
    assert main([*given, str(tmp_path / "judge"), "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert all(f"{name} {result['numbers'][name]:.2%}" in told for name in judged.OF)
    assert result["recognised by class"].keys() == {CLASS_NAMES[label] for label in LABELS}
    assert result["protocol"]["sounds classifier"]["own accuracy"] == card["metrics"]["accuracy"]
    # one of pictures
    SHAPES.save(tmp_path / "shapes", SHAPES.train(_tiny_shapes(), Mesh()), Mesh(), {})
    assert main([*given, str(tmp_path / "shapes")]) == 2
    assert (
        "is the card of 'vqscale shapes classifier' and not of a 'vqscale sounds classifier'" in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="is the card of 'vqscale sounds classifier' and not of a 'vqscale shapes"):
        SHAPES.load(tmp_path / "judge", Mesh())


def _tiny_shapes():
    return SHAPES.schema(image_size=8, width=8, steps=1, batch=2, num_images=2, num_held_out=2)


@pytest.mark.parametrize(
    ("labels", "told"),
    [((1, None, 2), "of the recordings 1 of 3 have none"), ((1, 10), "of the recordings one is of class 10")],
)
def test_recordings_without_its_classes_are_refused(tmp_path, trained, labels, told):
    with pytest.raises(ValueError, match=rf"knows the classes 0 \.\. 9 \(tone, .*{told}: give drawn sounds"):
        score(tokenizer_of(None), Recordings(labelled(tmp_path, labels), 1), Mesh(), classifier=trained)


def test_another_rate_is_refused(tmp_path):
    other = SOUNDS.network(SoundsClassifierConfig(), 10)
    with pytest.raises(
        ValueError, match=f"the tokenizer has {RATE} samples per second, .* trained on 16000: train one"
    ):
        score(tokenizer_of(None), Recordings(labelled(tmp_path), 1), Mesh(), classifier=other)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--image-size=8", "--medium=sounds"], "--image-size is of classifiers of images, and this one is of sounds"),
        (["--sample-rate=8000"], "--sample-rate is of classifiers of sounds, and this one is of images: leave it out"),
        (["--sample-rate=100", "--medium=sounds"], "sample_rate is 100: use at least 4000"),
    ],
)
def test_options_of_another_medium_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        classifier.arguments(["folder", *given])
