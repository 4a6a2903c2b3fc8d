"""A second signal, of one side and with a context, registered by a line in each open set that it touches: it trains in
the loop, is evaluated, encoded into a cache, loaded and decoded, against a discriminator of two answers.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from typing import ClassVar, Literal

import jobs
import numpy as np
import pytest
import torch
from torch import nn

from vqscale import config as configuration
from vqscale import nets
from vqscale.data.config import MEDIA, ImagesConfig, ShardsConfig
from vqscale.data.samples import SampleStream
from vqscale.data.tokens.format import open_ids
from vqscale.data.views import Source
from vqscale.nets.config import NETS, NetSettings
from vqscale.nets.config.discriminators import DISCRIMINATORS, DiscriminatorSettings
from vqscale.nets.discriminators import Answer
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.programs import encode
from vqscale.programs.score import score
from vqscale.signals import Distance, Signal, Sums
from vqscale.signals.config import SIGNALS, SignalSettings, seen
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.config import Run
from vqscale.train.tokenizer import train

LENGTH, HOP = 16, 4


@dataclass(frozen=True)
class WavesConfig(ShardsConfig):
    """Waves as bytes, one a sample; the seed says where a longer one is cut."""

    module: ClassVar[str] = f"{__name__}:Waves"
    suffixes: ClassVar[tuple[str, ...]] = ("raw",)
    kind: ClassVar[str] = "waves"
    medium: Literal["waves"] = "waves"
    "what lies in the shards"
    length: int = LENGTH
    "samples of a wave"

    @property
    def shape(self):
        return 1, self.length

    @property
    def card(self):
        return {"reading": (("length", self.length),)}


class Waves:
    def __init__(self, config):
        self.config = config

    def sample(self, members, seed, out):
        (data,) = members
        if len(data) < self.config.length:
            raise ValueError("the wave is too short")
        wave = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        start = 0 if seed is None else seed % (len(data) - self.config.length + 1)
        out.copy_(wave[None, start : start + self.config.length] / 127.5 - 1)
        return False

    def views(self, members, kind, out):
        return self.sample(members, None, out[0])


@dataclass(frozen=True)
class WavesSignal(SignalSettings):
    """Waves whose mean both sides are told, as a context."""

    module: ClassVar[str] = f"{__name__}:Told"
    media: ClassVar[tuple[str, ...]] = ("waves",)
    distances: ClassVar[tuple[str, ...]] = ("slope",)
    name: Literal["waves"] = "waves"
    """which signal"""
    slope_weight: float = 0.5
    """weight of the distance of differences"""


class Told(Signal):
    def enter(self, samples):
        mean = samples.mean(dim=-1, keepdim=True)
        return samples - mean, mean

    def distances(self, config, mesh):
        def of(output, samples, autocast):
            wave, _ = self.enter(samples)
            slopes = (output.diff(dim=-1) - wave.diff(dim=-1)).square().mean()
            return {
                "l2": Distance(config.reconstruction_weight, (output - wave).square().mean()),
                "slope": Distance(self.config.slope_weight, slopes),
            }

        return of

    def predict(self, output):
        return output.float()

    def sums(self, mesh, judges=None):
        return Errors(mesh)

    def picture(self, samples, predicted):
        both = torch.cat([samples, predicted], dim=1).clamp(-1, 1)
        return ((both + 1) * 127.5).to(torch.uint8)[0, :, :, None].expand(-1, -1, 3).contiguous().numpy()


class Errors(Sums):
    def __init__(self, mesh):
        self.mesh, self.totals = mesh, torch.zeros(2, dtype=torch.float64)

    def add(self, samples, predicted):
        wave = samples - samples.mean(dim=-1, keepdim=True)
        self.totals += torch.tensor([len(samples), (wave - predicted).double().square().mean((1, 2)).sum()])

    def numbers(self):
        count, error = ops.sum_over(self.totals, self.mesh.world).tolist()
        return {"error": error / count, "images": count}


@dataclass(frozen=True)
class FramesConfig(NetSettings):
    """Frames of a wave, each seen beside the context."""

    module: ClassVar[str] = f"{__name__}:build"
    takes_context: ClassVar[bool] = True
    name: Literal["frames"] = "frames"
    """which network"""
    in_channels: int = 1
    """channels of a wave"""

    @property
    def strides(self):
        return (HOP,)

    @property
    def strides_from(self):
        return "length of a frame"


class Side(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, context):
        return self.layer(x + context)


def build(config, dim):
    encoder, decoder = nn.Conv1d(1, dim, HOP, stride=HOP), nn.ConvTranspose1d(dim, 1, HOP, stride=HOP)
    return nets.Parts(Side(encoder), nn.Identity(), nn.Identity(), Side(decoder), "layer.weight")


@dataclass(frozen=True)
class PairConfig(DiscriminatorSettings):
    """Two convolutions that look at other lengths."""

    module: ClassVar[str] = f"{__name__}:Pair"
    num_answers: ClassVar[int] = 2
    name: Literal["pair"] = "pair"
    """which network"""

    @property
    def least_side(self):
        return 5


class Pair(nn.Module):
    def __init__(self, config, gather):
        super().__init__()
        self.parts = nn.ModuleList([nn.Conv1d(1, 2, 3), nn.Conv1d(1, 2, 5)])
        self.heads = nn.ModuleList([nn.Conv1d(2, 1, 1), nn.Conv1d(2, 1, 1)])

    def forward(self, waves):
        maps = [part(waves).relu() for part in self.parts]
        return [Answer(head(found), (found,)) for head, found in zip(self.heads, maps, strict=True)]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """A line in each of four dictionaries, and nothing else."""
    monkeypatch.setitem(MEDIA, "waves", f"{__name__}:WavesConfig")
    monkeypatch.setitem(SIGNALS, "waves", f"{__name__}:WavesSignal")
    monkeypatch.setitem(NETS, "frames", f"{__name__}:FramesConfig")
    monkeypatch.setitem(DISCRIMINATORS, "pair", f"{__name__}:PairConfig")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("waves")
    waves = np.random.default_rng(1).integers(0, 256, (12, LENGTH + 8), dtype=np.uint8)
    with tarfile.open(folder / "waves.tar", "w") as tar:
        for number, wave in enumerate(waves):
            member = tarfile.TarInfo(f"{number:03d}.raw")
            member.size = len(wave)
            tar.addfile(member, io.BytesIO(wave.tobytes()))
    return folder


def medium(shards):
    return {"medium": "waves", "shards": str(shards / "waves.tar"), "num_workers": 0, "index_dir": str(shards)}


def asked(shards, folder):
    signal, quantizer = {"name": "waves"}, {"name": "ibq", "num_codes": 11, "dim": 3, "init": "normal"}
    return {
        "task": "tokenizer",
        "run": {"folder": str(folder), "steps": 2, "log_every": 1, "checkpoint_every": 1, "device": "cpu"},
        "data": {"train": medium(shards), "val": medium(shards), "batch": 4},
        "tokenizer": {"signal": signal, "net": {"name": "frames"}, "quantizer": quantizer, "latent_norm": "none"},
        "loss": {"reconstruction": "slope", "adversarial": {"net": {"name": "pair"}, "adaptive": True}},
        "optim": {"schedule": "constant"},
        "engine": {"name": "torch"},
    }


def test_it_trains_is_evaluated_encoded_and_decoded(shards, tmp_path):
    config = configuration.parse(Run, asked(shards, tmp_path / "run"))
    summary = train(config, Mesh())
    assert summary is not None
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in (row for row in rows if "loss" in row):
        parts = row["loss/l2"] + 0.5 * row["loss/slope"] + row["discriminator/weight"] * row["loss/adversarial"]
        others = sum(x for name, x in row.items() if name.startswith("loss/") and name.partition("/")[2] not in KNOWN)
        assert row["loss"] == pytest.approx(parts + 0.01 * others, rel=1e-5)
    assert jobs.tensors(tmp_path / "run", 2)["discriminator/lecam"].shape == (4,)  # two answers, to real and to fake

    tokenizer = Tokenizer.load(tmp_path / "run")
    source = config.data.train
    found = score(tokenizer, SampleStream(source, 5, train=False), Mesh())
    assert found.numbers["images"] == 12
    assert found.numbers["error"] == pytest.approx(_error(tokenizer, source), rel=1e-5)

    made = encode.encode(tokenizer, Source(source, "center"), tmp_path / "cache", Mesh(), encode.Options(storage=8))
    assert (made.state, made.card.grid, made.card.reading) == ("encoded", (4,), (("length", LENGTH),))
    waves = next(SampleStream(source, 12, train=False).batches()).samples
    entered, context = tokenizer.signal.enter(waves)
    ids = torch.from_numpy(open_ids(tmp_path / "cache")[...])[:, 0].long()
    assert torch.equal(ids, tokenizer.encode(entered, context))
    assert tokenizer.decode(ids, context).shape == waves.shape


KNOWN = ("l2", "slope", "adversarial")


def _error(tokenizer, source):
    """Wave by wave."""
    errors = []
    for batch in SampleStream(source, 1, train=False).batches():
        wave, mean = batch.samples - batch.samples.mean(), batch.samples.mean().view(1, 1, 1)
        errors.append((tokenizer(wave, mean)[0] - wave).square().mean().item())
    return sum(errors) / len(errors)


@pytest.mark.slow
def test_a_run_goes_on_with_its_discriminator_of_two_answers(shards, tmp_path):
    for folder, steps in (("whole", [3]), ("parts", [2, 3])):
        for last in steps:
            config = asked(shards, tmp_path / folder)
            config["run"]["steps"] = last
            train(configuration.parse(Run, config), Mesh())
    one, other = (jobs.tensors(tmp_path / folder, 3) for folder in ("whole", "parts"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_does_not_fit_a_signal_is_refused_with_all_its_problems(shards, tmp_path):
    config = asked(shards, tmp_path)
    config["tokenizer"]["signal"] = {"name": "images"}
    config["data"]["val"] = {"shards": "x.tar", "image_size": 16}
    with pytest.raises(configuration.ConfigError) as error:
        configuration.parse(Run, config)
    for part in (
        "the shards hold waves, and tokenizer.signal images takes images",
        "expected l1 | l2, the distances of tokenizer.signal images, found slope",
        "val has images of 3 x 16 x 16 numbers and train has waves of 1 x 16",
    ):
        assert part in str(error.value)


def test_shards_without_a_medium_are_of_images():
    asked = {"task": "tokenizer", "run": {"folder": "x"}, "data": {"train": {"shards": "x.tar"}}}
    config = configuration.parse(Run, asked)
    assert isinstance(config.data.train, ImagesConfig)
    assert config.tokenizer.signal.name == "images"


@pytest.mark.parametrize(
    ("given", "there"),
    [
        ({"image_size": 8, "resize": None, "flip": True}, {"image_size": 8}),
        ({"medium": "buckets", "buckets": [[8, 8]], "image_size": 3}, {"buckets": [[8, 8]]}),
        ({"medium": "sounds", "seconds": 2.0, "clip": False, "peak_db": -1.0}, {"seconds": 2.0, "peak_db": -1.0}),
        ({"medium": "tokens", "path": "x"}, {}),
        ({"path": "x"}, {}),
    ],
)
def test_a_card_has_the_settings_that_ids_depend_on_of_the_medium_of_its_run(given, there):
    assert seen(given) == there
