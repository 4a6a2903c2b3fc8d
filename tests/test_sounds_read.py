"""Reading recordings: windows against the whole recording cut by hand, what is broken, what is drawn, folders."""

from __future__ import annotations

import io
import json
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from shard_files import png, write_tar

from vqscale.data import samples
from vqscale.data.config_sounds import DrawnSoundsConfig, SoundsConfig
from vqscale.data.made import make
from vqscale.data.made.sounds import CLASS_NAMES, draw
from vqscale.disk import wav
from vqscale.programs.commands import shards

RATE = 8000
NEEDS = "the extra audio is not installed"


@pytest.fixture(scope="module")
def soundfile():
    pytest.importorskip("soxr", reason=NEEDS)
    return pytest.importorskip("soundfile", reason=NEEDS)


def config(shards="x.tar", **more):
    return SoundsConfig(str(shards), sample_rate=RATE, num_workers=0, **{"seconds": 0.05, **more})


def voice(seconds, rate, channels=1):
    """A few tones in fixed noise."""
    time = np.arange(round(seconds * rate))[:, None] / rate
    tones = sum(0.2 * np.sin(2 * np.pi * f * time + np.arange(channels)) for f in (150, 730, 1900))
    return (tones + 0.02 * np.random.default_rng(5).standard_normal(tones.shape)).astype(np.float32)


def saved(soundfile, values, rate, format="WAV", subtype="FLOAT"):
    file = io.BytesIO()
    soundfile.write(file, values, rate, format=format, subtype=subtype)
    return file.getvalue()


def read(data, asked=None, seed=None):
    from vqscale.data.sounds import Sounds

    asked = asked or config()
    out = torch.empty(asked.shape)
    small = Sounds(asked).sample([data], seed, out)
    return out[0].numpy(), small


@pytest.mark.parametrize("rate", [8000, 16000, 11025, 44100, 128000, 6007])
def test_a_window_is_cut_out_of_the_whole_recording_at_the_new_rate(soundfile, rate):
    import soxr

    values = voice(0.5, rate)
    data, once = saved(soundfile, values, rate), soxr.resample(values[:, 0], rate, RATE)
    length, room = 400, len(once) - 400
    begins = set()
    for seed in (None, *range(8)):
        found, small = read(data, seed=seed)
        start = min(range(room + 1), key=lambda s: float(np.abs(once[s : s + length] - found).max()))
        begins.add(start)
        assert np.abs(once[start : start + length] - found).max() < 2e-4
        assert not small
        assert np.array_equal(found, read(data, seed=seed)[0])
    assert room // 2 in begins
    assert len(begins) > 6


def test_channels_are_averaged_and_a_lossy_file_reads_like_its_source(soundfile):
    eight = voice(0.2, RATE, channels=8)
    assert np.allclose(read(saved(soundfile, eight, RATE))[0], eight.mean(1)[600:1000], atol=1e-6)
    values = voice(0.2, 24000)
    plain = read(saved(soundfile, values, 24000))[0]
    for format, subtype, worst in (("FLAC", "PCM_24", 1e-5), ("OGG", "VORBIS", 0.2), ("OGG", "OPUS", 0.2)):
        assert np.abs(read(saved(soundfile, values, 24000, format, subtype))[0] - plain).max() < worst, subtype


def test_short_recordings_are_repeated_or_padded(soundfile):
    values = voice(0.02, RATE)[:, 0]
    data = saved(soundfile, values, RATE)
    found, small = read(data, seed=3)
    assert small
    assert np.array_equal(found, np.concatenate([values, values, values])[:400])
    assert np.array_equal(read(data, config(short="pad"))[0], np.concatenate([values, np.zeros(240, np.float32)]))


