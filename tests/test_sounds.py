"""The signal sounds and its measures: published values by hand, slow twins, the packages' own numbers, and ranks."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from vqscale import config as configuration
from vqscale import signals
from vqscale.metrics.mel import corners, empty_bands
from vqscale.metrics.sound import (
    MelBands,
    SoundScores,
    SpeechMeasures,
    mel_distance,
    mels_distance,
    si_sdr,
    stft_distance,
)
from vqscale.metrics.spectra import log_mel, magnitudes, mel_filters
from vqscale.metrics.voicing import _correlations, f1, voiced
from vqscale.parallel.mesh import Mesh
from vqscale.signals.config import DistanceConfig
from vqscale.signals.config_sounds import SoundsSignal
from vqscale.train.config import Run

PUBLISHED = MelBands(24000, 1024, 256, 100)
SPEECH = Path("/usr/share/pocketsphinx/test/data/librivox")  # of Debian's pocketsphinx-testdata
TONE = (0.5 * torch.sin(2 * math.pi * 440 * (torch.arange(24000) / 24000)))[None]


def noise(*shape, seed=0):
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_mel_distance_has_the_values_of_the_published_one():
    assert PUBLISHED(TONE).shape == (1, 100, 94)
    assert mel_distance(TONE, TONE / 2, PUBLISHED).item() == pytest.approx(math.log(2), abs=1e-5)
    assert mel_distance(TONE, 0 * TONE, PUBLISHED).item() == pytest.approx(10.7254, abs=1e-4)
    assert PUBLISHED(TONE).mean().item() == pytest.approx(-5.3927, abs=1e-4)
    assert PUBLISHED(0 * TONE).unique().tolist() == pytest.approx([math.log(1e-7)])


def test_spectra_and_filters_are_those_written_out():
    wave = noise(1, 700).double()
    padded = np.pad(wave[0].numpy(), 128, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(256) / 256)
    slow = [np.abs(np.fft.rfft(padded[begin : begin + 256] * window)) for begin in range(0, 701, 64)]
    assert np.allclose(magnitudes(wave, 256, 64)[0].numpy().T, slow, atol=1e-10)
    to_mel, to_hertz = lambda f: 2595 * math.log10(1 + f / 700), lambda m: 700 * (10 ** (m / 2595) - 1)
    for band, size in itertools.product((0, 17, 39), (512, 1023)):
        filters = mel_filters(16000, size, 40)
        low, top, high = (to_hertz(to_mel(8000) * (band + n) / 41) for n in range(3))
        for number in range(0, size // 2 + 1, 3):
            f = number * 16000 / size
            height = max(0.0, min((f - low) / (top - low), (high - f) / (high - top)))
            assert filters[band, number].item() == pytest.approx(height, abs=1e-6)
    with pytest.raises(ValueError, match="500 mel bands up to 8000 Hz are too many for a window of 512"):
        mel_filters(16000, 512, 500)


@pytest.mark.parametrize("rate", [16000, 44100, 96000, 192000])
@pytest.mark.parametrize("count", [3, 32, 64, 500])
def test_bands_that_meet_no_frequency_are_those_of_zeros(rate, count):
    at = torch.tensor(corners(rate, count), dtype=torch.float64)
    bins = torch.arange(257).double() * rate / 512
    met = [((bins > low) & (bins < high)).any() for low, high in zip(at, at[2:], strict=False)]
    assert empty_bands(rate, 512, count) == count - sum(map(int, met))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mel", "mels"])
def test_silence_has_finite_gradients_and_autocast_changes_nothing(name, dtype):
    signal = signals.build(SoundsSignal())
    of = signal.distances(DistanceConfig(name, 45.0), Mesh())
    apart = {
        "mel": lambda x, y: mel_distance(x, y, PUBLISHED),
        "mels": lambda x, y: mels_distance(x, y, 24000, (2048, 1024, 512, 256, 128, 64), 0.05),
    }[name]
    for samples, output in ((TONE, 0 * TONE), (0 * TONE, TONE), (0 * TONE, 0 * TONE), (TONE, 1e-30 * TONE)):
        output = output[None].to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = of(output, samples[None], torch.no_grad)[name]
        assert found.weight == 45.0
        assert found.value.dtype == torch.float32
        found.value.backward()
        assert output.grad.isfinite().all()
        exact = apart(samples, output[0].detach().float()).mean()
        assert torch.equal(found.value.detach(), exact)
    with pytest.raises(ValueError, match="multiple of the hop"):
        of(noise(1, 1, 24320), TONE[None], torch.no_grad)


def test_the_distance_of_several_windows_against_its_slow_form():
    x, y = noise(3, 4000), noise(3, 4000, seed=1)
    of_windows = []
    for size in (512, 64):
        filters = mel_filters(16000, size, size // 16).double().numpy()
        a, b = (np.log(filters @ magnitudes(v.double(), size, size // 4).numpy() + 0.05) for v in (x, y))
        of_windows.append(np.abs(a - b).mean((1, 2)))
    found = mels_distance(x, y, 16000, (512, 64), 0.05)
    assert np.allclose(found.numpy(), np.mean(of_windows, 0), rtol=1e-5)


def test_by_the_distance_of_several_windows_a_quiet_hiss_counts_little_and_a_lost_tone_much():
    """The distance mel of one window has it the other way round: the hiss is in all of its bands."""
    hiss = 3e-4 * noise(1, 24000)
    lost, hushed = (hiss, TONE + hiss), (TONE, TONE + hiss)
    mels = [mels_distance(*pair, 24000, (2048, 1024, 512, 256, 128, 64), 0.05).item() for pair in (lost, hushed)]
    mel = [mel_distance(*pair, PUBLISHED).item() for pair in (lost, hushed)]
    assert mels[0] > 10 * mels[1]
    assert mel[1] > mel[0]
    quiet = (1e-4 * TONE).requires_grad_()
    mels_distance(TONE, quiet, 24000, (2048, 64), 0.05).sum().backward()
    assert (quiet.grad * TONE).sum() < 0, "of a tone below `quiet`, louder is nearer"


def test_si_sdr_and_the_distance_of_transforms_against_slow_forms():
    x, y = noise(3, 4000), noise(3, 4000, seed=1) + 0.4
    for row in range(3):
        a, b = (v[row].double().numpy() - v[row].double().numpy().mean() for v in (x, y))
        p = (a @ b) / (a @ a) * a
        assert si_sdr(x, y)[row].item() == pytest.approx(10 * math.log10((p @ p) / ((b - p) @ (b - p))), abs=1e-9)
        slow = []
        for size in (2048, 1024, 512):
            both = [np.log10(np.maximum(magnitudes(v[row : row + 1], size, size // 4).numpy(), 1e-5)) for v in (x, y)]
            slow.append(np.abs(both[0] - both[1]).mean())
        assert stft_distance(x, y)[row].item() == pytest.approx(np.mean(slow), rel=1e-5)
    assert si_sdr(x, 3 * x + 1).tolist() == [100.0] * 3
    assert si_sdr(x, 0 * x).tolist() == [-100.0] * 3
    assert si_sdr(0 * x + 1, x).isnan().all()


def test_sums_of_clips_of_any_length_add_and_what_has_no_value_is_counted():
    def few(x, y, rate):
        if len(x) < 1000:
            raise ValueError("too short")
        return float(np.abs(x - y).mean()) * rate

    speech = SpeechMeasures({"few": few}, ())
    clips = [(noise(1, 1, n, seed=n), noise(1, 1, n + 50, seed=n + 1)) for n in (30, 900, 2000, 3100)]
    clips.append((torch.zeros(1, 1, 1500), noise(1, 1, 1500)))
    whole, parts = SoundScores(PUBLISHED, speech), [SoundScores(PUBLISHED, speech) for _ in range(2)]
    for number, clip in enumerate(clips):
        whole.add(*clip)
        parts[number % 2].add(*clip)
    parts[0].add(noise(0, 1, 10), noise(0, 1, 10))
    found = whole.from_sums(whole.sums())
    assert found == pytest.approx(whole.from_sums(parts[0].sums() + parts[1].sums()), rel=1e-9)
    cut = [(x[0], y[0, :, : x.shape[-1]]) for x, y in clips]
    assert found["mel"] == pytest.approx(np.mean([mel_distance(x, y, PUBLISHED).item() for x, y in cut]), rel=1e-6)
    assert found["si_sdr"] == pytest.approx(np.mean([si_sdr(x, y).item() for x, y in cut[:-1]]), rel=1e-9)
    assert found["few"] == pytest.approx(np.mean([few(*(v[0].numpy() for v in clip), 24000) for clip in cut[2:]]))
    assert (found["few_without"], found["images"]) == (2, 5)
    assert math.isnan(SoundScores(PUBLISHED).from_sums(SoundScores(PUBLISHED).sums())["mel"])


def test_speech_has_the_packages_own_numbers():
    pytest.importorskip("pystoi")
    pytest.importorskip("pesq")
    speech = SpeechMeasures.installed()
    assert speech.left_out == ()
    pesq, stoi = speech.measures["pesq"], speech.measures["stoi"]
    for wave in (np.zeros(16000, np.float32), noise(2000).numpy()):  # silent, short
        with pytest.raises(ValueError):
            pesq(wave, wave, 16000)
    with pytest.raises(ValueError):
        stoi(noise(2000).numpy(), noise(2000).numpy(), 16000)


def test_recorded_speech_has_the_packages_own_numbers():
    """Rounded to so many bits; the numbers of one recording also stand here, as they were found once."""
    pystoi, soundfile = pytest.importorskip("pystoi"), pytest.importorskip("soundfile")
    package = pytest.importorskip("pesq")
    if not SPEECH.exists():
        pytest.skip("pocketsphinx-testdata is not installed")
    pesq, stoi = SpeechMeasures.installed().measures["pesq"], SpeechMeasures.installed().measures["stoi"]
    known = {10: (3.2382, 0.9999), 8: (1.6636, 0.9971), 6: (1.1187, 0.9618), 4: (1.0278, 0.7736)}
    files = sorted(SPEECH.glob("*.wav"))
    assert len(files) == 5
    for file in files:
        wave, rate = soundfile.read(file, dtype="float32")
        for bits, numbers in known.items():
            coarse = np.round(wave * 2 ** (bits - 1)) / 2 ** (bits - 1)
            found = pesq(wave, coarse, rate), stoi(wave, coarse, rate)
            assert found == (package.pesq(rate, wave, coarse, "wb"), pystoi.stoi(wave, coarse, rate))
            if "0880" in file.name:
                assert found == pytest.approx(numbers, abs=1e-3)


def sung(pitch, level=0.1, rate=16000):
    """A second of ten harmonics."""
    phase = 2 * math.pi * np.cumsum(np.full(rate, pitch)) / rate
    return (level * np.sum([np.sin(n * phase) / n for n in range(1, 11)], 0)).astype(np.float32)


@pytest.mark.parametrize("rate", [16000, 24000])
def test_what_repeats_between_50_and_550_times_a_second_is_voiced(rate):
    hiss = noise(rate).numpy()
    low = np.convolve(hiss, np.ones(rate // 4000) / 4).astype(np.float32)[:rate]
    for pitch in (55, 90, 220, 400, 540):
        assert voiced(sung(pitch, rate=rate), rate).all()
        assert voiced(sung(pitch, rate=rate) + 0.1 * hiss, rate).mean() > 0.95
    for silent in (hiss, low, 0 * hiss, sung(200, 2e-4, rate)):
        assert voiced(silent, rate).mean() < 0.03
    half = np.concatenate([sung(150, rate=rate)[: rate // 2], hiss[: rate // 2]])
    assert voiced(half, rate).sum() == pytest.approx(50, abs=5)
    assert len(voiced(hiss[: rate // 20], rate)) == 0


def test_correlations_are_those_written_out():
    wave = noise(400).numpy().astype(np.float64)
    found = _correlations(wave[None], 300)[0]
    for lag in (0, 1, 57, 100):
        x, y = wave[:300], wave[lag : lag + 300]
        assert found[lag] == pytest.approx(x @ y / math.sqrt((x @ x) * (y @ y)), abs=1e-9)
    assert len(found) == 101
    assert not _correlations(0 * wave[None], 300).any()


def test_f1_of_voicing_counts_frames_and_has_no_value_without_a_voice():
    half = np.concatenate([sung(150)[:8000], np.zeros(8000, np.float32)])
    assert f1(sung(150), sung(210), 16000) == 1.0  # the pitch is not compared
    first, second = voiced(sung(150), 16000), voiced(half, 16000)
    assert f1(sung(150), half, 16000) == pytest.approx(2 * second.sum() / (first.sum() + second.sum()))
    assert f1(sung(150), 0 * half, 16000) == 0.0
    with pytest.raises(ValueError, match="no frame is voiced"):
        f1(0 * half, noise(16000).numpy(), 16000)


def test_pictures_show_loud_above_quiet_and_predictions_stay_in_range():
    signal = signals.build(SoundsSignal())
    waves = torch.stack([TONE, 0 * TONE])
    picture = signal.picture(waves, waves.flip(0))
    assert picture.shape == (200, 188, 3)
    tone, silence = picture[:100, :94], picture[:100, 94:]
    assert silence.max() < 20
    assert tone[80:, 20:70].max() > 150  # 440 Hz is near the bottom
    assert np.array_equal(picture[100:, :94], silence)
    assert signal.predict(torch.tensor([3.0, -2.0], dtype=torch.bfloat16)).tolist() == [1.0, -1.0]
    assert torch.equal(log_mel(TONE[:, :50], 24000, 1024, 256, 100).isfinite(), torch.ones(1, 100, 3, dtype=torch.bool))


def test_a_config_of_sounds_is_checked_against_its_data():
    asked = {"task": "tokenizer", "run": {"folder": "x"}, "loss": {"reconstruction": "l2"}}
    asked["data"] = {"train": {"medium": "sounds", "shards": "x.tar", "sample_rate": 16000, "seconds": 0.02}}
    asked["tokenizer"] = {"signal": {"name": "sounds"}, "net": {"name": "wave"}, "latent_norm": "none"}
    with pytest.raises(configuration.ConfigError) as error:
        configuration.parse(Run, asked)
    for part in (
        "expected mel | mels, the distances of tokenizer.signal sounds, found l2",
        "sounds come at 16000 samples per second, and tokenizer.signal.sample_rate is 24000",
        "a window of 320 samples is not longer than half of tokenizer.signal.mel_window 1024",
    ):
        assert part in str(error.value)
    asked["loss"]["reconstruction"] = "mels"
    asked["data"]["train"] |= {"sample_rate": 24000, "seconds": 0.04}
    with pytest.raises(configuration.ConfigError, match=r"960 samples is not longer than half of .*mels_windows 2048"):
        configuration.parse(Run, asked)
    asked["data"]["train"]["seconds"] = 0.08
    configuration.parse(Run, asked)
    asked["tokenizer"]["signal"] |= {"mels_windows": [2048, 40], "quiet": 0.0}
    with pytest.raises(configuration.ConfigError) as error:
        configuration.parse(Run, asked)
    for part in ("mels_windows are [2048, 40], but each has a band for every 16 samples", "quiet is 0.0, and silence"):
        assert part in str(error.value)


def test_bands_without_a_frequency_are_told_with_the_config():
    asked = {"task": "tokenizer", "run": {"folder": "x"}, "loss": {"reconstruction": "mels"}}
    asked["data"] = {"train": {"medium": "sounds", "shards": "x.tar", "sample_rate": 192000, "seconds": 0.08}}
    signal = {"name": "sounds", "sample_rate": 192000, "num_mels": 64}
    asked["tokenizer"] = {"signal": signal, "net": {"name": "wave"}, "latent_norm": "none"}
    with pytest.raises(configuration.ConfigError) as error:
        configuration.parse(Run, asked)
    for part in (
        "of 64 mel bands up to 96000 Hz 2 meet no frequency of a window of 1024 samples: lower num_mels",
        "at 192000 samples per second bands of the distance mels meet no frequency of its windows [2048, 1024, 512",
    ):
        assert part in str(error.value)
    signal["num_mels"] = 16
    asked["loss"]["reconstruction"] = "mel"
    configuration.parse(Run, asked)
    with pytest.raises(configuration.ConfigError, match="num_mels is 0: use a positive number"):
        configuration.parse(Run, asked | {"tokenizer": asked["tokenizer"] | {"signal": signal | {"num_mels": 0}}})