def test_the_peak_is_of_the_whole_recording_and_values_beyond_one_stay_unless_asked(soundfile):
    values = voice(0.5, RATE)[:, 0] * np.linspace(0.1, 4, 4000, dtype=np.float32)
    data = saved(soundfile, values, RATE)
    assert np.abs(read(data)[0] - values[1800:2200]).max() < 1e-6
    assert np.abs(values[1800:2200]).max() > 1
    assert np.abs(read(data, config(clip=True))[0]).max() == 1
    told = read(data, config(peak_db=(-6, -2)))[0]
    assert np.allclose(told, values[1800:2200] * 10 ** (-4 / 20) / np.abs(values).max(), atol=1e-6)
    gains = {float(np.abs(read(data, config(peak_db=(-6, -2), seconds=0.5), seed)[0]).max()) for seed in range(5)}
    assert len(gains) == 5
    assert all(10 ** (-6 / 20) <= gain <= 10 ** (-2 / 20) for gain in gains)


def test_what_is_broken_is_said_by_name(soundfile):
    values = voice(3, 24000)
    whole = {
        "cut WAV": saved(soundfile, values, 24000, "WAV", "PCM_16"),
        "cut FLAC": saved(soundfile, values, 24000, "FLAC", "PCM_16"),
        "cut MP3": saved(soundfile, values, 24000, "MP3", "MPEG_LAYER_III"),
        "cut Vorbis": saved(soundfile, values, 24000, "OGG", "VORBIS"),
        "cut Opus": saved(soundfile, values, 24000, "OGG", "OPUS"),
    }
    for name, data in whole.items():
        read(data)
        with pytest.raises(ValueError, match="cut short"):
            read(data[: len(data) // 2])
        assert name
    streamed = whole["cut WAV"][:4] + struct.pack("<I", 0xFFFFFFFF) + whole["cut WAV"][8:]
    assert np.array_equal(read(streamed)[0], read(whole["cut WAV"])[0])
    for wrong, reason in (
        (saved(soundfile, np.full(4000, np.nan, np.float32), RATE), "no numbers"),
        (saved(soundfile, np.zeros((0, 1), np.float32), RATE), "no samples"),
        (b"", "are no recording"),
        (png(1), "are no recording"),
        (struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", 38, b"WAVEfmt ", 16, 1, 1, 2**30, 2**30, 2, 16, b"data", 2) + b"ab",
         "claims 1073741824"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            read(wrong)


def test_a_stream_replaces_the_broken_and_stops_at_the_bound(soundfile, tmp_path):
    good = [saved(soundfile, voice(0.1 * n, RATE), RATE) for n in range(1, 6)]
    members = [(f"{n}.{kind}", data) for n, (kind, data) in enumerate([("wav", good[0]), ("flac", b"junk"),
               ("wav", good[2][:-100]), ("ogg", good[3]), ("wav", good[4])])]  # fmt: skip
    asked = config(write_tar(tmp_path / "s.tar", members), index_dir=str(tmp_path))
    (batch,) = samples.SampleStream(asked, 5, train=False).batches()
    assert batch.valid.tolist() == [True, False, False, True, True]
    assert ["are no recording" in line or "cut short" in line for line in batch.broken] == [True, True]
    streams = [samples.SampleStream(asked, 4, rank, world, seed=7) for rank, world in ((0, 1), (0, 2), (1, 2))]
    one, *two = (next(stream.batches()).samples for stream in streams)
    assert torch.equal(one, torch.cat(two))
    with pytest.raises(ValueError, match=r"no sounds in 1 shards.*wav, flac, mp3, ogg, opus"):
        samples.SampleStream(config(write_tar(tmp_path / "p.tar", [("1.png", png(1))]), index_dir=str(tmp_path)), 2)


def test_without_the_packages_the_extra_is_named_and_no_sample_is_blamed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    asked = config(
        write_tar(tmp_path / "s.tar", [("1.wav", wav.encoded(np.zeros(999, np.int16), RATE))]), index_dir=str(tmp_path)
    )
    with pytest.raises(RuntimeError, match=r"pip install 'vqscale\[audio\]'"):
        samples.SampleStream(asked, 1)


def test_drawn_sounds_are_made_once_and_are_functions_of_their_number(tmp_path):
    drawn = DrawnSoundsConfig(num_sounds=20, seconds=0.5, sample_rate=RATE, first_index=30, seed=2)
    asked = config(tmp_path / "train-{00..01}.tar", make=drawn)
    samples.prepare(asked)
    with tarfile.open(tmp_path / "train-01.tar") as tar:
        held = {info.name: tar.extractfile(info).read() for info in tar}
    values, label = draw(47, 4000, RATE, 2)
    assert held["00000047.wav"] == wav.encoded(values, RATE)
    assert held["00000047.cls"] == b"7" == str(label).encode()
    assert json.loads(held["00000047.json"]) == {"label": 7, "class": CLASS_NAMES[7]}
    every = [draw(n, 4000, RATE, 2)[0].astype(float) / 32768 for n in range(40)]
    assert all(0.09 < np.abs(sound).max() < 0.75 for sound in every)
    turned = [sound / np.linalg.norm(sound) for sound in every]
    assert max(abs(float(a @ b)) for n, a in enumerate(turned) for b in turned[:n]) < 0.9
    assert not np.array_equal(draw(3, 4000, RATE, 2)[0], draw(3, 4000, RATE, 3)[0])


def test_a_folder_of_recordings_becomes_shards(soundfile, tmp_path):
    for name, format in (("a/1.wav", "WAV"), ("a/2.flac", "FLAC"), ("b/3.ogg", "OGG")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(saved(soundfile, voice(0.2, RATE), RATE, format, None))
    plan = make.folder(tmp_path / "in")
    make.write(plan, make.names(tmp_path / "out", "train", plan.num_samples, 100), "train")
    asked = config(tmp_path / "out/train-0000.tar", index_dir=str(tmp_path))
    (batch,) = samples.SampleStream(asked, 3, train=False).batches()
    assert batch.valid.all()
    assert sorted(batch.labels.tolist()) == [0, 0, 1]
    (tmp_path / "in/a/1.wav").write_bytes((tmp_path / "in/a/1.wav").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"1\.wav is not whole.*cut short"):
        make.write(make.folder(tmp_path / "in"), [tmp_path / "again/train-0000.tar"], "train")


def test_of_a_folder_of_both_recordings_are_taken_where_they_are_asked_for(soundfile, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/1.wav").write_bytes(saved(soundfile, voice(0.2, RATE), RATE))
    (tmp_path / "in/1.png").write_bytes(png(1))
    for given, suffix in (((), ".png"), (("--medium", "images"), ".png"), (("--medium", "sounds"), ".wav")):
        out = tmp_path / "-".join(["out", *given])
        assert shards.main(["--source", str(tmp_path / "in"), "--out", str(out), *given]) == 0
        with tarfile.open(out / "train-0000.tar") as tar:
            assert {Path(name).suffix for name in tar.getnames()} - {".json"} == {suffix}
    (tmp_path / "in/1.wav").unlink()
    capsys.readouterr()
    for source, more, said in (
        ("in", (), "no sounds in"),
        ("in", ("--crops", "2"), "of which --crops 2 cuts squares: leave it out"),
        ("out/train-0000.tar", (), "--medium sounds is about the files of a folder as they are, and --source is"),
    ):
        given = ["--source", str(tmp_path / source), "--out", str(tmp_path / "none"), "--medium", "sounds", *more]
        assert shards.main(given) == 2
        assert said in capsys.readouterr().err


def test_problems_of_a_config_are_told_together():
    wrong = SoundsConfig("x.tar", sample_rate=7, seconds=0, peak_db=(0, -3))
    assert [key for key, _ in wrong.problems()] == ["sample_rate", "seconds", "peak_db"]
    assert [key for key, _ in DrawnSoundsConfig(0, 0, 1).problems()] == ["num_sounds", "sample_rate", "seconds"]
